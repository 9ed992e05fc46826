"""What the device does with the image that a picture begins from. Pure; app/diffusion/device_programs.py calls it.

A slot keeps the image as latents. They are where its picture begins, noised as far as the strength says, and what each
step puts back outside the mask, noised to the level of the next step. With a share of zero nothing is put back, to the
bit. Knows nothing of requests and queues.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from app.diffusion.families.family import Family, Networks
from app.diffusion.models.image_shards import ImageShards
from app.diffusion.models.references import References
from app.diffusion.models.strips import Strips
from app.diffusion.networks import modules_of
from app.diffusion.sharding import divided, image_shards, strips_of, together_on

# The numbers of the noises that sample the posteriors of an image, and of what is outside its mask. No step has them.
POSTERIOR, OUTSIDE_POSTERIOR = -1, -2


class EditState(NamedTuple):
    """S slots. One without an image has zeros."""

    original: jax.Array  # float32 [S, h, w, C], the image's latents
    kept: jax.Array  # float32 [S, h, w], the share of the original that each step puts back
    levels: jax.Array  # float32 [S, N, 2], shares of image and noise in the original after each step
    outside: jax.Array | None = None  # float32 [S, h, w, 1 + C], the mask and latents; of denoisers that fill masks
    references: References | None = None  # of denoisers that look at images


class Outside(NamedTuple):
    """What `insert` takes for a denoiser that fills masks."""

    mean: Any  # float32 [h, w, C], of the posterior of the image with zeros in the mask
    deviation: Any  # float32 [h, w, C]
    redrawn: Any  # float32 [h, w]


class EditInputs(NamedTuple):
    """What `insert` takes of an image."""

    mean: Any  # float32 [h, w, C], of the posterior
    deviation: Any  # float32 [h, w, C]
    kept: Any  # float32 [h, w]
    signal: Any  # float32 [], the share of the image in the latents at the beginning
    levels: Any  # float32 [N, 2]
    outside: Outside | None = None
    references: References | None = None


def encode_image_program(
    family: Family,
    networks: Networks,
    sharding: NamedSharding,
    placing: Any,
    params: Any,
    pixels: jax.Array,
    blank: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """uint8 [H, W, 3] -> mean and deviation of the latents, float32 [h, w, C]. Where `blank` [H, W] is true the image
    is zero, which is mid-grey. `placing` is how the params lie on the chips."""
    colours = pixels.astype(jnp.float32) / 127.5 - 1
    if blank is not None:
        colours = jnp.where(blank[..., None], 0.0, colours)
    moments_of = partial(encode_rows, family, networks, together_on(sharding), shards=image_shards(sharding))
    mean, deviation = jnp.split(divided(moments_of, sharding, placing)(params, colours[None])[0], 2, axis=-1)
    return mean, deviation


def encode_rows(
    family: Family,
    networks: Networks,
    together: int | None,
    params: Any,
    colours: jax.Array,
    *,
    shards: ImageShards | None = None,
) -> jax.Array:
    """[B, H, W, 3] in [-1, 1] -> means and deviations, float32 [B, h, w, 2 * C].

    With `shards` the colours are this chip's part of their images.
    """
    strips = Strips(strips_of(1, colours.shape[1] // family.pixels_per_latent, together), shards)
    return jnp.concatenate(family.encode_image(modules_of(networks, params), colours, strips=strips), axis=-1)


def reference_program(references: jax.Array, latents: jax.Array, at: jax.Array) -> jax.Array:
    """Puts an image's latents [h, w, C] among tokens [T, C], from token `at` on."""
    return jax.lax.dynamic_update_slice_in_dim(references, latents.reshape(-1, latents.shape[-1]), at, axis=0)


def started(edit: EditInputs, noise: jax.Array, outside_noise: jax.Array) -> EditState:
    """An image in its slot; the noises [h, w, C] sample the posteriors."""
    outside = None
    if edit.outside is not None:
        latents = edit.outside.mean + edit.outside.deviation * outside_noise
        outside = jnp.concatenate([edit.outside.redrawn[..., None], latents], axis=-1)
    return EditState(edit.mean + edit.deviation * noise, edit.kept, edit.levels, outside, edit.references)


def blended(edit: EditState, noise: jax.Array, latents: jax.Array, step: jax.Array) -> jax.Array:
    """Puts the original back into latents [B, h, w, C] that have just taken their step [B], as
    StableDiffusionInpaintPipeline does with a UNet that was not trained for it. `noise` is the initial one."""
    levels = edit.levels[jnp.arange(len(step)), step]
    original = levels[:, 0, None, None, None] * edit.original + levels[:, 1, None, None, None] * noise
    kept = edit.kept[..., None]
    return kept * original + (1 - kept) * latents
