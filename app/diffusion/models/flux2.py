"""Flux2Transformer2DModel as FLUX.2-klein has it. Attribute names are diffusers' tensor names."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from app.diffusion.models.flow_config import Flux2Config
from app.diffusion.models.flux2_positions import image_positions, text_positions, with_references
from app.diffusion.models.image_shards import ImageShards
from app.diffusion.models.layers import Dtype, TimestepEmbedding, linear, timestep_embedding
from app.diffusion.models.references import References
from app.diffusion.models.rotary_attention import Keys, Stream, attend_streams
from app.diffusion.models.transformer_layers import Rotation, apart, normed, rms_norm, rotation, scales

Modulation = Sequence[jax.Array]  # shift, scale and gate, each float32 [B, 1, D]


def modulated(x: jax.Array, shift: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """Layer norm, scaled and shifted."""
    return apart((normed(x, epsilon) * (1 + scale) + shift).astype(x.dtype))


def joined(streams: list[jax.Array]) -> jax.Array:
    """Tokens [B, T, D], one part behind the other."""
    return jnp.concatenate(streams, axis=1)


def product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Summed and left in float32."""
    return jnp.matmul(x, weight, preferred_element_type=jnp.float32)


def gated(x: jax.Array, gate: jax.Array) -> jax.Array:
    return (x.astype(jnp.float32) * gate).astype(x.dtype)


def swiglu(x: jax.Array, gate: jax.Array, up: jax.Array) -> jax.Array:
    """x @ up, gated by SiLU of x @ gate (Shazeer 2020).

    As two products, so that XLA for TPU gates within the second; and not within the product that reads the result.
    """
    return apart(jax.nn.silu(x @ gate) * (x @ up))


class SharedModulation(nnx.Module):
    """Flux2Modulation: from the timestep's embedding, `sets` times shift, scale and gate for all blocks of a kind."""

    def __init__(self, width: int, sets: int, *, dtype: Dtype, rngs: nnx.Rngs):
        self.sets = sets
        self.linear = linear(width, 3 * sets * width, bias=False, dtype=dtype, rngs=rngs)

    @jax.named_scope("modulation")
    def __call__(self, time: jax.Array) -> list[Modulation]:
        parts = jnp.split(self.linear(jax.nn.silu(time)).astype(jnp.float32)[:, None], 3 * self.sets, axis=-1)
        return [parts[i : i + 3] for i in range(0, len(parts), 3)]


class TimeEmbedding(nnx.Module):
    def __init__(self, config: Flux2Config, *, dtype: Dtype, rngs: nnx.Rngs):
        self.timestep_embedder = TimestepEmbedding(
            config.timestep_guidance_channels, config.width, bias=False, dtype=dtype, rngs=rngs
        )


class JointAttention(nnx.Module):
    """Flux2Attention: text and image have their own projections and attend to both."""

    def __init__(self, config: Flux2Config, *, dtype: Dtype, rngs: nnx.Rngs):
        self.heads, self.epsilon = config.num_attention_heads, config.eps

        def project() -> nnx.Linear:
            return linear(config.width, config.width, bias=False, dtype=dtype, rngs=rngs)

        def norm() -> nnx.RMSNorm:
            return rms_norm(config.attention_head_dim, config.eps, dtype=dtype, rngs=rngs)

        self.to_q, self.to_k, self.to_v = project(), project(), project()
        self.norm_q, self.norm_k = norm(), norm()
        self.to_out = nnx.List([project()])
        self.add_q_proj, self.add_k_proj, self.add_v_proj = project(), project(), project()
        self.norm_added_q, self.norm_added_k = norm(), norm()
        self.to_add_out = project()

    @jax.named_scope("self-attention")
    def __call__(
        self, text: jax.Array, image: jax.Array, rotations: tuple[Rotation, Rotation], keys: Keys
    ) -> tuple[jax.Array, jax.Array]:
        text_projected = (self.add_q_proj(text), self.add_k_proj(text), self.add_v_proj(text))
        image_projected = (self.to_q(image), self.to_k(image), self.to_v(image))
        text_norms = (scales(self.norm_added_q), scales(self.norm_added_k))
        streams = [
            Stream(*text_projected, *text_norms, rotations[0]),
            Stream(*image_projected, scales(self.norm_q), scales(self.norm_k), rotations[1]),
        ]
        text, image = attend_streams(streams, self.heads, self.epsilon, **keys._asdict())
        return self.to_add_out(text), self.to_out[0](image)


class FeedForward(nnx.Module):
    def __init__(self, config: Flux2Config, *, dtype: Dtype, rngs: nnx.Rngs):
        self.linear_in = linear(config.width, 2 * config.mlp_width, bias=False, dtype=dtype, rngs=rngs)
        self.linear_out = linear(config.mlp_width, config.width, bias=False, dtype=dtype, rngs=rngs)

    @jax.named_scope("feed-forward")
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear_out(swiglu(x, *jnp.split(self.linear_in.kernel[...], 2, axis=-1)))


class DoubleBlock(nnx.Module):
    """Flux2TransformerBlock: a stream of text and one of image, which meet in attention."""

    def __init__(self, config: Flux2Config, *, dtype: Dtype, rngs: nnx.Rngs):
        self.epsilon = config.eps
        self.attn = JointAttention(config, dtype=dtype, rngs=rngs)
        self.ff = FeedForward(config, dtype=dtype, rngs=rngs)
        self.ff_context = FeedForward(config, dtype=dtype, rngs=rngs)

    @jax.named_scope("double-block")
    def __call__(
        self,
        text: jax.Array,
        image: jax.Array,
        text_modulation: list[Modulation],
        image_modulation: list[Modulation],
        rotations: tuple[Rotation, Rotation],
        keys: Keys,
    ) -> tuple[jax.Array, jax.Array]:
        (shift, scale, gate), (mlp_shift, mlp_scale, mlp_gate) = image_modulation
        (text_shift, text_scale, text_gate), (text_mlp_shift, text_mlp_scale, text_mlp_gate) = text_modulation
        of_text, of_image = self.attn(
            modulated(text, text_shift, text_scale, self.epsilon),
            modulated(image, shift, scale, self.epsilon),
            rotations,
            keys,
        )
        image = apart(image + gated(of_image, gate))
        image = apart(image + gated(self.ff(modulated(image, mlp_shift, mlp_scale, self.epsilon)), mlp_gate))
        text = text + gated(of_text, text_gate)
        text = text + gated(
            self.ff_context(modulated(text, text_mlp_shift, text_mlp_scale, self.epsilon)), text_mlp_gate
        )
        return text, image


class ParallelAttention(nnx.Module):
    """Flux2ParallelSelfAttention: attention beside the feed-forward layer, with joint projections (Dehghani 2023)."""

    def __init__(self, config: Flux2Config, *, dtype: Dtype, rngs: nnx.Rngs):
        width, mlp_width = config.width, config.mlp_width
        self.mlp_width = mlp_width
        self.heads, self.epsilon = config.num_attention_heads, config.eps
        self.to_qkv_mlp_proj = linear(width, 3 * width + 2 * mlp_width, bias=False, dtype=dtype, rngs=rngs)
        self.norm_q = rms_norm(config.attention_head_dim, config.eps, dtype=dtype, rngs=rngs)
        self.norm_k = rms_norm(config.attention_head_dim, config.eps, dtype=dtype, rngs=rngs)
        self.to_out = linear(width + mlp_width, width, bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, rotation: Rotation, keys: Keys) -> jax.Array:
        """float32 [B, T, D], of x [B, T, D]. Both projections are products of their own for each of their parts: so
        nothing is split or joined, and XLA for TPU gates within a product and adds within the last."""
        width, heads = x.shape[-1], self.heads
        qkv, gate, up = jnp.split(self.to_qkv_mlp_proj.kernel[...], [3 * width, 3 * width + self.mlp_width], axis=-1)
        attention_out, mlp_out = jnp.split(self.to_out.kernel[...], [width], axis=0)
        with jax.named_scope("feed-forward"):
            out = product(swiglu(x, gate, up), mlp_out)
        with jax.named_scope("self-attention"):
            qkv = x @ qkv
            stream = Stream(qkv, qkv, qkv, scales(self.norm_q), scales(self.norm_k), rotation)
            [x] = attend_streams([stream], heads, self.epsilon, first=(0, heads, 2 * heads), **keys._asdict())
            return out + product(x, attention_out)


class SingleBlock(nnx.Module):
    """Flux2SingleTransformerBlock: one stream of text and image."""

    def __init__(self, config: Flux2Config, *, dtype: Dtype, rngs: nnx.Rngs):
        self.epsilon = config.eps
        self.attn = ParallelAttention(config, dtype=dtype, rngs=rngs)

    @jax.named_scope("single-block")
    def __call__(self, x: jax.Array, modulation: Modulation, rotation: Rotation, keys: Keys) -> jax.Array:
        shift, scale, gate = modulation
        out = self.attn(modulated(x, shift, scale, self.epsilon), rotation, keys)
        return x + (out * gate).astype(x.dtype)


class ModulatedNorm(nnx.Module):
    """AdaLayerNormContinuous: a layer norm whose scale and shift follow from the timestep's embedding."""

    def __init__(self, config: Flux2Config, *, dtype: Dtype, rngs: nnx.Rngs):
        self.epsilon = config.eps
        self.linear = linear(config.width, 2 * config.width, bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
        scale, shift = jnp.split(self.linear(jax.nn.silu(time)).astype(jnp.float32)[:, None], 2, axis=-1)
        return modulated(x, shift, scale, self.epsilon)


class Flux2(nnx.Module):
    """Predicts the velocity of latents whose channels are patches of 2x2."""

    def __init__(self, config: Flux2Config, *, dtype: Dtype = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.dtype = dtype
        width = config.width
        self.time_guidance_embed = TimeEmbedding(config, dtype=dtype, rngs=rngs)
        self.double_stream_modulation_img = SharedModulation(width, 2, dtype=dtype, rngs=rngs)
        self.double_stream_modulation_txt = SharedModulation(width, 2, dtype=dtype, rngs=rngs)
        self.single_stream_modulation = SharedModulation(width, 1, dtype=dtype, rngs=rngs)
        self.x_embedder = linear(config.in_channels, width, bias=False, dtype=dtype, rngs=rngs)
        self.context_embedder = linear(config.joint_attention_dim, width, bias=False, dtype=dtype, rngs=rngs)
        self.transformer_blocks = nnx.List(
            DoubleBlock(config, dtype=dtype, rngs=rngs) for _ in range(config.num_layers)
        )
        self.single_transformer_blocks = nnx.List(
            SingleBlock(config, dtype=dtype, rngs=rngs) for _ in range(config.num_single_layers)
        )
        self.norm_out = ModulatedNorm(config, dtype=dtype, rngs=rngs)
        self.proj_out = linear(width, config.out_channels, bias=False, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        timesteps: jax.Array,
        prompt_embeds: jax.Array,
        references: References | None = None,
        shards: ImageShards | None = None,
    ) -> jax.Array:
        """Latents [B, h, w, C], timesteps [B] in 0 to 1000 and embeddings [B, T, D] -> velocity [B, h, w, C].

        Reference images are further tokens behind the latents'. Nothing attends to their padding. With `shards`, which
        suit no references, the latents are this chip's part of each image, and so is the velocity.
        """
        assert references is None or shards is None
        rows, height, width, _ = x.shape
        time = timestep_embedding(timesteps, self.config.timestep_guidance_channels).astype(self.dtype)
        time = self.time_guidance_embed.timestep_embedder(time)
        turning = partial(rotation, dims=self.config.axes_dims_rope, theta=self.config.rope_theta)
        places = [
            text_positions(prompt_embeds.shape[1]),
            image_positions(height * (shards.count if shards else 1), width),
        ]
        if shards:
            prompt_embeds = shards.part(prompt_embeds)
        tokens, latents, keys = prompt_embeds.shape[1], height * width, Keys(shards=shards)
        x = x.astype(self.dtype).reshape(rows, latents, -1)
        if shards:  # the tokens of all chips, in the order in which their keys are gathered
            rotations, joint_rotation = (turning(places[0]), turning(places[1])), turning(shards.joined(places))
        else:
            all_places = joined(places)
            if references is not None:
                all_places = with_references(all_places, references.positions)
                keys = Keys(tokens + latents + references.length)
                x = joined([x, references.latents.astype(self.dtype)])
            joint_rotation = turning(all_places)
            rotations = joint_rotation.part(0, tokens), joint_rotation.part(tokens, None)

        image = self.x_embedder(x)
        text = self.context_embedder(prompt_embeds.astype(self.dtype))
        text_modulation, image_modulation = (
            self.double_stream_modulation_txt(time),
            self.double_stream_modulation_img(time),
        )
        for block in self.transformer_blocks:
            text, image = block(text, image, text_modulation, image_modulation, rotations, keys)

        stream = joined([text, image])
        [modulation] = self.single_stream_modulation(time)
        for single in self.single_transformer_blocks:
            stream = single(stream, modulation, joint_rotation, keys)

        out = self.proj_out(self.norm_out(stream[:, tokens : tokens + latents], time))
        return out.reshape(rows, height, width, -1)
