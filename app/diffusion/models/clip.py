"""CLIP's text encoder (Radford et al. 2021). Attribute names are transformers' tensor names."""

import jax
import jax.numpy as jnp
from flax import nnx

from app.diffusion.models.attention import attend
from app.diffusion.models.config import CLIPTextConfig
from app.diffusion.models.layers import Dtype, linear


def quick_gelu(x: jax.Array) -> jax.Array:
    return x * jax.nn.sigmoid(1.702 * x)


def layer_norm(config: CLIPTextConfig, *, dtype: Dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, dtype=dtype, param_dtype=dtype, rngs=rngs)


class Embeddings(nnx.Module):
    def __init__(self, config: CLIPTextConfig, *, dtype: Dtype, rngs: nnx.Rngs):
        def embed(count: int) -> nnx.Embed:
            return nnx.Embed(count, config.hidden_size, dtype=dtype, param_dtype=dtype, rngs=rngs)

        self.token_embedding = embed(config.vocab_size)
        self.position_embedding = embed(config.max_position_embeddings)

    def __call__(self, input_ids: jax.Array) -> jax.Array:
        positions = jnp.arange(input_ids.shape[1])
        return self.token_embedding(input_ids) + self.position_embedding(positions)[None]


class SelfAttention(nnx.Module):
    def __init__(self, config: CLIPTextConfig, *, dtype: Dtype, rngs: nnx.Rngs):
        self.heads = config.num_attention_heads
        self.q_proj = linear(config.hidden_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.k_proj = linear(config.hidden_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.v_proj = linear(config.hidden_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.out_proj = linear(config.hidden_size, config.hidden_size, dtype=dtype, rngs=rngs)

    @jax.named_scope("self-attention")
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out_proj(attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, causal=True))


class MLP(nnx.Module):
    def __init__(self, config: CLIPTextConfig, *, dtype: Dtype, rngs: nnx.Rngs):
        self.hidden_act = config.hidden_act
        self.fc1 = linear(config.hidden_size, config.intermediate_size, dtype=dtype, rngs=rngs)
        self.fc2 = linear(config.intermediate_size, config.hidden_size, dtype=dtype, rngs=rngs)

    @jax.named_scope("feed-forward")
    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.fc1(x)
        x = quick_gelu(x) if self.hidden_act == "quick_gelu" else jax.nn.gelu(x, approximate=False)
        return self.fc2(x)


class EncoderLayer(nnx.Module):
    def __init__(self, config: CLIPTextConfig, *, dtype: Dtype, rngs: nnx.Rngs):
        self.layer_norm1 = layer_norm(config, dtype=dtype, rngs=rngs)
        self.self_attn = SelfAttention(config, dtype=dtype, rngs=rngs)
        self.layer_norm2 = layer_norm(config, dtype=dtype, rngs=rngs)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.self_attn(self.layer_norm1(x))
        x = x + self.mlp(self.layer_norm2(x))
        return x


class Encoder(nnx.Module):
    def __init__(self, config: CLIPTextConfig, *, dtype: Dtype, rngs: nnx.Rngs):
        self.layers = nnx.List(EncoderLayer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_hidden_layers))

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        return x


class CLIPText(nnx.Module):
    """Text encoders of Stable Diffusion: input_ids [B, T] -> prompt_embeds [B, T, D]."""

    def __init__(self, config: CLIPTextConfig, *, dtype: Dtype = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.embeddings = Embeddings(config, dtype=dtype, rngs=rngs)
        self.encoder = Encoder(config, dtype=dtype, rngs=rngs)
        self.final_layer_norm = layer_norm(config, dtype=dtype, rngs=rngs)
        if config.projection_dim is not None:
            features = (config.hidden_size, config.projection_dim)
            self.text_projection = linear(*features, bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, input_ids: jax.Array) -> jax.Array:
        """The last hidden state behind the final norm."""
        return self.final_layer_norm(self.encoder(self.embeddings(input_ids)))

    def penultimate(self, input_ids: jax.Array) -> jax.Array:
        """The hidden state that enters the last layer, without a norm."""
        x = self.embeddings(input_ids)
        for layer in list(self.encoder.layers)[:-1]:
            x = layer(x)
        return x

    def pooled(self, input_ids: jax.Array, penultimate: jax.Array) -> jax.Array:
        """text_embeds [B, P]: the projected last hidden state of the first end token."""
        x = self.final_layer_norm(self.encoder.layers[-1](penultimate))
        if (
            self.config.eos_token_id == 2
        ):  # of old configs, whose text ends with the largest id (transformers pull 24773)
            ends = input_ids.argmax(axis=-1)
        else:
            ends = (input_ids == self.config.eos_token_id).argmax(axis=-1)
        return self.text_projection(x[jnp.arange(len(x)), ends])
