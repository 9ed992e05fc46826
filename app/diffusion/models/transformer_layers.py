"""What the transformers of flow models and their text encoders share: norms and rotary embeddings.

Norms, rotations and modulation are computed in float32 and rounded to the network's dtype once.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint

from app.diffusion.models.layers import Dtype

LANES = 128  # columns of a TPU's smallest product


def rms_norm(features: int, epsilon: float, *, dtype: Dtype, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """Root mean square norm with learned scales (Zhang and Sennrich 2019)."""
    return nnx.RMSNorm(features, epsilon=epsilon, dtype=dtype, param_dtype=dtype, rngs=rngs)


def scales(norm: nnx.RMSNorm) -> jax.Array:
    assert norm.scale is not None
    return norm.scale[...]


def rms_normed(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """The same over the last axis of x, with the scales given; in float32, rounded to x's dtype."""
    wide = x.astype(jnp.float32)
    factor = jax.lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + epsilon)
    scale = jnp.expand_dims(scale.astype(jnp.float32), tuple(range(x.ndim - 1)))
    return (wide * factor * scale).astype(x.dtype)


def rms_scaled(x: jax.Array, norm: nnx.RMSNorm, factor: jax.Array) -> jax.Array:
    """Norms tokens x [B, T, D] by `norm` and multiplies them by `factor` [B, 1, D]; float32 for any dtype.

    In bfloat16 the squares are rounded, each by 0.4 % at most, and added up in float32 by a product with ones: adding
    up a token's features otherwise takes a TPU three times as long, modelled.
    """
    wide = x.astype(jnp.float32)
    squares = jnp.square(wide)
    if x.dtype == jnp.bfloat16:
        ones = jnp.ones((x.shape[-1], LANES), jnp.bfloat16)
        total = jnp.matmul(squares.astype(jnp.bfloat16), ones, preferred_element_type=jnp.float32)
        mean = total[..., :1] / x.shape[-1]
    else:
        mean = squares.mean(axis=-1, keepdims=True)
    scale = scales(norm).astype(jnp.float32)[None, None] * factor
    return wide * jax.lax.rsqrt(mean + norm.epsilon) * scale


def normed(x: jax.Array, epsilon: float) -> jax.Array:
    """Layer norm without parameters, over the last axis; float32 for any dtype. Both sums are taken in one pass."""
    x = x.astype(jnp.float32)
    mean = x.mean(axis=-1, keepdims=True)
    variance = jnp.maximum(jnp.square(x).mean(axis=-1, keepdims=True) - jnp.square(mean), 0)
    return (x - mean) * jax.lax.rsqrt(variance + epsilon)


def apart(x: jax.Array) -> jax.Array:
    """x [B, T, D], computed once, and laid out by tokens.

    XLA for TPU would compute a norm anew in each product that reads it, and lay a sum's results out by features.
    """
    return jax.lax.optimization_barrier(with_layout_constraint(x, Layout((0, 1, 2))))


class Rotation(NamedTuple):
    """Cosines and sines for each feature of a head, float32 [B or 1, T, H].

    Feature i becomes x[i] * cos[i] + x[j] * sin[i], with j the other feature of its pair. So the sines of first
    features are negative.
    """

    cos: jax.Array
    sin: jax.Array

    def part(self, first: int, end: int | None) -> "Rotation":
        """Of these tokens."""
        return Rotation(self.cos[:, first:end], self.sin[:, first:end])

    def own(self, index: jax.Array, tokens: int) -> "Rotation":
        """Of the part with this index, of parts with so many tokens each."""
        if tokens == self.cos.shape[1]:
            return self
        return Rotation(*(jax.lax.dynamic_slice_in_dim(table, index * tokens, tokens, axis=1) for table in self))


def rotation(positions: jax.Array, dims: Sequence[int], theta: float, *, halves: bool = False) -> Rotation:
    """Positions [B, T, A] -> rotations of heads of sum(dims) features (Su et al. 2021).

    Axis a turns dims[a] / 2 pairs, by its position times theta ** (-2i / dims[a]). A pair is two neighbours, as
    diffusers has it, or with `halves` a feature of each half, as transformers has it.
    """
    frequencies = [theta ** -(np.arange(0, features, 2) / features) for features in dims]
    axes = np.repeat(np.arange(len(dims)), [len(axis) for axis in frequencies])
    angles = positions.astype(jnp.float32)[..., axes] * np.concatenate(frequencies).astype(np.float32)[None, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if halves:
        return Rotation(jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1))
    size = 2 * cos.shape[-1]
    return Rotation(jnp.repeat(cos, 2, axis=-1), jnp.stack([-sin, sin], axis=-1).reshape(*sin.shape[:2], size))


def turned(x: jax.Array, scale: jax.Array, rotation: Rotation, epsilon: float, *, halves: bool = False) -> jax.Array:
    """Norms each head of x [B, T, N * H] by scales [H] and rotates it."""
    heads = rms_normed(x.reshape(*x.shape[:2], -1, len(scale)), scale, epsilon)
    return rotated(heads, rotation, halves=halves).reshape(x.shape)


def rotated(x: jax.Array, rotation: Rotation, *, halves: bool) -> jax.Array:
    """Rotates heads x [B, T, N, H] in float32.

    A product with a matrix of zeros and ones brings each feature its pair's other: TPUs take far longer over slices.
    """
    features = np.arange(x.shape[-1])
    other = (features + len(features) // 2) % len(features) if halves else features ^ 1
    swap = jnp.asarray(np.eye(len(features))[other], x.dtype)
    swapped = jnp.einsum(
        "btnh,hk->btnk", x, swap, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
    cos, sin = (table[:, :, None] for table in rotation)
    return (x.astype(jnp.float32) * cos + swapped * sin).astype(x.dtype)
