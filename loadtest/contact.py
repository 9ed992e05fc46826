"""The pictures of a run on one captioned sheet. Knows nothing of how they came."""

from pathlib import Path

from PIL import Image

from app.diffusion.images import contact_sheet
from loadtest.records import Run

SHEET = "diffusion_results.png"
MOST = 64  # pictures on it, the first of the run
COLUMNS = 8


def contact_sheet_of(run: Run) -> Path | None:
    """None where there is no picture."""
    prompts = {one.id: str(one.request.get("prompt", "")) for one in run.records if one.outcome == "ok"}
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
