"""The blocks that UNet and VAE share. Attribute names are diffusers' tensor names; arrays are NHWC.

A feature map is [B, H, W, C], or [B * S, h, W, C] where images are cut into strips (app/diffusion/models/strips.py).

Named scopes say which part an operation is of, in profiles and in `make tpu-check`.
"""

import math
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint

from app.diffusion.models.attention import attend
from app.diffusion.models.strips import WHOLE, Strips, repeated, with_neighbours, with_zeros_around

Dtype = Any
Padding = tuple[tuple[int, int], tuple[int, int]]
FEW_PIXELS = 2048


class GroupNorm(nnx.GroupNorm):
    """Sums over each channel first, in float32, and then groups the sums.

    So the feature map itself is never laid out by groups, as XLA for TPU would do if it is joined from two.
    """

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """x [B, ..., C]."""
        assert mask is None
        return self.scaled(x, *self.statistics([x]))

    def statistics(self, parts: list[jax.Array], strips: Strips = WHOLE) -> tuple[jax.Array, jax.Array]:
        """Of parts [B * S, ..., C_i] joined to C channels: mean and 1 / deviation of each image's groups, at each of
        their channels, [B * S, ..., C]. Each part is summed by itself, beside what made it."""
        positions = tuple(range(1, parts[0].ndim - 1))
        wide = [part.astype(jnp.float32) for part in parts]

        def by_group(means: list[jax.Array]) -> jax.Array:
            """[B * S, C_i] -> the mean of each channel's group over its image, [B, C]."""
            count = strips.count
            groups = jnp.concatenate(means, axis=-1).reshape(len(means[0]) // count, count, self.num_groups, -1)
            mean = groups.mean((1, 3))[:, :, None]
            if strips.shards:
                mean = strips.shards.mean(mean)
            return jnp.broadcast_to(mean, (*mean.shape[:2], groups.shape[3])).reshape(len(mean), -1)

        mean = by_group([part.mean(positions) for part in wide])
        square = by_group([jnp.square(part).mean(positions) for part in wide])
        factor = jax.lax.rsqrt(jnp.maximum(square - jnp.square(mean), 0) + self.epsilon)
        mean, factor = (jnp.expand_dims(repeated(value, strips), positions) for value in (mean, factor))
        return mean, factor

    def scaled(self, x: jax.Array, mean: jax.Array, factor: jax.Array) -> jax.Array:
        assert self.scale is not None and self.bias is not None
        scale, bias = (jnp.expand_dims(value[...], tuple(range(x.ndim - 1))) for value in (self.scale, self.bias))
        return ((x.astype(jnp.float32) - mean) * (factor * scale) + bias).astype(self.dtype)


def group_norm(channels: int, groups: int, epsilon: float, *, dtype: Dtype, rngs: nnx.Rngs) -> GroupNorm:
    return GroupNorm(channels, groups, epsilon=epsilon, dtype=dtype, param_dtype=dtype, rngs=rngs)


def convolve(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Padding) -> jax.Array:
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


class Conv(nnx.Conv):
    """`padding` is ((top, bottom), (left, right)), none above 1."""

    def __call__(self, inputs: jax.Array, out_sharding: Any = None, *, strips: Strips = WHOLE) -> jax.Array:
        if strips.whole:
            return super().__call__(inputs, out_sharding)
        return self.between(with_zeros_around(with_neighbours(inputs, strips), strips))

    def between(self, x: jax.Array) -> jax.Array:
        """Convolves strips that include their neighbours' rows."""
        assert self.bias is not None
        (top, bottom), columns = cast(Padding, self.padding)
        strides, rows = cast(tuple[int, int], self.strides), (top - 1, bottom - 1)
        x = convolve(x, self.kernel[...], strides, (rows, columns))
        return x + self.bias[...][None, None, None]


def normed_conv(norm: GroupNorm, conv: Conv, parts: list[jax.Array], strips: Strips) -> jax.Array:
    """conv(silu(norm(x))), of x in parts.

    Strips get their neighbours before the norm and zeros after it: then XLA for TPU fuses all of it into the
    convolution.
    """
    x, statistics = jnp.concatenate(parts, axis=-1), norm.statistics(parts, strips)
    if strips.whole:
        return conv(jax.nn.silu(norm.scaled(x, *statistics)))
    x = jax.nn.silu(norm.scaled(with_neighbours(x, strips), *statistics))
    return conv.between(with_zeros_around(x, strips))


def conv(
    channels_in: int,
    channels_out: int,
    size: int = 3,
    *,
    strides: int = 1,
    padding: Padding | None = None,
    dtype: Dtype,
    rngs: nnx.Rngs,
) -> Conv:
    """The default padding keeps height and width at stride 1."""
    kernel, around = (size, size), ((size // 2, size // 2),) * 2
    return Conv(
        *(channels_in, channels_out, kernel),
        strides=(strides, strides),
        padding=padding or around,
        dtype=dtype,
        param_dtype=dtype,
        rngs=rngs,
    )


def linear(features_in: int, features_out: int, *, bias: bool = True, dtype: Dtype, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(features_in, features_out, use_bias=bias, dtype=dtype, param_dtype=dtype, rngs=rngs)


def timestep_embedding(timesteps: jax.Array, channels: int) -> jax.Array:
    """Sinusoids of timesteps [B], cosines first -> float32 [B, channels] (Ho et al. 2020; diffusers' Timesteps)."""
    half = channels // 2
    frequencies = jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimestepEmbedding(nnx.Module):
    """`condition_features` is the width of a condition that is added to the timesteps' sinusoids."""

    def __init__(
        self,
        channels: int,
        features: int,
        *,
        condition_features: int | None = None,
        bias: bool = True,
        dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        if condition_features is not None:
            self.cond_proj = linear(condition_features, channels, bias=False, dtype=dtype, rngs=rngs)
        self.linear_1 = linear(channels, features, bias=bias, dtype=dtype, rngs=rngs)
        self.linear_2 = linear(features, features, bias=bias, dtype=dtype, rngs=rngs)

    @jax.named_scope("time-embedding")
    def __call__(self, x: jax.Array, condition: jax.Array | None = None) -> jax.Array:
        if condition is not None:
            x = x + self.cond_proj(condition)
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


class ResnetBlock(nnx.Module):
    """ResnetBlock2D; without `time_features` it is the VAE's."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        *,
        groups: int,
        epsilon: float,
        time_features: int | None = None,
        dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        self.norm1 = group_norm(channels_in, groups, epsilon, dtype=dtype, rngs=rngs)
        self.conv1 = conv(channels_in, channels_out, dtype=dtype, rngs=rngs)
        if time_features is not None:
            self.time_emb_proj = linear(time_features, channels_out, dtype=dtype, rngs=rngs)
        self.norm2 = group_norm(channels_out, groups, epsilon, dtype=dtype, rngs=rngs)
        self.conv2 = conv(channels_out, channels_out, dtype=dtype, rngs=rngs)
        if channels_in != channels_out:
            self.conv_shortcut = conv(channels_in, channels_out, 1, dtype=dtype, rngs=rngs)

    @jax.named_scope("resnet")
    def __call__(
        self, x: jax.Array, time: jax.Array | None = None, skip: jax.Array | None = None, *, strips: Strips = WHOLE
    ) -> jax.Array:
        """`skip` is joined to x behind its channels; `time` is [B, features]."""
        parts = [x] if skip is None else [x, skip]
        x = jnp.concatenate(parts, axis=-1)
        residual = x
        if hasattr(self, "conv_shortcut"):
            residual = self.conv_shortcut(x)
            # XLA for TPU may fuse it into the last convolution if the map is small, at twenty times the cost.
            if strips.count * x.shape[1] * x.shape[2] < FEW_PIXELS:
                residual = jax.lax.optimization_barrier(residual)
        x = normed_conv(self.norm1, self.conv1, parts, strips)
        if time is not None:
            x = x + repeated(self.time_emb_proj(jax.nn.silu(time)), strips)[:, None, None, :]
        return residual + normed_conv(self.norm2, self.conv2, [x], strips)


class Downsample(nnx.Module):
    """Halves height and width. `padding` is ((top, bottom), (left, right)): the UNet's is even, the VAE's is not."""

    def __init__(self, channels: int, padding: Padding, *, dtype: Dtype, rngs: nnx.Rngs):
        self.conv = conv(channels, channels, strides=2, padding=padding, dtype=dtype, rngs=rngs)

    @jax.named_scope("resampling")
    def __call__(self, x: jax.Array, *, strips: Strips = WHOLE) -> jax.Array:
        return self.conv(x, strips=strips)


class Upsample(nnx.Module):
    """Doubles height and width by repeating pixels, then smooths.

    Rows are not actually repeated. Of three rows under the kernel two are equal, so their taps are added, and the even
    and the odd rows of the result are two convolutions of 2x3. That saves a third of the products. The same over
    columns would save as much again, but costs more in data movement.
    """

    def __init__(self, channels: int, *, dtype: Dtype, rngs: nnx.Rngs):
        self.conv = conv(channels, channels, dtype=dtype, rngs=rngs)

    @jax.named_scope("resampling")
    def __call__(self, x: jax.Array, *, strips: Strips = WHOLE) -> jax.Array:
        assert self.conv.bias is not None
        rows, height, width, channels = x.shape
        x = jnp.broadcast_to(x[:, :, :, None], (rows, height, width, 2, channels))
        x = x.reshape(rows, height, 2 * width, channels)
        around = 1  # rows of zeros, above and below
        if not strips.whole:
            x, around = with_zeros_around(with_neighbours(x, strips), strips), 0
        above, middle, below = jnp.split(self.conv.kernel[...], 3)

        def smooth(taps: list[jax.Array], padding: tuple[int, int]) -> jax.Array:
            return convolve(x, jnp.concatenate(taps), (1, 1), (padding, (1, 1)))

        even = smooth([above, middle + below], (around, around - 1))
        odd = smooth([above + middle, below], (around - 1, around))
        x = jnp.stack([even, odd], axis=2).reshape(rows, 2 * height, 2 * width, channels)
        x = x + self.conv.bias[...][None, None, None]
        # By default XLA for TPU lays this out by rows, and again for each of the convolutions that follow.
        return x if strips.whole else with_layout_constraint(x, Layout((1, 2, 0, 3)))


class Attention(nnx.Module):
    """Self-attention, or cross-attention where a context is given. Queries, keys and values have no bias."""

    def __init__(self, channels: int, context_features: int, heads: int, *, dtype: Dtype, rngs: nnx.Rngs):
        self.heads = heads
        self.to_q = linear(channels, channels, bias=False, dtype=dtype, rngs=rngs)
        self.to_k = linear(context_features, channels, bias=False, dtype=dtype, rngs=rngs)
        self.to_v = linear(context_features, channels, bias=False, dtype=dtype, rngs=rngs)
        self.to_out = nnx.List([linear(channels, channels, dtype=dtype, rngs=rngs)])

    def __call__(self, x: jax.Array, context: jax.Array | None = None) -> jax.Array:
        with jax.named_scope("self-attention" if context is None else "cross-attention"):
            context = x if context is None else context
            x = attend(self.to_q(x), self.to_k(context), self.to_v(context), self.heads)
            return self.to_out[0](x)


class GEGLU(nnx.Module):
    """Gated GELU (Shazeer 2020), exact as in PyTorch. In bfloat16 it is the tanh approximation, whose error is below
    bfloat16's rounding.

    The projection's two halves are two products, so that the gating is fused into the second one and the first one's
    result is half as wide.
    """

    def __init__(self, features_in: int, features_out: int, *, dtype: Dtype, rngs: nnx.Rngs):
        self.proj = linear(features_in, 2 * features_out, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        assert self.proj.bias is not None
        kernels = jnp.split(self.proj.kernel[...], 2, axis=-1)
        biases = jnp.split(self.proj.bias[...], 2)
        x, gate = (x @ kernel + bias[None, None] for kernel, bias in zip(kernels, biases, strict=True))
        return x * jax.nn.gelu(gate, approximate=gate.dtype == jnp.bfloat16)


class FeedForward(nnx.Module):
    def __init__(self, channels: int, *, dtype: Dtype, rngs: nnx.Rngs):
        # The checkpoint counts a dropout between the two: `net.0.proj` and `net.2`.
        self.net = nnx.List(
            [
                GEGLU(channels, 4 * channels, dtype=dtype, rngs=rngs),
                nnx.Dropout(0.0),
                linear(4 * channels, channels, dtype=dtype, rngs=rngs),
            ]
        )

    @jax.named_scope("feed-forward")
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.net[2](self.net[0](x))


class TransformerBlock(nnx.Module):
    """BasicTransformerBlock: self-attention, cross-attention, feed-forward, each behind its norm."""

    def __init__(self, channels: int, context_features: int, heads: int, *, dtype: Dtype, rngs: nnx.Rngs):
        def norm() -> nnx.LayerNorm:
            return nnx.LayerNorm(channels, epsilon=1e-5, dtype=dtype, param_dtype=dtype, rngs=rngs)

        self.norm1 = norm()
        self.attn1 = Attention(channels, channels, heads, dtype=dtype, rngs=rngs)
        self.norm2 = norm()
        self.attn2 = Attention(channels, context_features, heads, dtype=dtype, rngs=rngs)
        self.norm3 = norm()
        self.ff = FeedForward(channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        x = x + self.ff(self.norm3(x))
        return x


class Transformer2D(nnx.Module):
    """Transformer2DModel over the pixels of a feature map. SD 1.x's 1x1 convolutions are linear layers here."""

    def __init__(
        self,
        channels: int,
        context_features: int,
        heads: int,
        groups: int,
        *,
        layers: int = 1,
        dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        self.norm = group_norm(channels, groups, 1e-6, dtype=dtype, rngs=rngs)
        self.proj_in = linear(channels, channels, dtype=dtype, rngs=rngs)
        self.transformer_blocks = nnx.List(
            TransformerBlock(channels, context_features, heads, dtype=dtype, rngs=rngs) for _ in range(layers)
        )
        self.proj_out = linear(channels, channels, dtype=dtype, rngs=rngs)

    @jax.named_scope("transformer")
    def __call__(self, x: jax.Array, context: jax.Array, *, strips: Strips = WHOLE) -> jax.Array:
        shape = x.shape
        x = x.reshape(len(x) // strips.count, -1, shape[-1])
        residual = x
        x = self.proj_in(self.norm(x))
        for block in self.transformer_blocks:
            x = block(x, context)
        # By default XLA for TPU keeps pixels minor, as attention has them, and transposes them in separate passes.
        x = with_layout_constraint(self.proj_out(x), Layout((0, 1, 2)))
        return (residual + x).reshape(shape)
