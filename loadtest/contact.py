"""Puts the pictures of a run on a captioned contact sheet. Knows nothing of how they were drawn."""

from pathlib import Path

from PIL import Image

from app.diffusion.images import contact_sheet
from loadtest.records import Run

SHEET = "diffusion_results.png"
MOST = 64  # pictures on the sheet, from the start of the run
COLUMNS = 8


def contact_sheet_of(run: Run) -> Path | None:
    """Draws the sheet and returns its path; None if the run has no pictures."""
    prompts = {record.id: str(record.request.get("prompt", "")) for record in run.records if record.outcome == "ok"}
    files = sorted(file for file in (run.folder / "pictures").glob("*") if int(file.name.partition("-")[0]) in prompts)
    files = files[:MOST]
    if not files:
        return None
    images = []
    for file in files:
        with Image.open(file) as image:
            images.append(image.convert("RGB"))
    captions = [prompts[int(file.name.partition("-")[0])] for file in files]
    path = run.folder / SHEET
    contact_sheet(images, captions, columns=min(COLUMNS, len(images)), cell=192).save(path)
    return path
