"""Builds networks as shapes, from a checkpoint's configuration files alone, without weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax import nnx

from app.diffusion.families.family import Family, without_encoder
from app.diffusion.families.registry import recognise
from app.diffusion.models.checkpoint_files import (
    INDEX,
    SCHEDULER,
    architecture,
    component_configs,
    read_file,
    schedule_of,
)
from app.diffusion.models.loading import Checkpoint, builders
from app.diffusion.models.small_files import read_json
from app.diffusion.samplers import FlowSchedule, Schedule
from capacity.model_names import MODEL_NAMES
from cluster import ROOT

PRESETS = Path(__file__).parent / "presets"  # full-size architectures; {part: content of its configuration file}


def shapes_of(model: str, dtype: Any, *, image_encoder: bool = False) -> Checkpoint:
    """A checkpoint whose networks hold jax.ShapeDtypeStruct for weights.

    `model` is a folder in diffusers layout or one .safetensors file, of which only configurations and the header are
    read, or a preset's name with or without an owner: CompVis/stable-diffusion-v1-4. Raises ValueError for any other.
    """
    folder, family, schedule = architecture_of(model)
    if not image_encoder:
        family = without_encoder(family)
    networks = {part: nnx.eval_shape(build) for part, build in builders(family, dtype).items()}
    return Checkpoint(folder, family, networks, {}, schedule)


def architecture_of(model: str) -> tuple[Path, Family, Schedule | FlowSchedule]:
    """Where a model's configurations are, and what they describe. Raises ValueError as `shapes_of` does."""
    problems: list[str] = []
    folder, configs = configurations(model, problems)
    kind = recognise(configs.get("index", configs), problems) if configs else None
    family = architecture(kind, configs, configs.get("index", {}), problems) if kind else None
    schedule = schedule_of(kind, configs["scheduler"], problems)[0] if kind else None
    if problems or family is None or schedule is None:
        raise ValueError(f"{folder} is not a model that we support:\n" + "\n".join(f"- {line}" for line in problems))
    return folder, family, schedule


def configurations(model: str, problems: list[str]) -> tuple[Path, Mapping[str, Mapping[str, Any]]]:
    """The configuration of each component and of the scheduler, and model_index.json as "index" if there is one."""
    folder = ROOT / Path(MODEL_NAMES["demo"] if model == "demo" else model).expanduser()
    if folder.is_dir():
        index = read_json(folder / INDEX, INDEX, problems)
        kind = recognise(index, problems)
        configs = component_configs(kind, folder, problems) if kind else {}
        return folder, configs | {"index": index, "scheduler": read_json(folder / SCHEDULER, SCHEDULER, problems)}
    if folder.is_file():
        files = read_file(folder, None, problems)
        return folder, {**files.configs, "index": files.index, "scheduler": files.scheduler} if files else {}
    name = model.rpartition("/")[2]
    if name not in presets():
        known = ", ".join(["demo", *presets()])
        raise ValueError(
            f"model must be a folder in diffusers layout, a .safetensors file or one of {known}, got {model}."
        )
    path = PRESETS / f"{name}.json"
    return path, json.loads(path.read_text("utf-8"))


def presets() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.json"))
