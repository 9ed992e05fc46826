"""Reads the header of a safetensors file, and checks that the file holds the tensors that the header lists.

Reads a few kilobytes of a file of gigabytes. Knows nothing of models, and imports neither JAX nor safetensors.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from app.diffusion.models.small_files import LFS_POINTER, LFS_REMEDY

BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
BYTES |= {"U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1}
LONGEST_HEADER = 100_000_000  # the format's own limit


class Entry(NamedTuple):
    """A tensor's type, its shape, and the place of its first byte in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int


class Header(NamedTuple):
    tensors: dict[str, Entry]
    metadata: dict[str, str]


def read_header(file: Path) -> Header:
    """Raises OSError, and ValueError with a text that follows the file's name."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(len(LFS_POINTER))
        if start == LFS_POINTER:
            raise ValueError(LFS_REMEDY)
        length = int.from_bytes(start[:8], "little")
        if len(start) < 8 or length > LONGEST_HEADER:
            raise ValueError(f"is not a safetensors file, of {size} bytes.")
        opened.seek(8)
        text = opened.read(length)
    if len(text) < length:
        raise ValueError(f"is cut off: its header alone has {length} bytes, and the file {size}.")
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", None) or {}
        entries = {name: entry_of(name, entry) for name, entry in header.items()}
    except (ValueError, AttributeError, RecursionError) as error:
        reason = f": {error}" if type(error) is ValueError else "."
        raise ValueError(f"is not a safetensors file{reason}") from None
    end = 0
    for name, (_, _, (first, last)) in sorted(entries.items(), key=lambda item: item[1][2]):
        if first != end:
            raise ValueError(f"has a gap or an overlap before tensor {name}.")
        end = last
    if size != 8 + length + end:
        fault = "is cut off" if size < 8 + length + end else "has bytes that no tensor owns"
        raise ValueError(f"{fault}: by its header it has {8 + length + end} bytes, and it has {size}.")
    tensors = {name: Entry(dtype, shape, 8 + length + first) for name, (dtype, shape, (first, _)) in entries.items()}
    words = metadata.items() if isinstance(metadata, dict) else ()
    return Header(tensors, {name: value for name, value in words if isinstance(value, str)})


def entry_of(name: str, entry: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    """One tensor's type, shape and range of bytes. Raises ValueError if the range does not fit the shape."""
    try:
        dtype, shape, (first, last) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
        fits = min((first, *shape)) >= 0 and last - first == BYTES[dtype] * math.prod(shape)
    except (KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError(f"the bytes of tensor {name} do not make up its shape.")
    return dtype, shape, (first, last)
