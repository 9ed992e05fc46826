"""UNet2DConditionModel of Stable Diffusion 1.x, 2.x and XL. Attribute names are diffusers' tensor names."""

import jax
import jax.numpy as jnp
from flax import nnx

from app.diffusion.models.config import UNetConfig
from app.diffusion.models.layers import (
    Downsample,
    Dtype,
    ResnetBlock,
    TimestepEmbedding,
    Transformer2D,
    Upsample,
    conv,
    group_norm,
    normed_conv,
    timestep_embedding,
)
from app.diffusion.models.strips import WHOLE, Strips, cut, joined


def resnet(channels_in: int, channels_out: int, config: UNetConfig, *, dtype: Dtype, rngs: nnx.Rngs) -> ResnetBlock:
    return ResnetBlock(
        channels_in,
        channels_out,
        groups=config.norm_num_groups,
        epsilon=config.norm_eps,
        time_features=4 * config.block_out_channels[0],
        dtype=dtype,
        rngs=rngs,
    )


def transformer(level: int, config: UNetConfig, *, dtype: Dtype, rngs: nnx.Rngs) -> Transformer2D:
    return Transformer2D(
        config.block_out_channels[level],
        config.cross_attention_dim,
        config.attention_heads[level],
        config.norm_num_groups,
        layers=config.transformer_layers[level],
        dtype=dtype,
        rngs=rngs,
    )


class Block(nnx.Module):
    """One level of the UNet on its way down or up: resnets, an attention behind each (or none), then a resampler."""

    def __init__(
        self,
        channels_in: list[int],
        level: int,
        config: UNetConfig,
        *,
        attention: bool,
        downsample: bool = False,
        upsample: bool = False,
        dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        channels_out = config.block_out_channels[level]
        self.resnets = nnx.List(
            resnet(channels, channels_out, config, dtype=dtype, rngs=rngs) for channels in channels_in
        )
        if attention:
            self.attentions = nnx.List(transformer(level, config, dtype=dtype, rngs=rngs) for _ in channels_in)
        if downsample:
            self.downsamplers = nnx.List([Downsample(channels_out, ((1, 1), (1, 1)), dtype=dtype, rngs=rngs)])
        if upsample:
            self.upsamplers = nnx.List([Upsample(channels_out, dtype=dtype, rngs=rngs)])

    def layer(
        self,
        i: int,
        x: jax.Array,
        time: jax.Array,
        context: jax.Array,
        skip: jax.Array | None = None,
        *,
        strips: Strips,
    ) -> jax.Array:
        x = self.resnets[i](x, time, skip, strips=strips)
        return self.attentions[i](x, context, strips=strips) if hasattr(self, "attentions") else x


class MidBlock(nnx.Module):
    def __init__(self, config: UNetConfig, *, dtype: Dtype, rngs: nnx.Rngs):
        channels = config.block_out_channels[-1]
        self.resnets = nnx.List(resnet(channels, channels, config, dtype=dtype, rngs=rngs) for _ in range(2))
        self.attentions = nnx.List([transformer(-1, config, dtype=dtype, rngs=rngs)])

    def __call__(self, x: jax.Array, time: jax.Array, context: jax.Array, *, strips: Strips) -> jax.Array:
        x = self.resnets[0](x, time, strips=strips)
        x = self.attentions[0](x, context, strips=strips)
        return self.resnets[1](x, time, strips=strips)


class UNet(nnx.Module):
    """Predicts the noise (or the velocity) in latents, given the model clock and the prompt's embeddings."""

    def __init__(self, config: UNetConfig, *, dtype: Dtype = jnp.float32, rngs: nnx.Rngs):
        channels, last = config.block_out_channels, len(config.block_out_channels) - 1
        self.config = config
        self.dtype = dtype
        self.conv_in = conv(config.in_channels, channels[0], dtype=dtype, rngs=rngs)
        self.time_embedding = TimestepEmbedding(
            channels[0],
            4 * channels[0],
            condition_features=config.guidance_features,
            dtype=dtype,
            rngs=rngs,
        )
        if config.added_features is not None:
            self.add_embedding = TimestepEmbedding(config.added_features, 4 * channels[0], dtype=dtype, rngs=rngs)

        skips = [channels[0]]
        down_blocks = []
        for i, kind in enumerate(config.down_block_types):
            channels_in = [channels[max(i - 1, 0)]] + [channels[i]] * (config.layers_per_block - 1)
            down_blocks.append(
                Block(
                    channels_in,
                    i,
                    config,
                    attention=kind.startswith("CrossAttn"),
                    downsample=i < last,
                    dtype=dtype,
                    rngs=rngs,
                )
            )
            skips += [channels[i]] * (config.layers_per_block + (i < last))
        self.down_blocks = nnx.List(down_blocks)

        self.mid_block = MidBlock(config, dtype=dtype, rngs=rngs)

        up_blocks = []
        current = channels[-1]
        for i, kind in enumerate(config.up_block_types):
            level = last - i
            channels_in = []
            for _ in range(config.layers_per_block + 1):
                channels_in.append(current + skips.pop())
                current = channels[level]
            up_blocks.append(
                Block(
                    channels_in,
                    level,
                    config,
                    attention=kind.startswith("CrossAttn"),
                    upsample=i < last,
                    dtype=dtype,
                    rngs=rngs,
                )
            )
        self.up_blocks = nnx.List(up_blocks)

        self.conv_norm_out = group_norm(channels[0], config.norm_num_groups, config.norm_eps, dtype=dtype, rngs=rngs)
        self.conv_out = conv(channels[0], config.out_channels, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        timesteps: jax.Array,
        prompt_embeds: jax.Array,
        text_embeds: jax.Array | None = None,
        time_ids: jax.Array | None = None,
        guidance: jax.Array | None = None,
        *,
        strips: Strips = WHOLE,
    ) -> jax.Array:
        """Latents [B, H, W, C], timesteps [B] and embeddings [B, T, D] -> output [B, H, W, C] in `dtype`.

        SDXL's also takes the pooled text [B, P] and the size numbers [B, 6], a distilled one's the embedded guidance
        scale [B, G].
        H and W must be multiples of 2 ** (levels - 1), and H of the number of strips times that. Strips change how long
        it takes on a TPU, and nothing else.
        """
        time = timestep_embedding(timesteps, self.config.block_out_channels[0]).astype(self.dtype)
        time = self.time_embedding(time, guidance)
        if text_embeds is not None and time_ids is not None:
            time = time + self.embed_added(text_embeds, time_ids)
        x = self.conv_in(cut(x.astype(self.dtype), strips), strips=strips)

        skips = [x]
        for block in self.down_blocks:
            for i in range(len(block.resnets)):
                x = block.layer(i, x, time, prompt_embeds, strips=strips)
                skips.append(x)
            if hasattr(block, "downsamplers"):
                x = block.downsamplers[0](x, strips=strips)
                skips.append(x)

        x = self.mid_block(x, time, prompt_embeds, strips=strips)

        for block in self.up_blocks:
            for i in range(len(block.resnets)):
                x = block.layer(i, x, time, prompt_embeds, skips.pop(), strips=strips)
            if hasattr(block, "upsamplers"):
                x = block.upsamplers[0](x, strips=strips)

        return joined(normed_conv(self.conv_norm_out, self.conv_out, [x], strips), strips)

    def embed_added(self, text_embeds: jax.Array, time_ids: jax.Array) -> jax.Array:
        """Podell et al. 2023, section 2.2: what the UNet is told of the picture's size, beside the pooled text."""
        assert self.config.size_features is not None
        sizes = timestep_embedding(time_ids.reshape(-1), self.config.size_features).reshape(len(time_ids), -1)
        return self.add_embedding(jnp.concatenate([text_embeds, sizes.astype(self.dtype)], axis=-1))
