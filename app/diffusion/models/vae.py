"""AutoencoderKL: pixels in [-1, 1] <-> latents. Attribute names are diffusers' tensor names."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx

from app.diffusion.models.attention import attend
from app.diffusion.models.config import VAEConfig
from app.diffusion.models.layers import (
    Downsample,
    Dtype,
    ResnetBlock,
    Upsample,
    conv,
    group_norm,
    linear,
    normed_conv,
)
from app.diffusion.models.strips import WHOLE, Strips, cut, joined

EPSILON = 1e-6


class AttentionBlock(nnx.Module):
    """Single-head self-attention over pixels, with biases and a group norm of its own."""

    def __init__(self, channels: int, groups: int, *, dtype: Dtype, rngs: nnx.Rngs):
        self.group_norm = group_norm(channels, groups, EPSILON, dtype=dtype, rngs=rngs)
        self.to_q = linear(channels, channels, dtype=dtype, rngs=rngs)
        self.to_k = linear(channels, channels, dtype=dtype, rngs=rngs)
        self.to_v = linear(channels, channels, dtype=dtype, rngs=rngs)
        self.to_out = nnx.List([linear(channels, channels, dtype=dtype, rngs=rngs)])

    @jax.named_scope("self-attention")
    def __call__(self, x: jax.Array, *, strips: Strips = WHOLE) -> jax.Array:
        residual = x
        x = x.reshape(len(x) // strips.count, -1, x.shape[-1])
        x = self.group_norm.scaled(x, *self.group_norm.statistics([x], replace(strips, count=1)))
        k, v = self.to_k(x), self.to_v(x)
        if strips.shards:
            k, v = strips.shards.gathered(k), strips.shards.gathered(v)
        x = attend(self.to_q(x), k, v, heads=1)
        return residual + self.to_out[0](x).reshape(residual.shape)


class MidBlock(nnx.Module):
    def __init__(self, channels: int, config: VAEConfig, *, dtype: Dtype, rngs: nnx.Rngs):
        groups = config.norm_num_groups
        self.resnets = nnx.List(
            ResnetBlock(channels, channels, groups=groups, epsilon=EPSILON, dtype=dtype, rngs=rngs) for _ in range(2)
        )
        if config.mid_block_add_attention:
            self.attentions = nnx.List([AttentionBlock(channels, groups, dtype=dtype, rngs=rngs)])

    def __call__(self, x: jax.Array, *, strips: Strips = WHOLE) -> jax.Array:
        x = self.resnets[0](x, strips=strips)
        if hasattr(self, "attentions"):
            x = self.attentions[0](x, strips=strips)
        return self.resnets[1](x, strips=strips)


class Block(nnx.Module):
    """One level: `layers` resnets, then a resampler where there is a next level."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        layers: int,
        groups: int,
        *,
        downsample: bool = False,
        upsample: bool = False,
        dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        self.resnets = nnx.List(
            ResnetBlock(
                channels_in if i == 0 else channels_out,
                channels_out,
                groups=groups,
                epsilon=EPSILON,
                dtype=dtype,
                rngs=rngs,
            )
            for i in range(layers)
        )
        if downsample:
            self.downsamplers = nnx.List([Downsample(channels_out, ((0, 1), (0, 1)), dtype=dtype, rngs=rngs)])
        if upsample:
            self.upsamplers = nnx.List([Upsample(channels_out, dtype=dtype, rngs=rngs)])

    def __call__(self, x: jax.Array, *, strips: Strips = WHOLE) -> jax.Array:
        for resnet in self.resnets:
            x = resnet(x, strips=strips)
        if hasattr(self, "downsamplers"):
            x = self.downsamplers[0](x, strips=strips)
        if hasattr(self, "upsamplers"):
            x = self.upsamplers[0](x, strips=strips)
        return x


class Encoder(nnx.Module):
    def __init__(self, config: VAEConfig, *, dtype: Dtype, rngs: nnx.Rngs):
        channels, last, groups = config.block_out_channels, len(config.block_out_channels) - 1, config.norm_num_groups
        self.conv_in = conv(config.in_channels, channels[0], dtype=dtype, rngs=rngs)
        self.down_blocks = nnx.List(
            Block(
                channels[max(i - 1, 0)],
                channels[i],
                config.layers_per_block,
                groups,
                downsample=i < last,
                dtype=dtype,
                rngs=rngs,
            )
            for i in range(len(channels))
        )
        self.mid_block = MidBlock(channels[-1], config, dtype=dtype, rngs=rngs)
        self.conv_norm_out = group_norm(channels[-1], groups, EPSILON, dtype=dtype, rngs=rngs)
        self.conv_out = conv(channels[-1], 2 * config.latent_channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, *, strips: Strips) -> jax.Array:
        x = self.conv_in(x, strips=strips)
        for block in self.down_blocks:
            x = block(x, strips=strips)
        x = self.mid_block(x, strips=strips)
        return normed_conv(self.conv_norm_out, self.conv_out, [x], strips)


class Decoder(nnx.Module):
    def __init__(self, config: VAEConfig, *, dtype: Dtype, rngs: nnx.Rngs):
        channels = config.block_out_channels[::-1]
        last, groups = len(channels) - 1, config.norm_num_groups
        self.conv_in = conv(config.latent_channels, channels[0], dtype=dtype, rngs=rngs)
        self.mid_block = MidBlock(channels[0], config, dtype=dtype, rngs=rngs)
        self.up_blocks = nnx.List(
            Block(
                channels[max(i - 1, 0)],
                channels[i],
                config.layers_per_block + 1,
                groups,
                upsample=i < last,
                dtype=dtype,
                rngs=rngs,
            )
            for i in range(len(channels))
        )
        self.conv_norm_out = group_norm(channels[-1], groups, EPSILON, dtype=dtype, rngs=rngs)
        self.conv_out = conv(channels[-1], config.out_channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, *, strips: Strips) -> jax.Array:
        x = self.conv_in(x, strips=strips)
        x = self.mid_block(x, strips=strips)
        for block in self.up_blocks:
            x = block(x, strips=strips)
        return normed_conv(self.conv_norm_out, self.conv_out, [x], strips)


class VAE(nnx.Module):
    def __init__(self, config: VAEConfig, *, dtype: Dtype = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.dtype = dtype
        if config.encoder:
            self.encoder = Encoder(config, dtype=dtype, rngs=rngs)
        self.decoder = Decoder(config, dtype=dtype, rngs=rngs)
        if config.encoder and config.use_quant_conv:
            self.quant_conv = conv(2 * config.latent_channels, 2 * config.latent_channels, 1, dtype=dtype, rngs=rngs)
        if config.use_post_quant_conv:
            self.post_quant_conv = conv(config.latent_channels, config.latent_channels, 1, dtype=dtype, rngs=rngs)

    def encode(self, pixels: jax.Array, *, strips: Strips = WHOLE) -> tuple[jax.Array, jax.Array]:
        """Pixels [B, H, W, 3] in [-1, 1] -> mean and log-variance [B, h, w, C] of unscaled latents.

        h must be a multiple of the strips, as in `decode`.
        """
        x = self.encoder(cut(pixels.astype(self.dtype), strips), strips=strips)
        if hasattr(self, "quant_conv"):
            x = self.quant_conv(x)
        mean, log_variance = jnp.split(joined(x, strips), 2, axis=-1)
        return mean, jnp.clip(log_variance, -30.0, 20.0)

    def posterior(self, pixels: jax.Array, *, strips: Strips = WHOLE) -> tuple[jax.Array, jax.Array]:
        """Pixels [B, H, W, 3] in [-1, 1] -> float32 mean and deviation [B, h, w, C] of scaled latents."""
        mean, log_variance = (x.astype(jnp.float32) for x in self.encode(pixels, strips=strips))
        scaling_factor = self.config.scaling_factor
        return (mean - self.config.shift_factor) * scaling_factor, jnp.exp(log_variance / 2) * scaling_factor

    def decode(self, latents: jax.Array, *, strips: Strips = WHOLE) -> jax.Array:
        """Scaled latents [B, h, w, C], as the denoiser knows them -> pixels [B, H, W, 3] around [-1, 1].

        h must be a multiple of the strips, which change how long it takes on a TPU, and nothing else.
        """
        x = cut((latents / self.config.scaling_factor + self.config.shift_factor).astype(self.dtype), strips)
        if hasattr(self, "post_quant_conv"):
            x = self.post_quant_conv(x)
        return joined(self.decoder(x, strips=strips), strips)
