"""Builds networks as shapes, from a checkpoint's configuration files alone, without weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from flax import nnx

from app.diffusion.models.clip import CLIPText
from app.diffusion.models.loading import CONFIGS, Checkpoint, architecture, read_json
from app.diffusion.models.scheduler_config import corrected
from app.diffusion.models.unet import UNet
from app.diffusion.models.vae import VAE
from capacity.model_names import MODEL_NAMES
from cluster import ROOT

PRESETS = Path(__file__).parent / "presets"  # full-size architectures; {part: content of its configuration file}


def shapes_of(model: str, dtype: Any) -> Checkpoint:
    """A checkpoint whose networks hold jax.ShapeDtypeStruct for weights.

    `model` is a folder in diffusers layout, of which only the configurations are read, or a preset's name with or
    without an owner: CompVis/stable-diffusion-v1-4. Raises ValueError for any other model.
    """
    problems: list[str] = []
    folder, configs = configurations(model, problems)
    builders = architecture(configs, dtype, problems)
    if problems:
        raise ValueError(f"{folder} is not a model that we support:\n" + "\n".join(f"- {line}" for line in problems))
    modules = {part: nnx.eval_shape(build) for part, build in builders.items()}
    return Checkpoint(
        folder,
        cast(UNet, modules["unet"]),
        cast(VAE, modules["vae"]),
        cast(CLIPText, modules["text_encoder"]),
        corrected(configs["scheduler"])[0],
    )


def configurations(model: str, problems: list[str]) -> tuple[Path, Mapping[str, Mapping[str, Any]]]:
    folder = ROOT / Path(MODEL_NAMES["demo"] if model == "demo" else model).expanduser()
    if folder.is_dir():
        return folder, {part: read_json(folder, name, problems) for part, name in CONFIGS.items()}
    name = model.rpartition("/")[2]
    if name not in presets():
        known = ", ".join(["demo", *presets()])
        raise ValueError(f"model must be a folder in diffusers layout or one of {known}, got {model}.")
    path = PRESETS / f"{name}.json"
    return path, json.loads(path.read_text("utf-8"))


def presets() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.json"))
