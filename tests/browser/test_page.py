"""The page in a real browser, over real HTTP, with the real routes, replica and engine."""

import base64
import os
import subprocess
import sys
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image

from app.api.settings import Defaults, Jobs
from app.types import Capabilities, Edit
from tests.api.test_api_keys import entry, write
from tests.browser.conftest import KEPT, Open, draw, pixels, ready
from tests.browser.studio import SERVICE, Server, Studio, landscape, studio
from tests.clusters import soon

BAD = ("serious", "critical")  # impacts, as axe names them
DONE = ".tile[data-state=done]"
CODE = ("curl", "python", "openai")


def expect(locator: Any) -> Any:
    from playwright.sync_api import expect

    return expect(locator)


def scrolls_sideways(page: Any) -> bool:
    overflow: bool = page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")
    return overflow


def test_a_prompt_becomes_pictures_with_previews_and_they_are_kept(opened: Open, quick: Server) -> None:
    page = ready(opened(quick))
    expect(page.locator("#estimate")).to_contain_text("About")
    quick.slow_down(6)
    draw(page, "a red boat", n=2, seed=7, num_inference_steps=10, guidance_scale=3, sampler="euler")
    expect(page.locator(".tile[data-state=drawing] img").first).to_be_visible()
    expect(page.locator(".tile[data-state=drawing] .tile-status").first).to_contain_text("of 10")
    quick.slow_down(1)
    expect(page.locator(DONE)).to_have_count(2)
    assert page.locator(".tile-facts").all_inner_texts()[0].startswith("Seed 7")
    expect(page.locator("#gallery img")).to_have_count(2)
    kept = {picture["fields"]["seed"]: picture for picture in page.evaluate(KEPT)}
    assert kept.keys() == {7, 8}
    for seed, picture in kept.items():
        assert np.array_equal(pixels(base64.b64decode(picture["file"])), landscape(seed, (256, 256), 1.0))
        sent = {"prompt": "a red boat", "sampler": "euler", "num_inference_steps": 10, "guidance_scale": 3}
        assert sent.items() <= picture["fields"].items()


def test_the_form_offers_what_the_model_offers(opened: Open, server: Server) -> None:
    page = ready(opened(server))
    sizes = page.locator("#sizes input").evaluate_all("inputs => inputs.map((input) => input.value)")
    assert tuple(sizes) == SERVICE.sizes
    assert page.locator("#sampler option").all_inner_texts() == ["ddim", "euler", "dpmpp_2m_karras"]
    assert page.input_value("#num_inference_steps") == "12" and page.input_value("#guidance_scale") == "5"
    assert page.locator("#numbers input").count() == SERVICE.limits.images


def test_a_model_without_guidance_is_asked_for_none(opened: Open) -> None:
    limits = SERVICE.limits.model_copy(update={"guidance_scale": (0.0, 1.0)})
    defaults = Defaults(num_inference_steps=4, guidance_scale=0.0)
    with studio(service=replace(SERVICE, limits=limits, defaults=defaults)) as server:
        page = ready(opened(server))
        for name in ("guidance_scale", "negative_prompt"):
            expect(page.locator(f"[data-param={name}]")).to_be_hidden()
        draw(page, "a boat")
        expect(page.locator(DONE)).to_have_count(1)
        (picture,) = page.evaluate(KEPT)
        assert "guidance_scale" not in picture["fields"]
        page.close()


def test_a_request_that_waits_tells_its_place_and_cancelling_it_frees_it(opened: Open, quick: Server) -> None:
    page = ready(opened(quick))
    quick.slow_down(20)
    draw(page, "the first", num_inference_steps=20, n=4)
    assert soon(lambda: quick.unfinished() == 4)
    draw(page, "the last", num_inference_steps=60, n=1)
    last = page.locator(".run", has_text="the last")
    first = page.locator(".run", has_text="the first")
    first.get_by_role("button", name="Cancel", exact=True).first.click()  # four streams at once is what a page has
    expect(last.locator(".tile-status")).to_contain_text("ahead in line")
    last.get_by_role("button", name="Cancel", exact=True).first.click()
    expect(last.locator(".tile-status")).to_have_text("Cancelled")
    first.get_by_role("button", name="Cancel all").click()
    quick.slow_down(1)
    assert soon(lambda: quick.unfinished() == 0)
    expect(page.locator(DONE)).to_have_count(0)


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("num_inference_steps", "500", "num_inference_steps must be an integer between 1 and 100, got 500."),
        ("guidance_scale", "99", "guidance_scale must be a number between 1 and 20, got 99."),
        ("prompt", " ", "prompt must not be empty."),
    ],
)
def test_an_error_is_the_apis_sentence_beside_its_field(
    opened: Open, server: Server, field: str, value: str, sentence: str
) -> None:
    page = ready(opened(server, refusals=True))
    draw(page, **{"prompt": "a red boat", field: value})
    expect(page.locator(f"[data-param={field}] > .error")).to_have_text(sentence)
    expect(page.locator(f"#{field}")).to_be_focused()
    assert page.get_attribute(f"#{field}", "aria-invalid") == "true"
    expect(page.locator(".tile")).to_have_count(0)
    draw(page, "a red boat", **({} if field == "prompt" else {field: "4"}))
    expect(page.locator(DONE)).to_have_count(1)
    expect(page.locator(".error:visible")).to_have_count(0)


def test_the_gallery_outlives_a_reload_and_a_picture_gives_its_settings_back(opened: Open, server: Server) -> None:
    page = ready(opened(server))
    draw(page, "a blue house", seed=11, num_inference_steps=5, size="320x192", negative_prompt="fog")
    expect(page.locator(DONE)).to_have_count(1)
    draw(page, "something else", seed=12, num_inference_steps=6, size="192x320", negative_prompt="")
    expect(page.locator(DONE)).to_have_count(2)
    page.reload()
    ready(page)
    page.get_by_role("button", name="a blue house").click()
    page.get_by_role("button", name="Reuse its settings").click()
    values = {
        name: page.input_value(f"#{name}") for name in ("prompt", "negative_prompt", "seed", "num_inference_steps")
    }
    expected = {"prompt": "a blue house", "negative_prompt": "fog", "seed": "11", "num_inference_steps": "5"}
    assert values == expected and page.locator("input[name=size]:checked").input_value() == "320x192"
    page.get_by_role("button", name="a blue house").click()
    page.get_by_role("button", name="Remove", exact=True).click()
    expect(page.locator("#gallery li")).to_have_count(1)


def test_the_page_outlives_its_server_and_goes_on_with_the_same_picture(opened: Open, quick: Server) -> None:
    page = ready(opened(quick, refusals=True))
    quick.slow_down(8)
    draw(page, "a tree", seed=21, num_inference_steps=20)
    expect(page.locator(".tile[data-state=drawing]")).to_have_count(1)
    quick.stop()
    expect(page.locator("#connection")).to_have_text("The server is away")
    expect(page.locator(".tile-status")).to_contain_text("goes on when it is back")
    quick.slow_down(1)
    quick.start()
    expect(page.locator(DONE)).to_have_count(1)
    expect(page.locator("#connection")).to_have_text("Ready")
    (picture,) = page.evaluate(KEPT)
    assert np.array_equal(pixels(base64.b64decode(picture["file"])), landscape(21, (256, 256), 1.0))


def test_a_key_is_asked_for_once_and_stays_in_the_tab(opened: Open, tmp_path: Path) -> None:
    file = write(tmp_path / "keys.yaml", entry("alice", "imagine-key-of-alice"))
    with studio(api_keys_file=file) as server:
        page = opened(server, refusals=True)
        page.fill("#key", "imagine-guess")
        page.get_by_role("button", name="Continue").click()
        expect(page.locator("#key-error")).to_have_text("This API key is not known.")
        page.fill("#key", "imagine-key-of-alice")
        page.keyboard.press("Enter")
        ready(page)
        draw(page, "a boat", num_inference_steps=2)
        expect(page.locator(DONE)).to_have_count(1)
        assert page.evaluate("Object.values(sessionStorage).includes('imagine-key-of-alice')")
        assert "alice" not in page.evaluate("JSON.stringify({ ...localStorage }) + document.cookie + location.href")
        page.reload()
        ready(page)
        other = page.context.new_page()
        other.goto(server.url)
        expect(other.locator("#key-dialog")).to_be_visible()


def run_code(page: Any, kind: str, folder: Path) -> bytes:
    """Runs the code that the page shows, in a folder. Returns the picture."""
    page.locator(f"#code-{kind}").click()
    code = page.locator("#code-panel").inner_text()
    command = ["bash", "-c", f"{code} -sSf"] if kind == "curl" else [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, env=os.environ)
    assert done.returncode == 0, done.stderr
    if kind == "curl":
        return base64.b64decode(done.stdout.partition('"b64_json": "')[2].partition('"')[0])
    return (folder / "picture-0.png").read_bytes()


@pytest.mark.parametrize("kind", CODE)
def test_the_code_that_is_shown_draws_the_same_picture(opened: Open, server: Server, tmp_path: Path, kind: str) -> None:
    page = ready(opened(server))
    page.fill("#prompt", 'it\'s a "red" boat, über $HOME')
    page.fill("#seed", "5")
    page.locator("summary").click()
    file = run_code(page, kind, tmp_path)
    assert np.array_equal(pixels(file), landscape(5, (256, 256), 1.0))
    assert Image.open(BytesIO(file)).text["prompt"] == page.input_value("#prompt")  # type: ignore[attr-defined]


def stripes() -> np.ndarray:
    image = np.zeros((256, 256, 3), np.uint8)
    image[:, ::8] = [250, 120, 10]
    return image


def test_a_mask_that_is_painted_leaves_the_rest_of_the_image_as_it_is(
    opened: Open, server: Server, tmp_path: Path
) -> None:
    Image.fromarray(stripes()).save(tmp_path / "stripes.png")
    page = ready(opened(server))
    page.set_input_files("#image", tmp_path / "stripes.png")
    expect(page.locator("#strength")).to_have_value("0.8")
    box = page.locator("#mask-canvas").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"] / 4)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 4, steps=4)
    page.mouse.up()
    expect(page.locator("#strength")).to_have_value("1")
    draw(page, "a sun", seed=31, num_inference_steps=4)
    expect(page.locator(DONE)).to_have_count(1)
    (picture,) = page.evaluate(KEPT)
    edited, painted = pixels(base64.b64decode(picture["file"])), landscape(31, (256, 256), 1.0)
    redrawn = (edited == painted).all(axis=-1)
    kept = (edited == stripes()).all(axis=-1)
    assert (redrawn | kept).all() and not redrawn[128:].any()
    assert redrawn[64, 64:128].all() and 0.05 < redrawn.mean() < 0.3


def test_a_mask_can_be_painted_erased_and_undone_by_keyboard(opened: Open, server: Server, tmp_path: Path) -> None:
    Image.fromarray(stripes()).save(tmp_path / "stripes.png")
    page = ready(opened(server))
    page.set_input_files("#image", tmp_path / "stripes.png")
    expect(page.locator("#image-set")).to_be_visible()
    page.focus("#mask-canvas")
    painted = "document.getElementById('mask-save').hidden === false"
    for keys, has_paint in [(["Space"], True), (["Control+z"], False), (["Shift+ArrowRight", "ArrowDown"], True)]:
        for key in keys:
            page.keyboard.press(key)
        assert page.evaluate(painted) == has_paint
    page.get_by_role("button", name="Clear", exact=True).click()
    assert not page.evaluate(painted)


def test_a_model_that_looks_at_several_images_gets_those_that_were_chosen(opened: Open, tmp_path: Path) -> None:
    images = {name: np.roll(stripes(), shift, axis=1) for shift, name in enumerate("abcd")}
    for name, image in images.items():
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    with patch.object(Studio, "capabilities", Capabilities(references=3)), studio() as server:
        (replica,) = server.replicas.values()
        edits: dict[int, Edit] = replica.pipeline.edits  # type: ignore[attr-defined]
        page = ready(opened(server))
        expect(page.locator("#image-in legend")).to_contain_text("Images to look at")
        page.set_input_files("#image", [tmp_path / f"{name}.png" for name in images])
        expect(page.locator("#image-error")).to_have_text("This model takes at most 3 images.")
        expect(page.locator("#drop")).to_be_hidden()
        page.get_by_role("button", name="Remove b.png").click()
        expect(page.locator("#drop")).to_contain_text("Add an image")
        expect(page.locator("#strength-field")).to_be_hidden()
        draw(page, "both", seed=31, num_inference_steps=2)
        expect(page.locator(DONE)).to_have_count(1)
        page.locator("summary").click()
        for kind in ("the page", *CODE):
            if kind in CODE:
                run_code(page, kind, tmp_path)
            edit = edits.pop(31)
            assert edit.image is None and edit.strength is None, kind
            assert [*map(bytes, edit.references)] == [*map(bytes, (images["a"], images["c"]))], kind
        page.get_by_role("button", name="Remove the image").click()
        expect(page.locator("#image-others li")).to_have_count(0)
        page.get_by_role("button", name="Look at this").click()
        expect(page.locator("#image-others li")).to_have_count(1)
        page.close()  # before its server goes


def test_operations_counts_jobs(opened: Open, tmp_path: Path) -> None:
    jobs = Jobs(database=str(tmp_path / "jobs.sqlite3"), files=str(tmp_path / "files"))
    with studio(service=replace(SERVICE, jobs=jobs)) as server:  # without the lifespan that would draw them
        page = ready(opened(server, "/#operations"))
        tile = page.locator(".stat", has_text="Jobs")
        expect(tile.locator(".stat-value")).to_have_text("0")
        answer = page.request.post(f"{server.url}/v1/images/generations", data={"prompt": "a", "async": True})
        assert answer.status == 202
        expect(tile.locator(".stat-value")).to_have_text("1")
        expect(tile.locator(".stat-note")).to_have_text("0 being drawn")
        page.close()


def test_operations_shows_replicas_nodes_and_what_runs(opened: Open, quick: Server) -> None:
    quick.slow_down(20)
    page = ready(opened(quick))
    draw(page, "a boat", n=2, num_inference_steps=30)
    assert soon(lambda: quick.unfinished() == 2)
    page.get_by_role("link", name="Operations").click()
    expect(page.locator("#replicas tbody tr")).to_have_count(1)
    expect(page.locator("#replicas")).to_contain_text("easel x1")
    expect(page.locator("#nodes li")).to_have_count(2)
    expect(page.locator("#nodes")).to_contain_text("8 CPU, 4 TPU")
    running = page.locator(".stat", has_text="Running").locator(".stat-value")
    expect(running).not_to_have_text("0")
    expect(page.locator("#budget rect.part-useful").first).to_be_attached()
    page.get_by_role("link", name="Draw").click()
    page.keyboard.press("Escape")
    quick.slow_down(1)
    assert soon(lambda: quick.unfinished() == 0)


def test_all_can_be_done_by_keyboard(opened: Open, quick: Server) -> None:
    page = ready(opened(quick))
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.type("a boat")
    expect(page.locator("#prompt")).to_have_value("a boat")
    for name in ("negative_prompt", "image", "size", "n"):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id || document.activeElement.name") == name
    page.keyboard.press("ArrowRight")
    assert page.locator("input[name=n]:checked").input_value() == "2"
    quick.slow_down(20)
    page.keyboard.press("Control+Enter")
    assert soon(lambda: quick.unfinished() == 2)
    page.keyboard.press("Escape")
    expect(page.locator(".tile[data-state=cancelled]")).to_have_count(2)
    quick.slow_down(1)
    assert soon(lambda: quick.unfinished() == 0)


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_axe_finds_nothing_serious_and_a_small_screen_does_not_scroll_sideways(
    opened: Open, colours: str, tmp_path: Path
) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()

    def serious(page: Any) -> list[str]:
        violations = axe.run(page).response["violations"]
        return [f"{entry['id']}: {entry['nodes'][0]['html']}" for entry in violations if entry["impact"] in BAD]

    files = [tmp_path / "a.png", tmp_path / "b.png"]
    for file in files:
        Image.fromarray(stripes()).save(file)
    able = Capabilities(edits=True, masks=True, references=3)
    with patch.object(Studio, "capabilities", able), studio() as server:
        page = ready(
            opened(server, color_scheme=colours, viewport={"width": 360, "height": 740}, reduced_motion="reduce")
        )
        assert not serious(page) and not scrolls_sideways(page)
        page.set_input_files("#image", files)
        expect(page.locator("#image-others li")).to_have_count(1)
        assert not serious(page) and not scrolls_sideways(page)
        draw(page, "a boat", num_inference_steps=2, n=2)
        expect(page.locator(DONE)).to_have_count(2)
        page.locator("summary").click()
        assert not serious(page) and not scrolls_sideways(page)
        page.locator("#gallery button").first.click()
        assert not serious(page)
        page.keyboard.press("Escape")
        page.get_by_role("link", name="Operations").click()
        expect(page.locator("#replicas tbody tr")).to_have_count(1)
        assert not serious(page) and not scrolls_sideways(page)
        page.close()
