"""What the transformers of flow models and their text encoders share: norms and rotary embeddings.

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


def rotary_angles(positions: jax.Array, dims: Sequence[int], theta: float) -> jax.Array:
    """Positions [B, T, A] -> angles of rotation [B, T, sum(dims) / 2] in float32.

    Axis a has dims[a] / 2 of the angles, its position times theta ** (-2i / dims[a]) (Su et al. 2021).
    """
    frequencies = [theta ** -(np.arange(0, features, 2) / features) for features in dims]
    axes = np.repeat(np.arange(len(dims)), [len(axis) for axis in frequencies])
    return positions.astype(jnp.float32)[..., axes] * np.concatenate(frequencies).astype(np.float32)[None, None]


def turned(x: jax.Array, norm: nnx.RMSNorm, angles: jax.Array, *, halves: bool = False) -> jax.Array:
    """Norms each head of x [B, T, N * H] and rotates its pairs of features by angles [B or 1, T, H / 2].

    A pair is two neighbours, as diffusers has it, or with `halves` a feature of each half, as transformers has it.
    """
    heads = norm(x.reshape(*x.shape[:2], -1, 2 * angles.shape[-1]))
    return rotate(heads, angles, halves=halves).reshape(x.shape)


def rotate(x: jax.Array, angles: jax.Array, *, halves: bool) -> jax.Array:
    """Rotates pairs of features of x [B, T, N, H]."""
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], *((2, -1) if halves else (-1, 2)))
    axis = -2 if halves else -1
    first, second = (jnp.take(pairs, i, axis=axis) for i in range(2))
    rotated = jnp.stack([first * cos - second * sin, first * sin + second * cos], axis=axis)
    return rotated.reshape(x.shape).astype(x.dtype)
