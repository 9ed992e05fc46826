"""Makes the pictures of the page in assets/, of the API of a local cluster with the demo model."""

import os
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from cluster import ROOT
from cluster.cli import Parser, run_command
from cluster.connection import LOCAL, dashboard_of
from cluster.dashboard import serve_address
from cluster.local.state import RUN_DIR, running
from tests.browser.conftest import CHROMIUM, WAIT_MS, draw, ready

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


def draw_all(page: Any, expect: Any, prompts: list[tuple[str, int, int]]) -> None:
    drawn = 0
    for prompt, seed, n in prompts:
        draw(page, prompt, seed=seed, n=n, num_inference_steps=20)
        drawn += n
        expect(page.locator("#gallery li")).to_have_count(drawn)


def make_pictures(browser: Any, url: str) -> None:
    from playwright.sync_api import expect

    expect.set_options(timeout=5 * WAIT_MS)
    context = browser.new_context(viewport={"width": 1360, "height": 900}, color_scheme="light")
    page = context.new_page()
    page.goto(url)
    draw_all(ready(page), expect, PROMPTS)
    draw(page, "a blue boat by day", seed=11, n=4, num_inference_steps=60)
    expect(page.locator(".tile[data-state=drawing] img:visible").first).to_be_visible()
    page.evaluate("scrollTo(0, 0)")
    save(page, "light")
    draw(page, "a purple fish by day", seed=1, n=4, num_inference_steps=100)
    page.get_by_role("link", name="Operations").click()
    page.locator("#budget rect.part-useful").nth(8).wait_for(state="attached")
    save(page, "operations", full_page=True)
    page.get_by_role("link", name="Draw").click()
    page.keyboard.press("Escape")
    expect(page.locator(".run:not(.ended)")).to_have_count(0)
    page.emulate_media(color_scheme="dark")
    page.get_by_role("button", name=PROMPTS[-1][0]).last.click()
    save(page, "dark")
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
