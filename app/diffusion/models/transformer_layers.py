"""What the transformers of flow models and their text encoders share: norms, rotary embeddings, masked attention.

Norms, rotations and modulation are computed in float32 and rounded to the network's dtype once.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from app.diffusion.models.layers import Dtype


def rms_norm(features: int, epsilon: float, *, dtype: Dtype, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """Root mean square norm with learned scales (Zhang and Sennrich 2019)."""
    return nnx.RMSNorm(features, epsilon=epsilon, dtype=dtype, param_dtype=dtype, rngs=rngs)


def normed(x: jax.Array, epsilon: float) -> jax.Array:
    """Layer norm without parameters, over the last axis; float32 for any dtype."""
    x = x.astype(jnp.float32)
    x = x - x.mean(axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + epsilon)


def by_head(x: jax.Array, heads: int) -> jax.Array:
    """[B, T, N * H] -> [B, T, N, H]."""
    return x.reshape(*x.shape[:2], heads, -1)


def rotary_angles(positions: jax.Array, dims: Sequence[int], theta: float) -> jax.Array:
    """Positions [B, T, A] -> angles of rotation [B, T, sum(dims) / 2] in float32.

    Axis a has dims[a] / 2 of the angles, its position times theta ** (-2i / dims[a]) (Su et al. 2021).
    """
    frequencies = [theta ** -(np.arange(0, features, 2) / features) for features in dims]
    axes = np.repeat(np.arange(len(dims)), [len(axis) for axis in frequencies])
    return positions.astype(jnp.float32)[..., axes] * np.concatenate(frequencies).astype(np.float32)[None, None]


def rotate(x: jax.Array, angles: jax.Array, *, halves: bool = False) -> jax.Array:
    """Rotates pairs of features of x [B, T, N, H] by angles [B or 1, T, H / 2].

    A pair is two neighbours, as diffusers has it, or with `halves` a feature of each half, as transformers has it.
    """
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], *((2, -1) if halves else (-1, 2)))
    axis = -2 if halves else -1
    first, second = (jnp.take(pairs, i, axis=axis) for i in range(2))
    rotated = jnp.stack([first * cos - second * sin, first * sin + second * cos], axis=axis)
    return rotated.reshape(x.shape).astype(x.dtype)


def attend_to(
    q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array | None = None, *, causal: bool = False
) -> jax.Array:
    """Attention of q [B, T, N, H] over the first `lengths` [B] of k and v [B, S, K, H] -> [B, T, N * H].

    N is a multiple of K: each head of k and v serves N / K heads of q.
    """
    x = jax.nn.dot_product_attention(q, k, v, is_causal=causal, key_value_seq_lengths=lengths)
    return x.reshape(*x.shape[:2], -1)
