"""Reads the header of a safetensors file, and checks that the file holds the tensors that the header lists.

Reads a few kilobytes of a file of gigabytes. Knows nothing of models.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
BYTES |= {"U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1}
LONGEST_HEADER = 100_000_000  # the format's own limit
LFS_POINTER = b"version https://git-lfs"


class Tensor(NamedTuple):
    dtype: str
    shape: tuple[int, ...]


def tensors_of(file: Path) -> dict[str, Tensor]:
    """The tensors by name. Raises OSError, and ValueError with a text that follows the file's name."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(len(LFS_POINTER))
        if start == LFS_POINTER:
            raise ValueError("is a pointer of Git LFS and not the weights; fetch them with: git lfs pull")
        length = int.from_bytes(start[:8], "little")
        if len(start) < 8 or length > LONGEST_HEADER:
            raise ValueError(f"is not a safetensors file, of {size} bytes.")
        opened.seek(8)
        text = opened.read(length)
    if len(text) < length:
        raise ValueError(f"is cut off: its header alone has {length} bytes, and the file {size}.")
    try:
        header = json.loads(text)
        tensors = {name: entry_of(name, entry) for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, AttributeError, RecursionError) as error:
        reason = f": {error}" if type(error) is ValueError else "."
        raise ValueError(f"is not a safetensors file{reason}") from None
    end = 0
    for name, (_, (first, last)) in sorted(tensors.items(), key=lambda item: item[1][1]):
        if first != end:
            raise ValueError(f"has a gap or an overlap before tensor {name}.")
        end = last
    if size != 8 + length + end:
        fault = "is cut off" if size < 8 + length + end else "has bytes that no tensor owns"
        raise ValueError(f"{fault}: by its header it has {8 + length + end} bytes, and it has {size}.")
    return {name: tensor for name, (tensor, _) in tensors.items()}


def entry_of(name: str, entry: Any) -> tuple[Tensor, tuple[int, int]]:
    """One tensor, and the range of its bytes. Raises ValueError if the range does not fit the shape."""
    try:
        dtype, shape, (first, last) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
        fits = min((first, *shape)) >= 0 and last - first == BYTES[dtype] * math.prod(shape)
    except (KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError(f"the bytes of tensor {name} do not make up its shape.")
    return Tensor(dtype, shape), (first, last)
