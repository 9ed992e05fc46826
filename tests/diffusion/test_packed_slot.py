"""Slots as bytes: every array comes back, and what does not fit is refused."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from app.diffusion.packed_slot import ExportedSlot, unpack
from app.types import PipelineSpec

SPEC = PipelineSpec("tiny", sizes=((8, 8),), batch_buckets=(1,), max_steps=4)
SLOT: dict[str, Any] = {
    "latents": jnp.asarray(np.arange(12, dtype=np.float32).reshape(3, 4)),
    "conditioning": (jnp.full((2, 3), 1.5, jnp.bfloat16), jnp.full((0, 4), 1.0)),
    "seed": jnp.uint32(2**32 - 1),
    "masked": jnp.asarray([True, False]),
}
SHAPES = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), SLOT)


def test_every_array_of_a_slot_comes_back_with_its_bits() -> None:
    unpacked = unpack(SPEC, SHAPES, bytes(ExportedSlot(SPEC, SLOT)))
    assert str(jax.tree.structure(unpacked)) == str(jax.tree.structure(SLOT))
    for array, original in zip(jax.tree.leaves(unpacked), jax.tree.leaves(SLOT), strict=True):
        assert array.dtype == original.dtype and array.shape == original.shape
        assert array.tobytes() == np.asarray(original).tobytes()
    assert bytes(ExportedSlot(SPEC, unpacked)) == bytes(ExportedSlot(SPEC, SLOT))


PACKED = bytes(ExportedSlot(SPEC, SLOT))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (PACKED[:-1] + bytes([PACKED[-1] ^ 1]), "must arrive whole"),
        (PACKED[:-2], "must arrive whole"),
        (PACKED + b"\0", "must arrive whole"),
        (PACKED[:20], "must begin with a header"),
        (b"", "must begin with a header"),
        (b"\0" * 7 + b"\1" + b"5", "must begin with a header"),
        (bytes(ExportedSlot(replace(SPEC, model="small"), SLOT)), "must have the model .*tiny.*, got .*small"),
        (
            bytes(ExportedSlot(SPEC, {**SLOT, "masked": jnp.zeros(3, bool)})),
            r"must have the arrays .*\[2\].*, got .*\[3\]",
        ),
        (bytes(ExportedSlot(SPEC, {**SLOT, "seed": jnp.float32(1)})), "must have the arrays .*uint32.*, got"),
    ],
    ids=["flipped", "short", "long", "cut", "empty", "a number", "another model", "other shapes", "other dtypes"],
)
def test_bytes_that_do_not_fit_are_refused(content: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=f"An image that moves {reason}"):
        unpack(SPEC, SHAPES, content)
