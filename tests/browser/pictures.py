"""Makes the pictures of the page in assets/, of the API of a local cluster with the demo model.

One is of an edit within a painted mask, which the judge of the demo model must find right.
"""

import base64
import os
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cluster import ROOT
from cluster.cli import Parser, UserError, run_command
from cluster.connection import LOCAL, dashboard_of
from cluster.dashboard import serve_address
from cluster.local.state import RUN_DIR, running
from demo import scenes
from tests.browser.conftest import CHROMIUM, KEPT, WAIT_MS, draw, pixels, ready

ASSETS = ROOT / "assets"
QUALITY = 82  # of the WebP files: sharp letters, and all of them below 300 kB
PROMPTS = [
    ("a big green tree in the snow", 5, 2),
    ("a yellow moon above a purple house at night", 3, 4),
    ("a pink flower next to a red mushroom on a cream background", 2, 2),
    ("a red boat under a yellow sun at dusk", 7, 4),
]


def save(page: Any, name: str, **options: Any) -> None:
    picture = Image.open(BytesIO(page.screenshot(**options)))
    picture.convert("RGB").save(ASSETS / f"page-{name}.webp", quality=QUALITY, method=6)


def draw_all(page: Any, expect: Any, prompts: list[tuple[str, int, int]], drawn: int = 0) -> None:
    for prompt, seed, n in prompts:
        draw(page, prompt, seed=seed, n=n, num_inference_steps=20)
        drawn += n
        expect(page.locator("#gallery li")).to_have_count(drawn)


def paint(page: Any) -> np.ndarray:
    """Paints most of the easel. Returns where, as the mask that the page saves."""
    page.locator("#brush").fill("60")
    box = page.locator("#mask-canvas").bounding_box()
    for height in (0.3, 0.5, 0.7):
        page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + height * box["height"])
        page.mouse.down()
        page.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + height * box["height"], steps=10)
        page.mouse.up()
    with page.expect_download() as download:
        page.get_by_role("button", name="Save mask").click()
    return np.asarray(Image.open(download.value.path()))[..., 3] < 255


def edit_within_mask(page: Any, expect: Any) -> None:
    """Turns a blue boat into a red one, and checks that it did, and that the rest is as it was."""
    draw_all(page, expect, [("a blue boat by day", 11, 1)])
    page.get_by_role("button", name="Begin from this").click()
    expect(page.locator("#image-set")).to_be_visible()
    mask = paint(page)
    draw_all(page, expect, [("a red boat by day", 12, 1)], drawn=1)
    before, after = (pixels(base64.b64decode(picture["file"])) for picture in page.evaluate(KEPT))
    seen, changes = scenes.look(after), np.abs(after.astype(int) - before)[~mask]
    if [(thing.colour, thing.kind) for thing in seen.things] != [("red", "boat")] or changes.max() > 2:
        raise UserError(f"The edit shows {seen}; beside the mask it is up to {changes.max()} grey levels off.")


def make_pictures(browser: Any, url: str) -> None:
    from playwright.sync_api import expect

    expect.set_options(timeout=5 * WAIT_MS)
    context = browser.new_context(viewport={"width": 1360, "height": 900}, color_scheme="light")
    page = context.new_page()
    page.goto(url)
    draw_all(ready(page), expect, PROMPTS)
    draw(page, "a blue boat by day", seed=11, n=4, num_inference_steps=100)
    expect(page.locator(".tile[data-state=drawing] img:visible").first).to_be_visible()
    page.evaluate("scrollTo(0, 0)")
    save(page, "light")
    for seed in (1, 5, 9):
        draw(page, "a purple fish by day", seed=seed, n=4, num_inference_steps=100)
    page.get_by_role("link", name="Operations").click()
    page.locator("#budget rect.part-useful").nth(8).wait_for(state="attached")
    save(page, "operations", full_page=True)
    page.get_by_role("link", name="Draw").click()
    while page.locator(".run:not(.ended)").count():
        page.keyboard.press("Escape")
    page.emulate_media(color_scheme="dark")
    page.get_by_role("button", name=PROMPTS[0][0]).last.click()
    save(page, "dark")
    page = browser.new_context(viewport={"width": 1360, "height": 900}, color_scheme="light").new_page()
    page.goto(url)
    edit_within_mask(ready(page), expect)
    page.evaluate("scrollTo(0, 0)")
    page.locator("#prompt").scroll_into_view_if_needed()
    save(page, "edit")
    small = browser.new_context(viewport={"width": 360, "height": 780}, device_scale_factor=2, color_scheme="light")
    page = small.new_page()
    page.goto(url)
    draw_all(ready(page), expect, [("a teal balloon over an orange car by day", 4, 1)])
    page.locator("#runs").scroll_into_view_if_needed()
    page.evaluate("document.getElementById('runs').scrollIntoView()")
    save(page, "small")


def main() -> None:
    from playwright.sync_api import sync_playwright

    parser = Parser(__doc__)
    parser.add_argument("--run-dir", type=Path, default=RUN_DIR, help="of the local cluster")
    run_dir = parser.parse_args().run_dir.resolve()
    running(run_dir)
    with dashboard_of(LOCAL, run_dir) as dashboard:
        url = serve_address(dashboard.details())
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        make_pictures(browser, url)
        browser.close()
    for file in sorted(ASSETS.glob("page-*.webp")):
        print(f"{file.relative_to(ROOT)}  {file.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    run_command(main)
