"""What the device does with the image that a picture begins from. Pure; app/diffusion/device_programs.py calls it.

A slot keeps the image as latents. They are where its picture begins, noised as far as the strength says, and what each
step puts back outside the mask, noised to the level of the next step. With a share of zero nothing is put back, to the
bit. Knows nothing of requests and queues.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from app.diffusion.families.family import Family, Networks
from app.diffusion.networks import modules_of

POSTERIOR = -1  # the number of the noise that samples an image's posterior: no step has it


class EditState(NamedTuple):
    """S slots. One without an image has zeros."""

    original: jax.Array  # float32 [S, h, w, C], the image's latents
    kept: jax.Array  # float32 [S, h, w], the share of the original that each step puts back
    levels: jax.Array  # float32 [S, N, 2], shares of image and noise in the original after each step


class EditInputs(NamedTuple):
    """What `insert` takes of an image."""

    mean: Any  # float32 [h, w, C], of the posterior
    deviation: Any  # float32 [h, w, C]
    kept: Any  # float32 [h, w]
    signal: Any  # float32 [], the share of the image in the latents at the beginning
    levels: Any  # float32 [N, 2]


def encode_image_program(
    family: Family, networks: Networks, params: Any, pixels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """uint8 [H, W, 3] -> mean and deviation of the latents, float32 [h, w, C]."""
    colours = pixels.astype(jnp.float32) / 127.5 - 1
    mean, deviation = family.encode_image(modules_of(networks, params), colours[None])
    return mean[0], deviation[0]


def blended(edit: EditState, noise: jax.Array, latents: jax.Array, step: jax.Array) -> jax.Array:
    """Puts the original back into latents [B, h, w, C] that have just taken their step [B], as
    StableDiffusionInpaintPipeline does with a UNet that was not trained for it. `noise` is the initial one."""
    levels = edit.levels[jnp.arange(len(step)), step]
    original = levels[:, 0, None, None, None] * edit.original + levels[:, 1, None, None, None] * noise
    kept = edit.kept[..., None]
    return kept * original + (1 - kept) * latents
