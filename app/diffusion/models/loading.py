"""Loads checkpoints in diffusers layout. It is strict: all problems are collected and raised as one ValueError.

Knows nothing of requests, samplers' arithmetic or compiled programs.
"""

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from app.diffusion.families.family import Component, Family
from app.diffusion.families.registry import FAMILIES, recognise
from app.diffusion.models.errors import one_line
from app.diffusion.models.tensor_names import squeezed
from app.diffusion.models.tensors import finite, from_tensor, tensor_name, tensor_shape
from app.diffusion.models.tokenizer import Tokenizer
from app.diffusion.models.tokenizer_files import some, tokenizer_problems
from app.diffusion.models.weight_files import Tensor, find_tensors
from app.diffusion.samplers import FlowSchedule, Schedule, departures

logger = logging.getLogger(f"ray.serve.{__name__}")  # the tree that Serve writes to its files

Module = TypeVar("Module", bound=nnx.Module)

INDEX = "model_index.json"
SCHEDULER = "scheduler/scheduler_config.json"
# Folders may also have a safety checker and other components that are not run: only configurations of them come along.
DOWNLOADED = [
    INDEX,
    "*/config.json",
    "scheduler/*.json",
    "tokenizer*/*",
    *sorted(
        {f"{part}/{component.stem}.safetensors" for family in FAMILIES for part, component in family.COMPONENTS.items()}
    ),
]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A loaded model: its family, its networks by component, and its tokenizers by folder."""

    folder: Path
    family: Family
    networks: Mapping[str, Any]
    tokenizers: Mapping[str, Tokenizer]
    schedule: Schedule | FlowSchedule


def load_checkpoint(model: str | Path, *, revision: str | None = None, dtype: Any = jnp.float32) -> Checkpoint:
    """Loads a folder in diffusers layout, or a Hugging Face repo id, with its networks in `dtype`.

    Raises ValueError with every problem: a missing file, class, tensor or option, a wrong shape, a surplus tensor, a
    number that is not finite, or a tokenizer that does not fit.
    """
    folder = checkpoint_folder(model, revision)
    problems: list[str] = []
    index = read_json(folder, INDEX, problems)
    kind = recognise(index or {file.name: None for file in folder.iterdir()}, [] if problems else problems)
    if kind is None:
        refuse(folder, problems, hub_problems(model, revision, problems))
    assert kind is not None
    if index:
        problems += class_problems(kind, index)
    configs = component_configs(kind, folder, problems)
    family = architecture(kind, configs, index, problems)
    content = read_json(folder, SCHEDULER, problems)
    schedule = schedule_of(kind, content, problems) if content else None
    # A missing weight can be named before the architecture is understood; a wrong shape cannot.
    tensors = {
        part: find_tensors(folder / part, component.stem, problems) for part, component in kind.COMPONENTS.items()
    }
    for name, part in kind.TOKENIZERS.items():
        unclear: list[str] = []
        text = kind.COMPONENTS[part].read(configs[part], unclear, part)
        if not unclear:
            problems += tokenizer_problems(folder / name, text, fixed_length=kind.TOKENIZER.fixed_length)
    refuse(folder, problems, hub_problems(model, revision, problems))

    tokenizers = {name: kind.TOKENIZER.load(folder / name, length) for name, length in family.text_lengths.items()}
    for name, part in kind.TOKENIZERS.items():
        problems += tokenizers[name].problems(getattr(family, part).vocab_size)
    broken: list[str] = []
    networks = {
        part: load_module(build, read_of(kind.COMPONENTS[part], family, tensors[part], part), part, problems, broken)
        for part, build in builders(family, dtype).items()
    }
    if broken:
        problems.append(f"NaN or infinity stands among the weights, in {some(broken)}.")
    refuse(folder, problems)
    assert schedule is not None
    return Checkpoint(folder, family, networks, tokenizers, schedule)


def class_problems(kind: type[Family], index: Mapping[str, Any]) -> Iterator[str]:
    classes = {part: (component.class_name, *component.aliases) for part, component in kind.COMPONENTS.items()}
    tokenizer = kind.TOKENIZER.class_name
    for part, wanted in (classes | dict.fromkeys(kind.TOKENIZERS, (tokenizer, f"{tokenizer}Fast"))).items():
        entry = index.get(part)
        got = entry[-1] if isinstance(entry, list) and entry else entry
        if got not in wanted:
            yield f"{INDEX}: {part} must be a {wanted[0]}, got {got}."


def schedule_of(kind: type[Family], content: Mapping[str, Any], problems: list[str]) -> Schedule | FlowSchedule | None:
    try:
        schedule, remarks = kind.schedule(content)
    except ValueError as error:
        problems.append(f"{SCHEDULER}: {error}")
        return None
    for remark in (*remarks, *departures(schedule)):
        logger.info(f"{SCHEDULER}: {remark}")
    return schedule


def component_configs(kind: type[Family], folder: Path, problems: list[str]) -> dict[str, dict[str, Any]]:
    """The content of each component's config.json."""
    return {part: read_json(folder, f"{part}/config.json", problems) for part in kind.COMPONENTS}


def architecture(
    kind: type[Family], configs: Mapping[str, Mapping[str, Any]], index: Mapping[str, Any], problems: list[str]
) -> Family:
    """The family of a checkpoint with these configurations."""
    parts = kind.COMPONENTS.items()
    family = kind.of(
        {part: component.read(configs[part], problems, f"{part}/config.json") for part, component in parts}, index
    )
    problems += family.problems()
    return family


def builders(family: Family, dtype: Any) -> dict[str, Callable[[], nnx.Module]]:
    """A function for each component that builds its network."""
    return {
        part: partial(component.network, getattr(family, part), dtype=dtype, rngs=OneKey())
        for part, component in family.COMPONENTS.items()
    }


def read_of(component: Component, family: Family, tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """The tensors that the network reads."""
    return {name: tensor for name, tensor in tensors.items() if not component.unread(getattr(family, part), name)}


class OneKey:
    """Stands in for nnx.Rngs where only shapes are needed.

    Under eval_shape nnx.Rngs counts keys, and flax searches an ever longer trace at each: SD 1.x's UNet takes 9 s
    instead of 0.8 s.
    """

    def __init__(self) -> None:
        self.key = jax.random.key(0)

    def params(self) -> jax.Array:
        return self.key


def checkpoint_folder(model: str | Path, revision: str | None = None) -> Path:
    """The folder of a model. If `model` is a repo id and not a folder, it is downloaded first."""
    if Path(model).is_dir():
        return Path(model)
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(str(model), revision=revision, allow_patterns=DOWNLOADED))
    except Exception as error:  # the Hub's client raises a dozen classes; each means that there is no model
        raise ValueError(
            f"model {model} is no folder here and could not be fetched from Hugging Face: {one_line(error)}"
        ) from error


def hub_problems(model: str | Path, revision: str | None, problems: list[str]) -> list[str]:
    """Why the Hub could not be reached, if files are missing: its client then uses what an earlier download left."""
    if Path(model).is_dir() or not any("missing" in problem for problem in problems):
        return []
    import huggingface_hub

    try:
        huggingface_hub.HfApi().model_info(str(model), revision=revision, timeout=10)
    except Exception as error:
        return [f"The Hub could not be asked for what is missing: {one_line(error)}"]
    return []


def load_module(
    build: Callable[[], Module], tensors: Mapping[str, Tensor], where: str, problems: list[str], broken: list[str]
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
            filled[path] = parameter.replace(jnp.asarray(value, dtype=parameter.dtype))
    for name in sorted(set(tensors) - {tensor_name(path) for path in parameters}):
        problems.append(f"{where}: tensor {name} is not one that this architecture has.")
    return nnx.merge(graph, nnx.from_flat_state(filled)) if not problems else nnx.merge(graph, abstract)


def refuse(folder: Path, problems: list[str], remarks: Sequence[str] = ()) -> None:
    if problems:
        lines = "\n".join([*(f"- {line}" for line in problems), *remarks])
        raise ValueError(f"checkpoint {folder} cannot be loaded:\n{lines}")


def read_json(folder: Path, name: str, problems: list[str]) -> dict[str, Any]:
    try:
        content = json.loads((folder / name).read_text("utf-8"))
    except OSError:
        problems.append(f"{name} is missing.")
        return {}
    except ValueError as error:
        problems.append(f"{name} is not JSON: {error}.")
        return {}
    if not isinstance(content, dict):
        problems.append(f"{name} must hold a JSON object, got a {type(content).__name__}.")
        return {}
    return content
