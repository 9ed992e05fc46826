"""An image between two pipelines, as bytes: a header in JSON that names the model and every array, then the arrays.

Whatever a slot holds goes along, so nothing here knows what that is. No pickle: the bytes are checked, and only copied.
"""

import json
import zlib
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from app.types import PipelineSpec

HEADER_BYTES = 8  # of the header's length, at the beginning


@dataclass(frozen=True)
class ExportedSlot:
    """What one slot of a pipeline held: a pytree of arrays on the device, without a slot axis."""

    spec: PipelineSpec
    slot: Any

    def __bytes__(self) -> bytes:
        """Waits for the device."""
        content = b"".join(np.asarray(array).tobytes() for array in jax.tree.leaves(jax.device_get(self.slot)))
        header = json.dumps(header_of(self.spec, self.slot) | {"crc32": zlib.crc32(content)}).encode()
        return len(header).to_bytes(HEADER_BYTES) + header + content


def unpack(spec: PipelineSpec, shapes: Any, packed: bytes) -> Any:
    """The pytree as `shapes` has it. Raises ValueError for bytes of another model, of other shapes, or damaged ones."""
    length = int.from_bytes(packed[:HEADER_BYTES])
    header, content = packed[HEADER_BYTES : HEADER_BYTES + length], packed[HEADER_BYTES + length :]
    try:
        named = dict(json.loads(header))
    except (ValueError, TypeError):  # no JSON, or no object
        raise ValueError("An image that moves must begin with a header, an object in JSON.") from None
    for name, expected in header_of(spec, shapes).items():
        if named.get(name) != expected:
            raise ValueError(f"An image that moves must have the {name} {expected}, got {named.get(name)}.")
    if zlib.crc32(content) != named.get("crc32"):
        raise ValueError(f"An image that moves must arrive whole, got {len(content)} bytes with another checksum.")
    arrays, at = [], 0
    for shape in jax.tree.leaves(shapes):
        size = shape.dtype.itemsize * int(np.prod(shape.shape))
        arrays.append(np.frombuffer(content[at : at + size], shape.dtype).reshape(shape.shape))
        at += size
    return jax.tree.unflatten(jax.tree.structure(shapes), arrays)


def header_of(spec: PipelineSpec, slot: Any) -> dict[str, Any]:
    """What both pipelines must share."""
    model = {"name": spec.model, "revision": spec.revision, "variant": spec.variant, "dtype": spec.dtype}
    arrays = [
        [jax.tree_util.keystr(path), str(array.dtype), list(array.shape)]
        for path, array in jax.tree_util.tree_leaves_with_path(slot)
    ]
    return {"model": model, "arrays": arrays}
