"""The plain data that the packages of the app share."""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.types import Edit, Generation, InvalidField, PipelineSpec

SPEC = PipelineSpec("demo", sizes=((128, 128),), batch_buckets=(4, 1, 2, 8), max_steps=50)


def test_a_spec_derives_its_buckets() -> None:
    assert SPEC.batch_buckets == (1, 2, 4, 8)
    assert SPEC.row_buckets == (1, 2, 4, 8, 16)
    assert SPEC.num_slots == 16
    assert SPEC.decode_buckets == (1, 2, 4), "few images finish together"
    assert replace(SPEC, batch_buckets=(8, 16), decode_buckets=()).decode_buckets == (8,)
    assert replace(SPEC, decode_buckets=(16, 1)).decode_buckets == (1, 16)


def test_a_spec_travels_to_other_processes_and_is_a_key() -> None:
    spec = replace(SPEC, programs=Path("/programs"))
    assert pickle.loads(pickle.dumps(spec)) == spec and len({spec, SPEC, replace(SPEC)}) == 2


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"sizes": ()}, "sizes must be pairs of a width and a height of at least 1, got ()."),
    ({"sizes": ((64, 0),)}, "got ((64, 0),)."),
    ({"batch_buckets": ()}, "batch_buckets must be numbers of at least 1, got ()."),
    ({"batch_buckets": (0, 1)}, "got (0, 1)."),
    ({"decode_buckets": (0, 1)}, "decode_buckets must be numbers of at least 1, got (0, 1)."),
    (
        {"batch_buckets": (1,), "decode_buckets": (1, 4)},
        "decode_buckets must be at most 2, twice the largest of batch_buckets, got 4.",
    ),
    ({"max_steps": 0}, "max_steps must be at least 1, got 0."),
    ({"dtype": "float16"}, "dtype must be one of float32, bfloat16, got float16."),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[str(case[0]) for case in REFUSED])
def test_a_spec_that_no_checkpoint_allows_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        replace(SPEC, **change)
    assert str(caught.value).endswith(message)


def test_an_edit_refuses_arrays_that_no_model_could_take() -> None:
    image, mask = np.zeros((8, 16, 3), np.uint8), np.zeros((8, 16), bool)
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("image", {}),
        ("image", {"image": image / 255}),
        ("image", {"image": image[..., :1]}),
        ("references", {"references": (image[0],)}),
        ("mask", {"mask": mask, "references": (image,)}),
        ("mask", {"image": image, "mask": mask.T}),
        ("mask", {"image": image, "mask": mask.astype(np.uint8)}),
        ("strength", {"image": image, "strength": 0.0}),
        ("strength", {"image": image, "strength": 1.01}),
    ]
    for field, arguments in wrong:
        with pytest.raises(InvalidField, match=field) as refusal:
            Edit(**arguments)
        assert refusal.value.field == field
    Edit(image, mask, 1.0, (image,))


def test_a_generation_with_images_is_hardly_larger_than_their_pixels_when_it_is_pickled() -> None:
    edit = Edit(np.zeros((256, 128, 3), np.uint8), np.zeros((256, 128), bool))
    sent = pickle.dumps(Generation("a boat", "", 128, 256, 20, 7.5, 7, None, 1, edit=edit))
    assert len(sent) < 256 * 128 * 4 + 1000
    received = pickle.loads(sent).edit
    assert (received.image == edit.image).all() and (received.mask == edit.mask).all()
