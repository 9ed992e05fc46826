"""The load test imports no request parser. What it knows of the API's fields is held to the API."""

from pathlib import Path

import pytest

from app.api.protocol import BODY_FIELDS, FIELDS, NEUTRAL, QUERY_FIELDS
from cluster.cli import UsageError
from loadtest.checks import NOT_IN_THE_PIXELS, identity
from loadtest.scenario import POST_ONLY, parse

PIXEL_FIELDS = {
    *("prompt", "negative_prompt", "size", "num_inference_steps", "guidance_scale", "seed", "sampler", "model", "n"),
    "strength",
    *("original_size", "crops_coords_top_left", "target_size"),
    "output_format",  # a lossy format changes them
}


def test_every_field_either_changes_the_pixels_or_does_not() -> None:
    assert {*FIELDS} == PIXEL_FIELDS | NOT_IN_THE_PIXELS
    assert not PIXEL_FIELDS & NOT_IN_THE_PIXELS


def test_requests_that_differ_in_other_fields_must_get_equal_pictures() -> None:
    request = {"prompt": "a", "seed": 1}
    assert identity(request | dict.fromkeys(NOT_IN_THE_PIXELS, 1)) == identity(request)
    for name in PIXEL_FIELDS:
        assert identity(request | {name: 2}) != identity(request)


def test_the_fields_of_post_alone_are_known() -> None:
    assert POST_ONLY == {*BODY_FIELDS, *NEUTRAL} - {*QUERY_FIELDS}


@pytest.mark.parametrize("name", sorted(POST_ONLY))
def test_a_scenario_cannot_send_them_to_get_imagine(name: str) -> None:
    content = {"arrivals": {"process": "closed", "concurrency": 1, "requests": 1}}
    parse(content | {"mix": [{"endpoint": "generations", name: 1}]}, "test", {})
    with pytest.raises(UsageError, match=f"GET /imagine does not take {name}: such fields need endpoint generations"):
        parse(content | {"mix": [{"endpoint": "imagine", name: 1}]}, "test", {})


def test_a_scenario_of_edits_has_files_that_exist(tmp_path: Path) -> None:
    content = {"arrivals": {"process": "closed", "concurrency": 1, "requests": 1}}
    file = tmp_path / "boat.png"
    file.write_bytes(b"a")
    parse(content | {"mix": [{"endpoint": "edits", "image": str(file), "strength": 0.5}]}, "test", {})
    wrong = {
        "needs endpoint edits": {"image": str(file)},
        "not None": {"endpoint": "edits"},
        "absent.png": {"endpoint": "edits", "image": str(file), "mask": str(tmp_path / "absent.png")},
    }
    for problem, kind in wrong.items():
        with pytest.raises(UsageError, match=problem):
            parse(content | {"mix": [kind]}, "test", {})
