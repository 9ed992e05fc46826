"""The tensors of checkpoints of flow models, by name and PyTorch shape, without JAX.

As shapes.py does, it says again what qwen3.py, flux2.py, flux2_vae.py and z_image.py build; tests hold both together.
"""

from app.diffusion.models.flow_config import Flux2Config, Flux2VAEConfig, Qwen3Config, ZImageConfig
from app.diffusion.models.shapes import Shape, Tensors, vae_tensors


def qwen3_tensors(config: Qwen3Config) -> dict[str, Shape]:
    """Of the layers that are read."""
    return dict(_qwen3(config))


def flux2_tensors(config: Flux2Config) -> dict[str, Shape]:
    return dict(_flux2(config))


def flux2_vae_tensors(config: Flux2VAEConfig) -> dict[str, Shape]:
    statistics = {f"bn.{name}": (config.patch_channels,) for name in ("running_mean", "running_var")}
    return vae_tensors(config) | statistics


def z_image_tensors(config: ZImageConfig) -> dict[str, Shape]:
    return dict(_z_image(config))


# Qwen3ForCausalLM


def _qwen3(config: Qwen3Config) -> Tensors:
    width, head = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    yield "embed_tokens.weight", (config.vocab_size, width)
    for layer in range(config.layers_read):
        name = f"layers.{layer}"
        yield from _weights(name, {"input_layernorm": (width,), "post_attention_layernorm": (width,)})
        yield from _weights(
            f"{name}.self_attn",
            {
                "q_proj": (queries, width),
                "k_proj": (keys, width),
                "v_proj": (keys, width),
                "o_proj": (width, queries),
                "q_norm": (head,),
                "k_norm": (head,),
            },
        )
        features = config.intermediate_size
        yield from _weights(
            f"{name}.mlp",
            {"gate_proj": (features, width), "up_proj": (features, width), "down_proj": (width, features)},
        )


# Flux2Transformer2DModel


def _flux2(config: Flux2Config) -> Tensors:
    width, mlp, head = config.width, config.mlp_width, config.attention_head_dim
    embedder = "time_guidance_embed.timestep_embedder"
    yield f"{embedder}.linear_1.weight", (width, config.timestep_guidance_channels)
    yield f"{embedder}.linear_2.weight", (width, width)
    for name, sets in (
        ("double_stream_modulation_img", 2),
        ("double_stream_modulation_txt", 2),
        ("single_stream_modulation", 1),
    ):
        yield f"{name}.linear.weight", (3 * sets * width, width)
    yield "x_embedder.weight", (width, config.in_channels)
    yield "context_embedder.weight", (width, config.joint_attention_dim)
    projections = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    for block in range(config.num_layers):
        name = f"transformer_blocks.{block}"
        yield from _weights(f"{name}.attn", dict.fromkeys(projections, (width, width)))
        yield from _weights(
            f"{name}.attn", dict.fromkeys(("norm_q", "norm_k", "norm_added_q", "norm_added_k"), (head,))
        )
        for feed_forward in ("ff", "ff_context"):
            yield from _weights(f"{name}.{feed_forward}", {"linear_in": (2 * mlp, width), "linear_out": (width, mlp)})
    for block in range(config.num_single_layers):
        yield from _weights(
            f"single_transformer_blocks.{block}.attn",
            {
                "to_qkv_mlp_proj": (3 * width + 2 * mlp, width),
                "norm_q": (head,),
                "norm_k": (head,),
                "to_out": (width, width + mlp),
            },
        )
    yield "norm_out.linear.weight", (2 * width, width)
    yield "proj_out.weight", (config.out_channels, width)


# ZImageTransformer2DModel


def _z_image(config: ZImageConfig) -> Tensors:
    width, time, patch = config.dim, config.time_width, config.patch_channels
    yield from _biased("all_x_embedder.2-1", (width, patch))
    yield from _biased("all_final_layer.2-1.linear", (patch, width))
    yield from _biased("all_final_layer.2-1.adaLN_modulation.1", (width, time))
    yield from _biased("t_embedder.mlp.0", (1024, 256))
    yield from _biased("t_embedder.mlp.2", (time, 1024))
    yield "cap_embedder.0.weight", (config.cap_feat_dim,)
    yield from _biased("cap_embedder.1", (width, config.cap_feat_dim))
    yield "x_pad_token", (1, width)
    yield "cap_pad_token", (1, width)
    for stack, count in (
        ("noise_refiner", config.n_refiner_layers),
        ("context_refiner", config.n_refiner_layers),
        ("layers", config.n_layers),
    ):
        for block in range(count):
            yield from _z_image_block(f"{stack}.{block}", config)
            if stack != "context_refiner":
                yield from _biased(f"{stack}.{block}.adaLN_modulation.0", (4 * width, time))


def _z_image_block(name: str, config: ZImageConfig) -> Tensors:
    width, mlp = config.dim, config.mlp_width
    yield from _weights(
        f"{name}.attention",
        dict.fromkeys(("to_q", "to_k", "to_v", "to_out.0"), (width, width))
        | dict.fromkeys(("norm_q", "norm_k"), (config.head_dim,)),
    )
    yield from _weights(f"{name}.feed_forward", {"w1": (mlp, width), "w2": (width, mlp), "w3": (mlp, width)})
    norms = ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")
    yield from _weights(name, dict.fromkeys(norms, (width,)))


# Layers


def _weights(name: str, shapes: dict[str, Shape]) -> Tensors:
    for layer, shape in shapes.items():
        yield f"{name}.{layer}.weight", shape


def _biased(name: str, shape: Shape) -> Tensors:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]
