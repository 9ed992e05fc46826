"""Loads checkpoints: folders in diffusers layout, single files, and repos of the Hugging Face Hub.

It is strict: all problems are collected and raised as one ValueError. Knows nothing of requests, samplers' arithmetic
or compiled programs.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from app.diffusion.families.family import Component, Family, without_encoder
from app.diffusion.models import hub_files
from app.diffusion.models.checkpoint_files import CheckpointFiles, read_file, read_folder
from app.diffusion.models.tensor_names import squeezed
from app.diffusion.models.tensors import finite, from_tensor, tensor_name, tensor_shape
from app.diffusion.models.tokenizer import Tokenizer
from app.diffusion.models.tokenizer_files import some
from app.diffusion.models.weight_files import Tensor
from app.diffusion.samplers import FlowSchedule, Schedule

logger = logging.getLogger(f"ray.serve.{__name__}")  # the tree that Serve writes to its files

Module = TypeVar("Module", bound=nnx.Module)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A loaded model: its folder or file, its family, its networks by component, and its tokenizers by name."""

    path: Path
    family: Family
    networks: Mapping[str, Any]
    tokenizers: Mapping[str, Tokenizer]
    schedule: Schedule | FlowSchedule


def load_checkpoint(
    model: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    tokenizer: str | Path | None = None,
    dtype: Any = jnp.float32,
    image_encoder: bool = True,
    place: Callable[[Family, Component, np.ndarray], jax.Array] | None = None,
) -> Checkpoint:
    """Loads a folder in diffusers layout, one .safetensors file, or a Hugging Face repo id, with networks in `dtype`.

    `tokenizer` is a folder or a repo id, which one file needs. Raises ValueError with every problem: a missing file,
    class, tensor or option, a wrong shape, a surplus tensor, a number that is not finite, or a tokenizer that does not
    fit. Without `image_encoder` the VAE only decodes.

    Weights are read tensor by tensor, and `place` puts each on its devices; by default it goes to the first.
    """
    problems: list[str] = []
    files, path, unreachable = find_checkpoint(model, revision, variant, tokenizer, problems)
    if files is None:
        raise ValueError(refusal(path, problems, unreachable))
    family = files.family(problems)
    schedule, remarks = files.schedule(problems)
    problems += files.tokenizer_problems()
    if problems or schedule is None:
        raise ValueError(refusal(path, problems, unreachable))
    for remark in remarks:
        logger.info(remark)
    if not image_encoder:
        family = without_encoder(family)

    tokenizers = {name: tokenizer_of(files, name, length) for name, length in family.text_lengths.items()}
    for name, part in files.kind.TOKENIZERS.items():
        problems += tokenizers[name].problems(getattr(family, part).vocab_size)
    broken: list[str] = []
    networks = {
        part: load_module(
            build,
            files.weights(part, family),
            part,
            problems,
            broken,
            jnp.asarray if place is None else partial(place, family, family.COMPONENTS[part]),
        )
        for part, build in builders(family, dtype).items()
    }
    if broken:
        problems.append(f"NaN or infinity stands among the weights, in {some(broken)}.")
    if problems:
        raise ValueError(refusal(path, problems))
    return Checkpoint(path, family, networks, tokenizers, schedule)


def find_checkpoint(
    model: str | Path, revision: str | None, variant: str | None, tokenizer: str | Path | None, problems: list[str]
) -> tuple[CheckpointFiles | None, Path, str]:
    """The files of a model, where they are, and why the Hub could not be asked, or "". A repo is downloaded first."""
    path, unreachable = Path(model), ""
    if path.is_file():
        words, unreachable = folder_of(tokenizer, problems)
        return read_file(path, words, problems), path, unreachable
    if not path.is_dir():
        path, unreachable = hub_files.download(str(model), revision, variant)
    return read_folder(path, variant, problems), path, unreachable


def folder_of(tokenizer: str | Path | None, problems: list[str]) -> tuple[Path | None, str]:
    """The folder of a tokenizer, and why the Hub could not be asked for it, or ""."""
    if tokenizer is None:
        problems.append("It holds no tokenizer: set `tokenizer:` to a folder with CLIP's vocabulary, or to a repo id.")
        return None, ""
    return (Path(tokenizer), "") if Path(tokenizer).is_dir() else hub_files.download_tokenizer(str(tokenizer))


def tokenizer_of(files: CheckpointFiles, name: str, length: int) -> Any:
    """One file holds a model with CLIP's vocabulary, and says how a text is padded."""
    folder, padding = files.tokenizers[name], files.padding.get(name)
    return Tokenizer(folder, length, padding) if padding else files.kind.TOKENIZER.load(folder, length)


def builders(family: Family, dtype: Any) -> dict[str, Callable[[], nnx.Module]]:
    """A function for each component that builds its network."""
    return {
        part: partial(component.network, getattr(family, part), dtype=dtype, rngs=OneKey())
        for part, component in family.COMPONENTS.items()
    }


class OneKey:
    """Stands in for nnx.Rngs where only shapes are needed.

    Under eval_shape nnx.Rngs counts keys, and flax searches an ever longer trace at each: SD 1.x's UNet takes 9 s
    instead of 0.8 s.
    """

    def __init__(self) -> None:
        self.key = jax.random.key(0)

    def params(self) -> jax.Array:
        return self.key


def load_module(
    build: Callable[[], Module],
    tensors: Mapping[str, Tensor],
    where: str,
    problems: list[str],
    broken: list[str],
    place: Callable[[np.ndarray], jax.Array] = jnp.asarray,
) -> Module:
    """Fills the module that `build` describes, without ever allocating its random initial weights.

    Adds the name of each tensor with a number that is not finite to `broken`.
    """
    graph, abstract = nnx.split(nnx.eval_shape(build))
    parameters = dict(nnx.to_flat_state(abstract))
    filled = {}
    for path, parameter in parameters.items():
        name = tensor_name(path)
        if name not in tensors:
            problems.append(f"{where}: tensor {name} is missing.")
            continue
        tensor = tensors[name]
        if squeezed(tensor.shape) != squeezed(tensor_shape(path, parameter.shape)):
            problems.append(
                f"{where}: tensor {name} must have shape {list(tensor_shape(path, parameter.shape))}, "
                f"got {list(tensor.shape)}."
            )
            continue
        if not problems:  # after a problem there is no need to read gigabytes
            content = tensor.read()
            if not finite(content):
                broken.append(f"{where} {name}")
            value = from_tensor(path, content, parameter.shape)
            filled[path] = parameter.replace(place(value.astype(parameter.dtype, copy=False)))
    for name in sorted(set(tensors) - {tensor_name(path) for path in parameters}):
        problems.append(f"{where}: tensor {name} is not one that this architecture has.")
    return nnx.merge(graph, nnx.from_flat_state(filled)) if not problems else nnx.merge(graph, abstract)


def refusal(path: Path, problems: list[str], unreachable: str = "") -> str:
    """`unreachable` says why the Hub could not be asked: then an earlier download is what lacks a file."""
    lines = [f"checkpoint {path} cannot be loaded:", *(f"- {problem}" for problem in problems)]
    if unreachable and any("missing" in problem for problem in problems):
        lines.append(f"The Hub could not be asked for what is missing: {unreachable}")
    return "\n".join(lines)
