"""Which family a checkpoint is of. Imports no JAX."""

from collections.abc import Mapping
from typing import Any

from app.diffusion.families.family import Family
from app.diffusion.families.stable_diffusion import StableDiffusion

FAMILIES: list[type[Family]] = [StableDiffusion]


def recognise(index: Mapping[str, Any], problems: list[str]) -> type[Family] | None:
    """The family by `_class_name` in the content of model_index.json, else the one with most components in it.

    Other pipelines have the components of these families: image to image, and those of distilled models. `index` may
    also be the components alone.
    """
    name = index.get("_class_name")
    for family in FAMILIES:
        if name in family.PIPELINES:
            return family
    fitting = [family for family in FAMILIES if family.COMPONENTS.keys() <= index.keys()]
    if not fitting:
        known = ", ".join(name for family in FAMILIES for name in family.PIPELINES)
        problems.append(f"model_index.json: _class_name must be one of {known}, got {name}.")
        return None
    return max(fitting, key=lambda family: len(family.COMPONENTS))
