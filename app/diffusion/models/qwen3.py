"""Qwen3 as a text encoder (Yang et al. 2025). Attribute names are transformers' tensor names, behind `model.`."""

import jax
import jax.numpy as jnp
from flax import nnx

from app.diffusion.models.attention import attend
from app.diffusion.models.flow_config import Qwen3Config
from app.diffusion.models.layers import Dtype, linear
from app.diffusion.models.transformer_layers import Rotation, rms_norm, rotation, scales, turned


class SelfAttention(nnx.Module):
    """Causal, with fewer heads of keys and values than of queries (Ainslie et al. 2023)."""

    def __init__(self, config: Qwen3Config, *, dtype: Dtype, rngs: nnx.Rngs):
        self.heads, self.epsilon = config.num_attention_heads, config.rms_norm_eps
        width, head = config.hidden_size, config.head_dim
        queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
        self.q_proj = linear(width, queries, bias=False, dtype=dtype, rngs=rngs)
        self.k_proj = linear(width, keys, bias=False, dtype=dtype, rngs=rngs)
        self.v_proj = linear(width, keys, bias=False, dtype=dtype, rngs=rngs)
        self.o_proj = linear(queries, width, bias=False, dtype=dtype, rngs=rngs)
        self.q_norm = rms_norm(head, config.rms_norm_eps, dtype=dtype, rngs=rngs)
        self.k_norm = rms_norm(head, config.rms_norm_eps, dtype=dtype, rngs=rngs)

    @jax.named_scope("self-attention")
    def __call__(self, x: jax.Array, rotation: Rotation, lengths: jax.Array) -> jax.Array:
        q = turned(self.q_proj(x), scales(self.q_norm), rotation, self.epsilon, halves=True)
        k = turned(self.k_proj(x), scales(self.k_norm), rotation, self.epsilon, halves=True)
        return self.o_proj(attend(q, k, self.v_proj(x), self.heads, causal=True, lengths=lengths))


class MLP(nnx.Module):
    """Gated SiLU (Shazeer 2020)."""

    def __init__(self, config: Qwen3Config, *, dtype: Dtype, rngs: nnx.Rngs):
        width, features = config.hidden_size, config.intermediate_size
        self.gate_proj = linear(width, features, bias=False, dtype=dtype, rngs=rngs)
        self.up_proj = linear(width, features, bias=False, dtype=dtype, rngs=rngs)
        self.down_proj = linear(features, width, bias=False, dtype=dtype, rngs=rngs)

    @jax.named_scope("feed-forward")
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nnx.Module):
    def __init__(self, config: Qwen3Config, *, dtype: Dtype, rngs: nnx.Rngs):
        self.input_layernorm = rms_norm(config.hidden_size, config.rms_norm_eps, dtype=dtype, rngs=rngs)
        self.self_attn = SelfAttention(config, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = rms_norm(config.hidden_size, config.rms_norm_eps, dtype=dtype, rngs=rngs)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, rotation: Rotation, lengths: jax.Array) -> jax.Array:
        x = x + self.self_attn(self.input_layernorm(x), rotation, lengths)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class Qwen3(nnx.Module):
    """Only as many layers as are read: neither the last ones, nor the final norm, nor the language model's head.

    `config.hidden_states` are counted as transformers counts them: 0 is the embedding, i the output of layer i.
    """

    def __init__(self, config: Qwen3Config, *, dtype: Dtype = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.embed_tokens = nnx.Embed(config.vocab_size, config.hidden_size, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.layers = nnx.List(DecoderLayer(config, dtype=dtype, rngs=rngs) for _ in range(config.layers_read))

    def __call__(self, input_ids: jax.Array) -> jax.Array:
        """input_ids [B, T] -> hidden states side by side, [B, T, S * D].

        A text ends with padding, which is the complement of its id: it attends to the text, and nothing attends to it.
        """
        lengths = (input_ids >= 0).sum(axis=1)
        x = self.embed_tokens(jnp.where(input_ids < 0, ~input_ids, input_ids))
        positions = jnp.arange(x.shape[1])[None, :, None]
        turning = rotation(positions, [self.config.head_dim], self.config.rope_theta, halves=True)
        states = [x]
        for layer in self.layers:
            x = layer(x, turning, lengths)
            states.append(x)
        return jnp.concatenate([states[i] for i in self.config.hidden_states], axis=-1)
