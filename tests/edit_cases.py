"""Pictures that begin from others: golden_edits.py draws them with diffusers, and the tests draw them again."""

from typing import NamedTuple

import numpy as np

from app.types import Mask, Pixels
from tests import tiny, tiny_flow


class EditRun(NamedTuple):
    """Guidance as this project counts it."""

    sampler: str | None
    steps: int
    guidance_scale: float
    strength: float | None  # None: it begins from noise
    masked: bool
    references: int = 0  # images to look at, beside the one to begin from

    def __str__(self) -> str:
        name = f"{self.sampler} {self.steps} {self.guidance_scale} {self.strength}{' masked' * self.masked}"
        return f"{name} {self.references} references" if self.references else name


RUNS = {
    "tiny-sd1": [
        EditRun("pndm", 5, 7.5, 0.7, False),
        EditRun("euler", 4, 3.0, 0.3, False),
        EditRun("dpmpp_2m_karras", 5, 3.0, 0.8, True),
        EditRun("ddim", 4, 7.5, 1.0, True),
    ],
    "tiny-sdxl": [
        EditRun("euler", 4, 5.0, 0.6, False),
        EditRun("dpmpp_2m", 4, 5.0, 1.0, False),
        EditRun("euler", 4, 5.0, 0.999, True),
        EditRun("heun", 4, 5.0, 1.0, True),
    ],
    "tiny-klein": [
        EditRun(None, 4, 1.0, None, False, references=2),
        EditRun(None, 3, 4.0, None, False, references=1),
        EditRun(None, 4, 1.0, 0.6, False),
        EditRun(None, 3, 4.0, 0.7, True),
        EditRun(None, 4, 1.0, 1.0, True, references=1),
    ],
    "tiny-z-image": [
        EditRun(None, 4, 1.0, 0.6, False),
        EditRun(None, 4, 4.0, 0.85, False),
        EditRun(None, 4, 1.0, 0.6, True),
        EditRun(None, 3, 4.0, 1.0, True),
    ],
}
# With a UNet that fills masks.
INPAINTING = {
    "tiny-sd2": [EditRun("ddim", 4, 5.0, 1.0, True), EditRun("euler", 4, 1.0, 0.6, True)],
    "tiny-sdxl": [EditRun("euler", 4, 5.0, 1.0, True), EditRun("dpmpp_2m", 4, 5.0, 0.6, True)],
}
SIZES = tiny.IMAGE_SIZES | tiny_flow.IMAGE_SIZES  # height, width
REFERENCE_SIZE = (16, 16)


def images(model: str) -> Pixels:
    """[2, H, W, 3]: what the two pictures of a run begin from."""
    height, width = SIZES[model]
    return np.clip(127.5 + 60 * tiny.noise(f"{model} image", 2, height, width, 3), 0, 255).astype(np.uint8)


def references(model: str) -> list[Pixels]:
    """[H, W, 3] each: of REFERENCE_SIZE, and as large as the pictures."""
    sizes = (REFERENCE_SIZE, SIZES[model])
    images = (tiny.noise(f"{model} reference {i}", *size, 3) for i, size in enumerate(sizes))
    return [np.clip(127.5 + 60 * image, 0, 255).astype(np.uint8) for image in images]


def mask(model: str) -> Mask:
    """[H, W], with edges between latents."""
    height, width = SIZES[model]
    redrawn = np.zeros((height, width), bool)
    redrawn[height // 4 + 1 :, : width // 2 + 1] = True
    return redrawn


def noises(model: str) -> tiny.Float32:
    """[3, 2, h, w, C], in the order of their numbers on the device from 0, -2 and -1: the initial noise, then what
    samples the posteriors of the image outside the mask, and of the image."""
    first = tiny_flow.latents(model) if model in tiny_flow.MODELS else tiny.latents(model)
    return np.stack([first, *(tiny.noise(f"{model} posterior {i}", *first.shape) for i in (2, 1))])
