"""Attention of heads that are normed and rotated, over the tokens of one stream or of several.

It takes queries, keys and values as they are projected. Which form computes it is chosen while a program is traced.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from app.diffusion.models.attention import attend
from app.diffusion.models.image_shards import ImageShards
from app.diffusion.models.tpu_rotary_attention import attend_rotated, takes
from app.diffusion.models.transformer_layers import Rotation, turned


class Stream(NamedTuple):
    """T tokens with their own projections and norms: text, image, or both in one."""

    q: jax.Array  # [B, T, C], heads of H features side by side; q, k and v may be the same array
    k: jax.Array
    v: jax.Array
    norm_q: jax.Array  # scales [H]
    norm_k: jax.Array
    rotation: Rotation  # of neighbours


class Keys(NamedTuple):
    """What tokens attend to."""

    lengths: jax.Array | None = None  # [B], only so many of all tokens; None: all
    shards: ImageShards | None = None  # also to the tokens of these chips


def attend_streams(
    streams: Sequence[Stream],
    heads: int,
    epsilon: float,
    *,
    first: tuple[int, int, int] = (0, 0, 0),
    lengths: jax.Array | None = None,
    shards: ImageShards | None = None,
) -> list[jax.Array]:
    """The tokens of each stream over those of all, [B, T, heads * H] for each stream.

    `first` are the first heads of q, k and v in their arrays. Only the first lengths [B] of all tokens are attended to.
    With `shards`, tokens attend to those of all chips too. The kernel has as many keys as queries, so it takes none.
    """
    plain = partial(attend_joined, heads=heads, epsilon=epsilon, first=first, shards=shards)
    tokens, size = [stream.q.shape[1] for stream in streams], len(streams[0].norm_q)
    if shards or not takes(tokens, size, streams[0].q.dtype):
        return plain(streams, lengths)
    kernel = partial(attend_rotated, heads=heads, epsilon=epsilon, first=first)
    answers: list[jax.Array] = jax.lax.platform_dependent(list(streams), lengths, default=plain, tpu=kernel)
    return answers


def attend_joined(
    streams: Sequence[Stream],
    lengths: jax.Array | None,
    *,
    heads: int,
    epsilon: float,
    first: tuple[int, int, int],
    shards: ImageShards | None = None,
) -> list[jax.Array]:
    """The same with norm, rotation and attention apart."""
    size = len(streams[0].norm_q)

    def projected(x: jax.Array, head: int) -> jax.Array:
        return x[..., head * size : (head + heads) * size]

    joined = partial(jnp.concatenate, axis=1)
    q, k, v = [], [], []
    for stream in streams:
        q.append(turned(projected(stream.q, first[0]), stream.norm_q, stream.rotation, epsilon))
        k.append(turned(projected(stream.k, first[1]), stream.norm_k, stream.rotation, epsilon))
        v.append(projected(stream.v, first[2]))
    keys, values = joined(k), joined(v)
    if shards:
        keys, values = shards.gathered(keys), shards.gathered(values)
    x = attend(joined(q), keys, values, heads, lengths=lengths)
    ends = np.cumsum([part.shape[1] for part in q])
    return [x[:, end - part.shape[1] : end] for part, end in zip(q, ends, strict=True)]
