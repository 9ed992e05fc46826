"""What a slot takes of the images that its picture begins from and looks at: each is encoded once for all pictures of a
request. Then comes what a table makes of the first. Knows nothing of slots.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from app.diffusion.declared_programs import label_of
from app.diffusion.edit_programs import EditInputs, Outside
from app.diffusion.families.family import Family
from app.diffusion.models.references import References, positions_of
from app.diffusion.samplers import SamplerTable
from app.diffusion.samplers.table import padded
from app.types import Edit, Mask, Pixels


@dataclass(frozen=True)
class EncodedEdit:
    """What a picture begins from: an image as its VAE knows it, and how much of it each step puts back; and references.

    The means and deviations of posteriors, float32 [h, w, C], are on the device.
    """

    posterior: tuple[Any, Any]
    redrawn: npt.NDArray[np.float32]  # [h, w], the mask
    pure_noise: bool  # nothing of the image is in the latents at the beginning
    outside: tuple[Any, Any] | None = None  # of the image without what is in the mask, for a denoiser that fills masks
    references: References | None = None  # of a denoiser that looks at images

    def block_until_ready(self) -> None:
        last = self.references.latents if self.references else (self.outside or self.posterior)[0]
        last.block_until_ready()


@dataclass(frozen=True)
class ImagePrograms:
    """The compiled programs that encode images, by the sizes of these."""

    run: Mapping[str, Callable[..., Any]]
    decoders: Any  # the weights
    pixels_per_latent: int

    def encode(self, pixels: Pixels, *masks: Mask) -> tuple[Any, Any]:
        """A posterior; a denoiser that fills masks has programs that take a mask [H, W] to leave out."""
        height, width = pixels.shape[:2]
        mean, deviation = self.run[f"encode image {label_of((width, height))}"](self.decoders, pixels, *masks)
        return mean, deviation

    def place(self, tokens: Any, latents: Any, at: int) -> Any:
        """Puts latents [h, w, C] among tokens [T, C], from token `at` on."""
        height, width = (self.pixels_per_latent * side for side in latents.shape[:2])
        return self.run[f"place reference {label_of((width, height))}"](tokens, latents, np.int32(at))


def encoded_edit(edit: Edit, family: Family, programs: ImagePrograms, blank: EditInputs) -> EncodedEdit:
    """What a slot will take of the images. `blank` is of a picture that begins from noise alone and looks at none."""
    if edit.image is None:
        begun = EncodedEdit((blank.mean, blank.deviation), np.ones(blank.kept.shape, np.float32), pure_noise=True)
    else:
        begun = encoded_beginning(edit, edit.image, family, programs, blank)
    if blank.references is None:
        return begun
    latents = [] if edit.image is None else [begun.posterior[0]]
    latents += [programs.encode(reference)[0] for reference in edit.references]
    return replace(begun, references=placed(latents, programs, blank.references.latents))


def encoded_beginning(
    edit: Edit, image: Pixels, family: Family, programs: ImagePrograms, blank: EditInputs
) -> EncodedEdit:
    nothing = np.zeros(image.shape[:2], np.bool_)
    mask = ~nothing if edit.mask is None else edit.mask
    redrawn, pure_noise = family.latent_mask(mask), edit.mask is not None and edit.strength == 1
    if not family.fills_masks:
        return EncodedEdit(programs.encode(image), redrawn, pure_noise)
    posterior = (blank.mean, blank.deviation) if pure_noise else programs.encode(image, nothing)
    return EncodedEdit(posterior, redrawn, pure_noise, programs.encode(image, mask))


def placed(images: Sequence[Any], programs: ImagePrograms, tokens: Any) -> References:
    """Latents [h, w, C] one behind the other among `tokens`, which hold them all."""
    at = 0
    for latents in images:
        tokens = programs.place(tokens, latents, at)
        at += latents.shape[0] * latents.shape[1]
    positions = positions_of([latents.shape[:2] for latents in images], len(tokens))
    return References(tokens, positions, np.int32(at))


def initial_shares(table: SamplerTable, edit: EncodedEdit | None) -> tuple[float, float]:
    """Of the image and of noise in the latents at the beginning."""
    if edit is None or edit.pure_noise:
        return 0.0, table.initial_scale
    signal, noise = table.levels[0]
    return signal, noise


def edit_inputs(edit: EncodedEdit, table: SamplerTable, table_rows: int) -> EditInputs:
    """What `insert` takes of the images, with levels for as many rows as programs take."""
    signal, _ = initial_shares(table, edit)
    levels = padded(levels_after(table), table_rows)
    outside = Outside(*edit.outside, edit.redrawn) if edit.outside else None
    # What fills masks has learned where to draw: nothing is put back.
    kept = np.zeros_like(edit.redrawn) if edit.outside else 1 - edit.redrawn
    return EditInputs(*edit.posterior, kept, np.float32(signal), levels, outside, edit.references)


def levels_after(table: SamplerTable) -> npt.NDArray[np.float32]:
    """[N, 2]: the shares of image and noise after each row, which are those of the next; the last has no noise."""
    return np.concatenate([table.levels[1:], np.array([[1, 0]], np.float32)])
