"""Which family a checkpoint is of. Imports no JAX."""

from collections.abc import Mapping
from typing import Any

from app.diffusion.families.family import Family
from app.diffusion.families.flux2_klein import Flux2Klein
from app.diffusion.families.stable_diffusion import StableDiffusion
from app.diffusion.families.stable_diffusion_xl import StableDiffusionXL
from app.diffusion.families.z_image import ZImage

FAMILIES: list[type[Family]] = [StableDiffusion, StableDiffusionXL, Flux2Klein, ZImage]


def recognise(index: Mapping[str, Any], problems: list[str]) -> type[Family] | None:
    """The family by `_class_name` in the content of model_index.json, else the one with most components in it.

    Other pipelines have the components of these families: image to image, and those of distilled models. `index` may
    also be the components alone.
    """
    name = index.get("_class_name")
    for family in FAMILIES:
        if name in family.PIPELINES:
            return family
    fitting = [family for family in FAMILIES if family.COMPONENTS.keys() <= index.keys() and denoises(family, index)]
    if not fitting:
        known = ", ".join(name for family in FAMILIES for name in family.PIPELINES)
        problems.append(f"model_index.json: _class_name must be one of {known}, got {name}.")
        return None
    return max(fitting, key=lambda family: len(family.COMPONENTS))


def denoises(family: type[Family], index: Mapping[str, Any]) -> bool:
    """Whether the denoiser that `index` names is of this family; it need not name any."""
    entries = {part: index[part] for part, component in family.COMPONENTS.items() if component.role == "denoise"}
    return all(
        not isinstance(entry, list) or family.COMPONENTS[part].class_name in entry for part, entry in entries.items()
    )
