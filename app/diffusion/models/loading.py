"""Checkpoints in diffusers layout <-> our modules. Strict: every problem is collected and said in one ValueError.

Because modules are named like the checkpoint, there are no renaming tables: a parameter's path is its tensor's name.
"""

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from app.diffusion.models.clip import CLIPText
from app.diffusion.models.config import STEMS, CLIPTextConfig, UNetConfig, VAEConfig, mismatches
from app.diffusion.models.errors import one_line
from app.diffusion.models.scheduler_config import corrected
from app.diffusion.models.tensor_names import NOT_WEIGHTS, current_name, squeezed
from app.diffusion.models.tokenizer import Tokenizer
from app.diffusion.models.tokenizer_files import some, tokenizer_problems
from app.diffusion.models.unet import UNet
from app.diffusion.models.vae import VAE
from app.diffusion.samplers import Schedule

logger = logging.getLogger(f"ray.serve.{__name__}")  # the tree that Serve writes to its files

Module = TypeVar("Module", bound=nnx.Module)

# What a Stable Diffusion folder holds; a safety checker and its feature extractor may lie beside it and are not run.
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
    """A folder in diffusers layout, or a Hugging Face repo id -> its networks, in `dtype`.

    Raises ValueError with every problem found: a missing file, class, tensor or option, a wrong shape, a surplus, a
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
    # A weight is missing or in the wrong place whatever the architecture is; shapes need one that is understood.
    tensors = {part: find_tensors(folder / part, STEMS[part], problems) for part in builders}
    unclear: list[str] = []
    text = CLIPTextConfig.from_json(files["text_encoder"], unclear)
    if not unclear:
        problems += tokenizer_problems(folder / "tokenizer", text)
    _refuse(folder, problems, unasked(model, revision, problems))

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
    """What builds each network, by the contents of a checkpoint's files in CONFIGS."""
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
    """Stands in for nnx.Rngs where only shapes are wanted: under eval_shape, counting keys makes flax search an ever
    longer trace at each (9 s instead of 0.8 s for SD 1.x's UNet)."""

    def __init__(self) -> None:
        self.key = jax.random.key(0)

    def params(self) -> jax.Array:
        return self.key


def checkpoint_folder(model: str | Path, revision: str | None = None) -> Path:
    """The folder of a model, downloaded first where `model` is a repo id and not a folder."""
    if Path(model).is_dir():
        return Path(model)
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(str(model), revision=revision, allow_patterns=DOWNLOADED))
    except Exception as error:  # the hub's client raises a dozen kinds; each means that there is no model
        raise ValueError(
            f"model {model} is no folder here and could not be fetched from Hugging Face: {one_line(error)}"
        ) from error


def unasked(model: str | Path, revision: str | None, problems: list[str]) -> list[str]:
    """Why the Hub could not be asked for what is missing: its client then takes what an earlier download left."""
    if Path(model).is_dir() or not any("missing" in problem for problem in problems):
        return []
    import huggingface_hub

    try:
        huggingface_hub.HfApi().model_info(str(model), revision=revision, timeout=10)
    except Exception as error:
        return [f"The Hub could not be asked for what is missing: {one_line(error)}"]
    return []


def load_module(
    build: Callable[[], Module], tensors: Mapping[str, "Tensor"], where: str, problems: list[str], broken: list[str]
) -> Module:
    """Fills the module that `build` describes, without ever allocating its random initial weights.

    Adds to `broken` the name of each tensor that holds a number which is not finite.
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
        if not problems:  # reading gigabytes is pointless once the answer is no
            content = tensor.read()
            if not finite(content):
                broken.append(f"{where} {name}")
            value = from_tensor(path, content, parameter.shape)
            filled[path] = parameter.replace(jnp.asarray(value, dtype=parameter.dtype))
    for name in sorted(set(tensors) - {tensor_name(path) for path in parameters}):
        problems.append(f"{where}: tensor {name} is not one that this architecture has.")
    return nnx.merge(graph, nnx.from_flat_state(filled)) if not problems else nnx.merge(graph, abstract)


def finite(array: np.ndarray) -> bool:
    """Whether no value of a float16, bfloat16 or float32 array is NaN or infinite.

    By their bits, in pieces that stay in the processor's cache: 0.2 s per GiB on one core of a laptop, where
    np.isfinite takes 1.2 s in float32 and 2 s in float16.
    """
    unsigned, exponent = {4: (np.uint32, 0x7F800000), 2: (np.uint16, 0x7C00)}[array.itemsize]
    if array.dtype.name == "bfloat16":
        exponent = 0x7F80
    bits = array.reshape(-1).view(unsigned)
    pieces = (bits[i : i + 65536] & unsigned(exponent) for i in range(0, len(bits), 65536))
    return all(piece.max() != exponent for piece in pieces)


def tensor_name(path: tuple[Any, ...]) -> str:
    """`("conv1", "kernel")` -> `conv1.weight`."""
    *module, leaf = map(str, path)
    return ".".join([*module, "bias" if leaf == "bias" else "weight"])


def tensor_shape(path: tuple[Any, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """PyTorch's shape of one of our parameters: output features first."""
    if path[-1] != "kernel":
        return shape
    return (shape[1], shape[0]) if len(shape) == 2 else (shape[3], shape[2], shape[0], shape[1])


def from_tensor(path: tuple[Any, ...], tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """PyTorch's layout -> ours: OIHW to HWIO, [out, in] to [in, out]."""
    if path[-1] != "kernel":
        return tensor
    tensor = tensor.reshape(tensor_shape(path, shape))
    return tensor.T if tensor.ndim == 2 else tensor.transpose(2, 3, 1, 0)


def to_tensors(module: nnx.Module, dtype: Any) -> dict[str, np.ndarray]:
    """The reverse of loading: what a checkpoint of `module` holds, in PyTorch's names and layout."""
    tensors = {}
    for path, parameter in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        array = np.asarray(parameter[...])
        if path[-1] == "kernel":
            array = array.T if array.ndim == 2 else array.transpose(3, 2, 0, 1)
        tensors[tensor_name(path)] = np.ascontiguousarray(array.astype(dtype))
    return tensors


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a safetensors file, read only when it is wanted."""

    file: Path
    key: str
    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        with safe_open(self.file, framework="np") as archive:
            return np.asarray(archive.get_tensor(self.key))


def find_tensors(folder: Path, stem: str, problems: list[str]) -> dict[str, Tensor]:
    """The tensors of a component by today's names, aliases of older checkpoints resolved."""
    file = folder / f"{stem}.safetensors"
    where = f"{folder.name}/{file.name}"
    if not file.is_file():
        hint = " Its pickled .bin weights are not read: convert them first." if list(folder.glob("*.bin")) else ""
        problems.append(f"{where} is missing.{hint}")
        return {}
    tensors = {}
    try:
        with safe_open(file, framework="np") as archive:
            for key in archive.keys():
                view = archive.get_slice(key)
                if view.get_dtype() not in ("F32", "F16", "BF16") and current_name(key) not in NOT_WEIGHTS:
                    problems.append(f"{where}: tensor {key} must be F32, F16 or BF16, got {view.get_dtype()}.")
                tensors[current_name(key)] = Tensor(file, key, tuple(view.get_shape()))
    except (OSError, SafetensorError) as error:
        problems.append(f"{where} cannot be read: {error}.")
        return {}
    return {name: tensor for name, tensor in tensors.items() if name not in NOT_WEIGHTS}


def _refuse(folder: Path, problems: list[str], remarks: Sequence[str] = ()) -> None:
    if problems:
        lines = "\n".join([*(f"- {line}" for line in problems), *remarks])
        raise ValueError(f"checkpoint {folder} cannot be loaded:\n{lines}")


def read_json(folder: Path, name: str, problems: list[str]) -> dict[str, Any]:
    try:
        found = json.loads((folder / name).read_text("utf-8"))
    except OSError:
        problems.append(f"{name} is missing.")
        return {}
    except ValueError as error:
        problems.append(f"{name} is not JSON: {error}.")
        return {}
    if not isinstance(found, dict):
        problems.append(f"{name} must hold a JSON object, got a {type(found).__name__}.")
        return {}
    return found
