"""Loads checkpoints in diffusers layout. It is strict: all problems are collected and raised as one ValueError.

Knows nothing of requests, samplers' arithmetic or compiled programs.
"""

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from flax import nnx

from app.diffusion.models.clip import CLIPText
from app.diffusion.models.config import STEMS, CLIPTextConfig, UNetConfig, VAEConfig, mismatches
from app.diffusion.models.errors import one_line
from app.diffusion.models.scheduler_config import corrected
from app.diffusion.models.tensor_names import squeezed
from app.diffusion.models.tensors import finite, from_tensor, tensor_name, tensor_shape
from app.diffusion.models.tokenizer import Tokenizer
from app.diffusion.models.tokenizer_files import some, tokenizer_problems
from app.diffusion.models.unet import UNet
from app.diffusion.models.vae import VAE
from app.diffusion.models.weight_files import Tensor, find_tensors
from app.diffusion.samplers import Schedule

logger = logging.getLogger(f"ray.serve.{__name__}")  # the tree that Serve writes to its files

Module = TypeVar("Module", bound=nnx.Module)

# The parts of a Stable Diffusion folder. It may also have a safety checker and a feature extractor, which are not run.
COMPONENTS = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "tokenizer": "CLIPTokenizer",
}
CONFIGS = {
    "unet": "unet/config.json",
    "vae": "vae/config.json",
    "text_encoder": "text_encoder/config.json",
    "scheduler": "scheduler/scheduler_config.json",
}
DOWNLOADED = [
    "model_index.json",
    "*/config.json",
    "scheduler/*.json",
    "tokenizer/*",
    *(f"{part}/{stem}.safetensors" for part, stem in STEMS.items()),
]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A loaded model. `scheduler` is scheduler/scheduler_config.json, corrected as diffusers' pipeline corrects it."""

    folder: Path
    unet: UNet
    vae: VAE
    text_encoder: CLIPText
    scheduler: Mapping[str, Any]


def load_checkpoint(model: str | Path, *, revision: str | None = None, dtype: Any = jnp.float32) -> Checkpoint:
    """Loads a folder in diffusers layout, or a Hugging Face repo id, with its networks in `dtype`.

    Raises ValueError with every problem: a missing file, class, tensor or option, a wrong shape, a surplus tensor, a
    number that is not finite, or a tokenizer that does not fit.
    """
    folder = checkpoint_folder(model, revision)
    problems: list[str] = []
    index = read_json(folder, "model_index.json", problems)
    for part, wanted in COMPONENTS.items():
        entry = index.get(part) if index else None
        got = entry[-1] if isinstance(entry, list) and entry else entry
        if index and got not in (wanted, f"{wanted}Fast"):
            problems.append(f"model_index.json: {part} must be a {wanted}, got {got}.")
    files = {part: read_json(folder, name, problems) for part, name in CONFIGS.items()}
    builders = architecture(files, dtype, problems)
    scheduler = schedule_of(files["scheduler"], problems) if files["scheduler"] else {}
    # A missing weight can be named before the architecture is understood; a wrong shape cannot.
    tensors = {part: find_tensors(folder / part, STEMS[part], problems) for part in builders}
    unclear: list[str] = []
    text = CLIPTextConfig.from_json(files["text_encoder"], unclear)
    if not unclear:
        problems += tokenizer_problems(folder / "tokenizer", text)
    _refuse(folder, problems, hub_problems(model, revision, problems))

    problems += Tokenizer(folder / "tokenizer", text.max_position_embeddings).problems(text.vocab_size)
    broken: list[str] = []
    modules = {part: load_module(build, tensors[part], part, problems, broken) for part, build in builders.items()}
    if broken:
        problems.append(f"NaN or infinity stands among the weights, in {some(broken)}.")
    _refuse(folder, problems)
    return Checkpoint(
        folder,
        cast(UNet, modules["unet"]),
        cast(VAE, modules["vae"]),
        cast(CLIPText, modules["text_encoder"]),
        scheduler,
    )


def schedule_of(content: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    scheduler, remarks = corrected(content)
    for remark in remarks:
        logger.info(f"{CONFIGS['scheduler']}: {remark}")
    try:
        Schedule.from_config(scheduler)
    except ValueError as error:
        problems.append(f"{CONFIGS['scheduler']}: {error}")
    return scheduler


def architecture(
    configs: Mapping[str, Mapping[str, Any]], dtype: Any, problems: list[str]
) -> dict[str, Callable[[], nnx.Module]]:
    """A function for each network that builds it, by the contents of a checkpoint's files in CONFIGS."""
    unet_config = UNetConfig.from_json(configs["unet"], problems)
    vae_config = VAEConfig.from_json(configs["vae"], problems)
    text_config = CLIPTextConfig.from_json(configs["text_encoder"], problems)
    problems += mismatches(unet_config, vae_config, text_config)
    rngs: Any = OneKey()
    return {
        "unet": lambda: UNet(unet_config, dtype=dtype, rngs=rngs),
        "vae": lambda: VAE(vae_config, dtype=dtype, rngs=rngs),
        "text_encoder": lambda: CLIPText(text_config, dtype=dtype, rngs=rngs),
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


def _refuse(folder: Path, problems: list[str], remarks: Sequence[str] = ()) -> None:
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
