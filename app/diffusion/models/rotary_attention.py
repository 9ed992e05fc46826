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
    rotation: Rotation  # of neighbours, for T tokens; for those of all chips where chips share an image


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
    With `shards`, tokens attend to those of all chips too.
    """
    size, own = len(streams[0].norm_q), jnp.zeros((), jnp.int32)
    if shards:
        own = shards.index.astype(jnp.int32)
        streams = [with_all_keys(stream, heads * size, first, shards) for stream in streams]
        first = (first[0], 0, 0)
    plain, kernel = (
        partial(form, heads=heads, epsilon=epsilon, first=first) for form in (attend_joined, attend_rotated)
    )
    tokens, keys = [stream.q.shape[1] for stream in streams], sum(stream.k.shape[1] for stream in streams)
    if not takes(tokens, keys, size, streams[0].q.dtype):
        return plain(list(streams), lengths, own)
    answers: list[jax.Array] = jax.lax.platform_dependent(list(streams), lengths, own, default=plain, tpu=kernel)
    return answers


def with_all_keys(stream: Stream, width: int, first: tuple[int, int, int], shards: ImageShards) -> Stream:
    """The stream with the keys and values of all chips, as they are projected and without other columns.

    Each chip norms and rotates all of them, as the kernel does that on its way.
    """
    size = len(stream.norm_q)
    k, v = (
        shards.gathered(x[..., head * size : head * size + width])
        for x, head in zip((stream.k, stream.v), first[1:], strict=True)
    )
    return stream._replace(k=k, v=v)


def attend_joined(
    streams: Sequence[Stream],
    lengths: jax.Array | None,
    own: jax.Array,
    *,
    heads: int,
    epsilon: float,
    first: tuple[int, int, int],
) -> list[jax.Array]:
    """The same with norm, rotation and attention apart.

    Keys and values may be more than queries: then these are part `own` of each stream's tokens, counted in parts of
    that length.
    """
    size = len(streams[0].norm_q)

    def projected(x: jax.Array, head: int) -> jax.Array:
        return x[..., head * size : (head + heads) * size]

    joined = partial(jnp.concatenate, axis=1)
    q, k, v = [], [], []
    for stream in streams:
        places = stream.rotation.own(own, stream.q.shape[1])
        q.append(turned(projected(stream.q, first[0]), stream.norm_q, places, epsilon))
        k.append(turned(projected(stream.k, first[1]), stream.norm_k, stream.rotation, epsilon))
        v.append(projected(stream.v, first[2]))
    x = attend(joined(q), joined(k), joined(v), heads, lengths=lengths)
    ends = np.cumsum([part.shape[1] for part in q])
    return [x[:, end - part.shape[1] : end] for part, end in zip(q, ends, strict=True)]
