"""ZImageTransformer2DModel. Attribute names are diffusers' tensor names."""

import jax
import jax.numpy as jnp
from flax import nnx

from app.diffusion.models.flow_config import ZImageConfig
from app.diffusion.models.layers import Dtype, linear, timestep_embedding
from app.diffusion.models.rotary_attention import Stream, attend_streams
from app.diffusion.models.transformer_layers import Rotation, apart, normed, rms_norm, rms_scaled, rotation, scales

TIME_CHANNELS = 256  # of the timestep's sinusoids, and at most of its embedding
TIME_WIDTH = 1024
MULTIPLE = 32  # text and image are padded, by learned tokens, to multiples of so many tokens
QK_EPSILON = 1e-5
FINAL_EPSILON = 1e-6
PATCH = "2-1"  # 2x2 latents of one frame: the only size of patches that is published


class SelfAttention(nnx.Module):
    def __init__(self, config: ZImageConfig, *, dtype: Dtype, rngs: nnx.Rngs):
        self.heads = config.n_heads

        def project() -> nnx.Linear:
            return linear(config.dim, config.dim, bias=False, dtype=dtype, rngs=rngs)

        self.to_q, self.to_k, self.to_v = project(), project(), project()
        self.norm_q = rms_norm(config.head_dim, QK_EPSILON, dtype=dtype, rngs=rngs)
        self.norm_k = rms_norm(config.head_dim, QK_EPSILON, dtype=dtype, rngs=rngs)
        self.to_out = nnx.List([project()])

    @jax.named_scope("self-attention")
    def __call__(self, x: jax.Array, rotation: Rotation, lengths: jax.Array | None) -> jax.Array:
        projected = (self.to_q(x), self.to_k(x), self.to_v(x))
        stream = Stream(*projected, scales(self.norm_q), scales(self.norm_k), rotation)
        [x] = attend_streams([stream], self.heads, QK_EPSILON, lengths=lengths)
        return self.to_out[0](x)


class FeedForward(nnx.Module):
    """Gated SiLU (Shazeer 2020)."""

    def __init__(self, config: ZImageConfig, *, dtype: Dtype, rngs: nnx.Rngs):
        self.w1 = linear(config.dim, config.mlp_width, bias=False, dtype=dtype, rngs=rngs)
        self.w2 = linear(config.mlp_width, config.dim, bias=False, dtype=dtype, rngs=rngs)
        self.w3 = linear(config.dim, config.mlp_width, bias=False, dtype=dtype, rngs=rngs)

    @jax.named_scope("feed-forward")
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.w2(apart(jax.nn.silu(self.w1(x)) * self.w3(x)))


class Block(nnx.Module):
    """ZImageTransformerBlock: norms before and behind each layer, scaled and gated by the timestep if there is one."""

    def __init__(self, config: ZImageConfig, *, modulation: bool, dtype: Dtype, rngs: nnx.Rngs):
        def norm() -> nnx.RMSNorm:
            return rms_norm(config.dim, config.norm_eps, dtype=dtype, rngs=rngs)

        self.attention = SelfAttention(config, dtype=dtype, rngs=rngs)
        self.feed_forward = FeedForward(config, dtype=dtype, rngs=rngs)
        self.attention_norm1, self.attention_norm2 = norm(), norm()
        self.ffn_norm1, self.ffn_norm2 = norm(), norm()
        if modulation:
            self.adaLN_modulation = nnx.List([linear(config.time_width, 4 * config.dim, dtype=dtype, rngs=rngs)])

    @jax.named_scope("block")
    def __call__(
        self, x: jax.Array, rotation: Rotation, lengths: jax.Array | None = None, time: jax.Array | None = None
    ) -> jax.Array:
        """x [B, T, D]; only the first lengths [B] tokens are attended to. `time` is the timestep's embedding [B, E]."""
        scale = gate = mlp_scale = mlp_gate = jnp.ones((1, 1, 1))
        if time is not None:
            modulation = self.adaLN_modulation[0](time).astype(jnp.float32)[:, None]
            scale, gate, mlp_scale, mlp_gate = jnp.split(modulation, 4, axis=-1)
            scale, mlp_scale = 1 + scale, 1 + mlp_scale
            gate, mlp_gate = jnp.tanh(gate), jnp.tanh(mlp_gate)
        out = self.attention(apart(rms_scaled(x, self.attention_norm1, scale).astype(x.dtype)), rotation, lengths)
        x = plus(x, rms_scaled(apart(out), self.attention_norm2, gate))
        out = self.feed_forward(apart(rms_scaled(x, self.ffn_norm1, mlp_scale).astype(x.dtype)))
        return plus(x, rms_scaled(apart(out), self.ffn_norm2, mlp_gate))


def plus(x: jax.Array, wide: jax.Array) -> jax.Array:
    return apart((x.astype(jnp.float32) + wide).astype(x.dtype))


class TimeEmbedding(nnx.Module):
    def __init__(self, config: ZImageConfig, *, dtype: Dtype, rngs: nnx.Rngs):
        self.mlp = nnx.Dict(
            {
                "0": linear(TIME_CHANNELS, TIME_WIDTH, dtype=dtype, rngs=rngs),
                "2": linear(TIME_WIDTH, config.time_width, dtype=dtype, rngs=rngs),
            }
        )

    @jax.named_scope("time-embedding")
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.mlp["2"](jax.nn.silu(self.mlp["0"](x)))


class FinalLayer(nnx.Module):
    def __init__(self, config: ZImageConfig, *, dtype: Dtype, rngs: nnx.Rngs):
        self.adaLN_modulation = nnx.Dict({"1": linear(config.time_width, config.dim, dtype=dtype, rngs=rngs)})
        self.linear = linear(config.dim, config.patch_channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
        scale = 1 + self.adaLN_modulation["1"](jax.nn.silu(time)).astype(jnp.float32)[:, None]
        return self.linear((normed(x, FINAL_EPSILON) * scale).astype(x.dtype))


class ZImage(nnx.Module):
    """Predicts the negative velocity of latents: the clock runs from 0, noise, to 1, the image."""

    def __init__(self, config: ZImageConfig, *, dtype: Dtype = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.dtype = dtype

        def blocks(count: int, *, modulation: bool) -> nnx.List[Block]:
            return nnx.List(Block(config, modulation=modulation, dtype=dtype, rngs=rngs) for _ in range(count))

        self.all_x_embedder = nnx.Dict({PATCH: linear(config.patch_channels, config.dim, dtype=dtype, rngs=rngs)})
        self.x_pad_token = nnx.Param(jnp.zeros((1, config.dim), dtype))
        self.noise_refiner = blocks(config.n_refiner_layers, modulation=True)
        self.cap_embedder = nnx.List(
            [
                rms_norm(config.cap_feat_dim, config.norm_eps, dtype=dtype, rngs=rngs),
                linear(config.cap_feat_dim, config.dim, dtype=dtype, rngs=rngs),
            ]
        )
        self.cap_pad_token = nnx.Param(jnp.zeros((1, config.dim), dtype))
        self.context_refiner = blocks(config.n_refiner_layers, modulation=False)
        self.t_embedder = TimeEmbedding(config, dtype=dtype, rngs=rngs)
        self.layers = blocks(config.n_layers, modulation=True)
        self.all_final_layer = nnx.Dict({PATCH: FinalLayer(config, dtype=dtype, rngs=rngs)})

    def __call__(self, x: jax.Array, clock: jax.Array, prompt_embeds: jax.Array, lengths: jax.Array) -> jax.Array:
        """Latents [B, h, w, C], clock [B] and embeddings [B, T, D] -> negative velocity [B, h, w, C].

        The first lengths [B] of the embeddings are text. T must be a multiple of 32, h and w of 2.
        """
        rows, height, width, _ = x.shape
        text_length = -(-lengths // MULTIPLE) * MULTIPLE
        time = timestep_embedding(clock * self.config.t_scale, TIME_CHANNELS).astype(self.dtype)
        time = self.t_embedder(time)
        image_rotation, text_rotation = self.rotations(height // 2, width // 2, prompt_embeds.shape[1], text_length)

        image = self.all_x_embedder[PATCH](patches(x.astype(self.dtype)))
        tokens = image.shape[1]
        padding = jnp.broadcast_to(self.x_pad_token[...][None], (rows, -tokens % MULTIPLE, self.config.dim))
        image = jnp.concatenate([image, padding], axis=1)
        for block in self.noise_refiner:
            image = block(image, image_rotation, time=time)

        norm, embed = self.cap_embedder
        text = embed(norm(prompt_embeds.astype(self.dtype)))
        is_text = jnp.arange(text.shape[1])[None, :, None] < lengths[:, None, None]
        text = jnp.where(is_text, text, self.cap_pad_token[...][None])
        for block in self.context_refiner:
            text = block(text, text_rotation, text_length)

        joined = jnp.concatenate([image, text], axis=1)
        both = Rotation(
            *(jnp.concatenate(tables, axis=1) for tables in zip(image_rotation, text_rotation, strict=True))
        )
        for block in self.layers:
            joined = block(joined, both, image.shape[1] + text_length, time)

        out = self.all_final_layer[PATCH](joined[:, :tokens], time)
        return from_patches(out, height, width)

    def rotations(self, height: int, width: int, tokens: int, text_length: jax.Array) -> tuple[Rotation, Rotation]:
        """Of image patches, padded, and of text. Axes: place in the text, row, column. Text has places from 1, and
        the image stands at the place behind its text and padding."""
        rows, columns = (grid.reshape(-1) for grid in jnp.mgrid[:height, :width])
        place = jnp.broadcast_to(text_length[:, None] + 1, (len(text_length), len(rows)))
        grid = [jnp.broadcast_to(axis[None], place.shape) for axis in (rows, columns)]
        image = jnp.pad(jnp.stack([place, *grid], axis=-1), ((0, 0), (0, -len(rows) % MULTIPLE), (0, 0)))
        text = jnp.zeros((len(text_length), tokens, 3), jnp.int32).at[:, :, 0].set(jnp.arange(1, tokens + 1)[None])
        theta = self.config.rope_theta
        return rotation(image, self.config.axes_dims, theta), rotation(text, self.config.axes_dims, theta)


def patches(x: jax.Array) -> jax.Array:
    """[B, h, w, C] -> patches of 2x2, [B, h / 2 * w / 2, 4 * C]."""
    rows, height, width, channels = x.shape
    x = x.reshape(rows, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(rows, -1, 4 * channels)


def from_patches(x: jax.Array, height: int, width: int) -> jax.Array:
    """The reverse of `patches`."""
    x = x.reshape(len(x), height // 2, width // 2, 2, 2, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(len(x), height, width, -1)
