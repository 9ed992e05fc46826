"""What a slot takes of the image that its picture begins from: the image encoded once, then what a table makes of it.

Dispatches through the function that it is given. Knows nothing of slots and programs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from app.diffusion.edit_programs import EditInputs, Outside
from app.diffusion.families.family import Family
from app.diffusion.samplers import SamplerTable
from app.diffusion.samplers.table import padded
from app.types import Edit


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


def encoded_edit(edit: Edit, family: Family, encode: Callable[..., tuple[Any, Any]], blank: EditInputs) -> EncodedEdit:
    """`encode` makes a posterior of the image; for a denoiser that fills masks it takes the mask [H, W] to leave out.

    `blank` is of a picture that begins from noise alone.
    """
    assert edit.image is not None
    nothing = np.zeros(edit.image.shape[:2], np.bool_)
    mask = ~nothing if edit.mask is None else edit.mask
    redrawn, pure_noise = family.latent_mask(mask), edit.mask is not None and edit.strength == 1
    if not family.fills_masks:
        return EncodedEdit(encode(), redrawn, pure_noise)
    posterior = (blank.mean, blank.deviation) if pure_noise else encode(nothing)
    return EncodedEdit(posterior, redrawn, pure_noise, encode(mask))


def initial_shares(table: SamplerTable, edit: EncodedEdit | None) -> tuple[float, float]:
    """Of the image and of noise in the latents at the beginning."""
    if edit is None or edit.pure_noise:
        return 0.0, table.initial_scale
    signal, noise = table.levels[0]
    return signal, noise


def edit_inputs(edit: EncodedEdit, table: SamplerTable, table_rows: int) -> EditInputs:
    """What `insert` takes of the image, with levels for as many rows as programs take."""
    signal, _ = initial_shares(table, edit)
    levels = padded(levels_after(table), table_rows)
    outside = Outside(*edit.outside, edit.redrawn) if edit.outside else None
    # What fills masks has learned where to draw: nothing is put back.
    kept = np.zeros_like(edit.redrawn) if edit.outside else 1 - edit.redrawn
    return EditInputs(*edit.posterior, kept, np.float32(signal), levels, outside)


def levels_after(table: SamplerTable) -> npt.NDArray[np.float32]:
    """[N, 2]: the shares of image and noise after each row, which are those of the next; the last has no noise."""
    return np.concatenate([table.levels[1:], np.array([[1, 0]], np.float32)])
