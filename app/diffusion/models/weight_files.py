"""Which files hold a component's weights, and the tensors in them. Reads headers alone, and imports no JAX.

A component is stored whole or in shards that an index lists, and with or without a variant in the files' names:

    diffusion_pytorch_model.safetensors                   diffusion_pytorch_model.safetensors.index.json
    diffusion_pytorch_model.fp16.safetensors              diffusion_pytorch_model.safetensors.index.fp16.json

(diffusers' `_add_variant`). Where files of the variant are missing, those without one are taken, as in diffusers.
"""

import dataclasses
import math
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from app.diffusion.models.safetensors_header import BYTES, read_header
from app.diffusion.models.small_files import read_json
from app.diffusion.models.tensor_names import NOT_WEIGHTS, current_name

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
INDEX = ".json"  # how the name of an index ends


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a safetensors file, which only `read` reads. `transposed`: its two axes are to be swapped."""

    file: Path
    key: str
    dtype: str
    stored_shape: tuple[int, ...]
    start: int
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored_shape[::-1] if self.transposed else self.stored_shape

    @property
    def where(self) -> str:
        return f"{self.file.parent.name}/{self.file.name}"

    def read(self) -> np.ndarray:
        """float32, float16 or bfloat16."""
        values = np.fromfile(self.file, DTYPES[self.dtype], math.prod(self.stored_shape), offset=self.start)
        values = values.reshape(self.stored_shape)
        return values.T if self.transposed else values

    def part(self, i: int, parts: int) -> "Tensor":
        """The i-th of equal parts along the first axis."""
        shape = (self.stored_shape[0] // parts, *self.stored_shape[1:])
        return dataclasses.replace(
            self, stored_shape=shape, start=self.start + i * math.prod(shape) * BYTES[self.dtype]
        )


def find_tensors(folder: Path, stem: str, problems: list[str], variant: str | None = None) -> dict[str, Tensor]:
    """The tensors of a component by their current names. Older checkpoints have aliases."""
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    tensors: dict[str, Tensor] = {}
    for name in weight_files(folder, names, stem, variant, problems):
        where = f"{folder.name}/{name}"
        for key, tensor in read_tensors(folder / name, where, problems)[0].items():
            if current_name(key) in NOT_WEIGHTS:
                continue
            if current_name(key) in tensors:
                problems.append(f"{where}: tensor {key} stands in {tensors[current_name(key)].file.name} too.")
            tensors[current_name(key)] = tensor
    problems += unreadable(tensors)
    return tensors


def unreadable(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """A sentence for each tensor of a type that no weight has."""
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            yield f"{tensor.where}: tensor {name} must be F32, F16 or BF16, got {tensor.dtype}."


def read_tensors(file: Path, where: str, problems: list[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a file by their keys, and its metadata."""
    try:
        header = read_header(file)
    except FileNotFoundError:
        problems.append(f"{where} is missing.")
    except OSError as error:
        problems.append(f"{where} cannot be read: {error.strerror}.")
    except ValueError as error:
        problems.append(f"{where} {error}")
    else:
        return {key: Tensor(file, key, *entry) for key, entry in header.tensors.items()}, header.metadata
    return {}, {}


def weight_files(
    folder: Path, names: Collection[str], stem: str, variant: str | None, problems: list[str]
) -> list[str]:
    """The safetensors files that hold a component's weights, of all names in its folder."""
    chosen = choose(names, stem, variant)
    if not chosen:
        problems.append(missing(f"{folder.name}/{stem}", names, stem))
        return []
    if not chosen[0].endswith(INDEX):
        return chosen
    index = f"{folder.name}/{chosen[0]}"
    if not (content := read_json(folder / chosen[0], index, problems)):
        return []
    shards = content.get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(map(is_file_name, shards.values())):
        problems.append(f"{index}: weight_map must name a .safetensors file of the same folder for each tensor.")
        return []
    return sorted(set(shards.values()))


def is_file_name(name: object) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and "/" not in name


def choose(names: Collection[str], stem: str, variant: str | None) -> list[str]:
    """The file with a component's weights, or its index and shards, out of the names in its folder."""
    for kind in dict.fromkeys((variant, None)):
        dotted = f".{kind}" if kind else ""
        if (whole := f"{stem}{dotted}.safetensors") in names:
            return [whole]
        if (index := f"{stem}.safetensors.index{dotted}{INDEX}") in names:
            before = re.escape(f"{stem}{dotted}") + r"-\d+-of-\d+\.safetensors"
            behind = re.escape(stem) + r"-\d+-of-\d+" + re.escape(f"{dotted}.safetensors")
            return [index, *sorted(name for name in names if re.fullmatch(f"{before}|{behind}", name))]
    return []


def variants(names: Collection[str], stem: str) -> Iterator[str]:
    """The variants of a component that lie in its folder."""
    forms = rf"{re.escape(stem)}\.(\w+)\.safetensors|{re.escape(stem)}\.safetensors\.index\.(\w+)\.json"
    yield from sorted({match[1] or match[2] for name in names if (match := re.fullmatch(forms, name))})


def variant_problems(files: Collection[str], variant: str | None) -> Iterator[str]:
    """A sentence where no file with weights is of the variant. Some components may have none."""
    if variant and files and not any(f".{variant}." in name or f".{variant}-" in name for name in files):
        yield f"variant {variant} has no file there: weights are in {', '.join(sorted(files))}."


def missing(path: str, names: Collection[str], stem: str) -> str:
    """Says that a component's weights are missing, and the remedy where something else lies there."""
    text = f"{path}.safetensors is missing"
    if others := [*variants(names, stem)]:
        return f"{text}, and its variant {others[0]} lies there: set `variant: {others[0]}`."
    if any(name.endswith(".safetensors") and re.match(rf"{re.escape(stem)}.*-of-", name) for name in names):
        return f"{text}, and shards lie there without their index, {stem}.safetensors.index.json."
    if any(name.endswith(".bin") for name in names):
        return f"{text}. Its pickled .bin weights are not read: convert them first."
    return f"{text}."
