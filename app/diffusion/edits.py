"""What the images of a request ask of a model, before anything runs on a device. Needs no JAX."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from app.diffusion.samplers import SamplerTable
from app.types import Capabilities, Edit, Generation, InvalidField, Size


@dataclass(frozen=True)
class EncodedEdit:
    """What a picture begins from: an image as its VAE knows it, and how much of it each step puts back.

    The means and deviations of posteriors, float32 [h, w, C], are on the device.
    """

    posterior: tuple[Any, Any]
    redrawn: npt.NDArray[np.float32]  # [h, w], the mask
    pure_noise: bool  # nothing of the image is in the latents at the beginning
    outside: tuple[Any, Any] | None = None  # of the image without what is in the mask, for a denoiser that fills masks

    def block_until_ready(self) -> None:
        (self.outside or self.posterior)[0].block_until_ready()


def check_edit(generation: Generation, capabilities: Capabilities, sizes: Sequence[Size]) -> None:
    """Raises InvalidField for images that the model does not take, or for none where it needs one."""
    edit = generation.edit
    if edit is None:
        if not capabilities.generations:
            raise InvalidField("image", "image must be there, with a mask: this model only fills masks.")
        return
    if not capabilities.generations and edit.mask is None:
        raise InvalidField("mask", "mask must be there: this model only fills masks.")
    refused = [
        ("image", edit.image is not None and not capabilities.edits),
        ("mask", edit.mask is not None and not capabilities.masks),
        ("references", bool(edit.references) and not capabilities.references),
    ]
    for name, unable in refused:
        if unable:
            raise InvalidField(
                name, f"{name} is not something this server takes; leave it out.", "unsupported_parameter"
            )
    if len(edit.references) > capabilities.references:
        raise InvalidField(
            "references", f"references must be at most {capabilities.references}, got {len(edit.references)}."
        )
    check_sizes_of(edit, (generation.width, generation.height), sizes)


def resolved(edit: Edit | None, capabilities: Capabilities) -> Edit | None:
    """With the model's own strength where the request names none. Reference images alone have none."""
    if edit is None or edit.image is None or edit.strength is not None:
        return edit
    return replace(edit, strength=capabilities.strength if edit.mask is None else capabilities.mask_strength)


def levels_after(table: SamplerTable) -> npt.NDArray[np.float32]:
    """[N, 2]: the shares of image and noise after each row, which are those of the next; the last has no noise."""
    return np.concatenate([table.levels[1:], np.array([[1, 0]], np.float32)])


def check_sizes_of(edit: Edit, size: Size, sizes: Sequence[Size]) -> None:
    """Programs are compiled for the declared sizes alone, so whoever reads files scales the images."""
    if edit.image is not None and edit.image.shape[:2] != size[::-1]:
        height, width = edit.image.shape[:2]
        raise InvalidField("image", f"image must have the size {size[0]}x{size[1]}, got {width}x{height}.")
    for reference in edit.references:
        height, width = reference.shape[:2]
        if (width, height) not in sizes:
            declared = ", ".join(f"{width}x{height}" for width, height in sizes)
            raise InvalidField("references", f"references must have one of the sizes {declared}, got {width}x{height}.")
