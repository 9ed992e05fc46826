"""Images cut into strips: along the batch of a chip, as its convolutions take as long over one to seven rows of a batch
as over eight, and over the chips that share an image.

A feature map is [B, H, W, C], or [B * S, h, W, C] where each image is cut into S strips of h rows, from the top.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from app.diffusion.models.image_shards import ImageShards


@dataclass(frozen=True)
class Strips:
    """How each image is cut: into `count` strips on each of the chips that share it."""

    count: int = 1
    shards: ImageShards | None = None  # None: a chip has whole images

    @property
    def whole(self) -> bool:
        """Whether images are not cut at all."""
        return self.count == 1 and self.shards is None


WHOLE = Strips()


def cut(x: jax.Array, strips: Strips) -> jax.Array:
    """[B, H, W, C] -> [B * S, H / S, W, C]."""
    return x.reshape(len(x) * strips.count, -1, *x.shape[2:])


def joined(x: jax.Array, strips: Strips) -> jax.Array:
    """Images, or a chip's part of them, from strips."""
    return x.reshape(len(x) // strips.count, -1, *x.shape[2:])


def repeated(x: jax.Array, strips: Strips) -> jax.Array:
    """What images have in common with their strips: [B, C] -> [B * S, C]."""
    return x if strips.count == 1 else jnp.repeat(x, strips.count, axis=0)


def with_neighbours(x: jax.Array, strips: Strips) -> jax.Array:
    """[B * S, h, W, C] -> [B * S, h + 2, W, C]: each strip between its neighbours' nearest rows. Above an image's first
    strip and below its last stands anything."""
    last, first = x[:, -1:], x[:, :1]
    if strips.shards is None:
        above, below = jnp.roll(last, 1, axis=0), jnp.roll(first, -1, axis=0)
    else:
        last, first = (rows.reshape(-1, strips.count, *rows.shape[1:]) for rows in (last, first))
        above = jnp.concatenate([strips.shards.from_above(last[:, -1:]), last[:, :-1]], axis=1)
        below = jnp.concatenate([first[:, 1:], strips.shards.from_below(first[:, :1])], axis=1)
        above, below = (rows.reshape(len(x), 1, *x.shape[2:]) for rows in (above, below))
    return jnp.concatenate([above, x, below], axis=1)


def with_zeros_around(x: jax.Array, strips: Strips) -> jax.Array:
    """Strips with their neighbours' rows, but with zeros for the rows outside of an image."""
    strip, last = jnp.arange(len(x)) % strips.count, strips.count - 1
    if strips.shards:
        strip = strip + strips.shards.index * strips.count
        last = strips.shards.count * strips.count - 1
    strip, row = strip[:, None, None, None], jnp.arange(x.shape[1])[None, :, None, None]
    outside = ((strip == 0) & (row == 0)) | ((strip == last) & (row == x.shape[1] - 1))
    return jnp.where(outside, 0, x)
