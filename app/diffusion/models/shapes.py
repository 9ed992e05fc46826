"""The tensors that a checkpoint of an architecture holds, by name and PyTorch shape, without JAX.

It says again what unet.py, vae.py and clip.py build, so that a checkpoint can be judged where it is deployed from;
tests hold both to the tensors of real checkpoints.
"""

from collections.abc import Iterator

from app.diffusion.models.config import CLIPTextConfig, UNetConfig, VAEConfig

Shape = tuple[int, ...]
Tensors = Iterator[tuple[str, Shape]]


def unet_tensors(config: UNetConfig) -> dict[str, Shape]:
    return dict(_unet(config))


def vae_tensors(config: VAEConfig) -> dict[str, Shape]:
    return dict(_vae(config))


def text_encoder_tensors(config: CLIPTextConfig) -> dict[str, Shape]:
    return dict(_text_encoder(config))


# UNet2DConditionModel


def _unet(config: UNetConfig) -> Tensors:
    channels, last, layers = config.block_out_channels, len(config.block_out_channels) - 1, config.layers_per_block
    time = 4 * channels[0]
    yield from _conv("conv_in", config.in_channels, channels[0])
    yield from _linear("time_embedding.linear_1", channels[0], time)
    yield from _linear("time_embedding.linear_2", time, time)
    if config.guidance_features is not None:
        yield from _linear("time_embedding.cond_proj", config.guidance_features, channels[0], bias=False)
    if config.added_features is not None:
        yield from _linear("add_embedding.linear_1", config.added_features, time)
        yield from _linear("add_embedding.linear_2", time, time)

    skips, current = [channels[0]], channels[0]
    for level, kind in enumerate(config.down_block_types):
        block = f"down_blocks.{level}"
        for layer in range(layers):
            yield from _layer(block, layer, current, level, kind, config)
            current = channels[level]
        if level < last:
            yield from _conv(f"{block}.downsamplers.0.conv", current, current)
        skips += [current] * (layers + (level < last))

    for layer in range(2):
        yield from _resnet(f"mid_block.resnets.{layer}", current, current, time)
    yield from _transformer("mid_block.attentions.0", last, config)

    for position, kind in enumerate(config.up_block_types):
        block, level = f"up_blocks.{position}", last - position
        for layer in range(layers + 1):
            yield from _layer(block, layer, current + skips.pop(), level, kind, config)
            current = channels[level]
        if position < last:
            yield from _conv(f"{block}.upsamplers.0.conv", current, current)
    yield from _norm("conv_norm_out", channels[0])
    yield from _conv("conv_out", channels[0], config.out_channels)


def _layer(block: str, layer: int, features_in: int, level: int, kind: str, config: UNetConfig) -> Tensors:
    features = config.block_out_channels[level]
    yield from _resnet(f"{block}.resnets.{layer}", features_in, features, 4 * config.block_out_channels[0])
    if kind.startswith("CrossAttn"):
        yield from _transformer(f"{block}.attentions.{layer}", level, config)


def _transformer(name: str, level: int, config: UNetConfig) -> Tensors:
    features = config.block_out_channels[level]
    yield from _norm(f"{name}.norm", features)
    yield from _linear(f"{name}.proj_in", features, features)
    yield from _linear(f"{name}.proj_out", features, features)
    for layer in range(config.transformer_layers[level]):
        block = f"{name}.transformer_blocks.{layer}"
        for norm in ("norm1", "norm2", "norm3"):
            yield from _norm(f"{block}.{norm}", features)
        for attention, source in (("attn1", features), ("attn2", config.cross_attention_dim)):
            yield from _linear(f"{block}.{attention}.to_q", features, features, bias=False)
            yield from _linear(f"{block}.{attention}.to_k", source, features, bias=False)
            yield from _linear(f"{block}.{attention}.to_v", source, features, bias=False)
            yield from _linear(f"{block}.{attention}.to_out.0", features, features)
        yield from _linear(f"{block}.ff.net.0.proj", features, 8 * features)
        yield from _linear(f"{block}.ff.net.2", 4 * features, features)


# AutoencoderKL


def _vae(config: VAEConfig) -> Tensors:
    latents, layers = config.latent_channels, config.layers_per_block
    levels = config.block_out_channels
    yield from _coder("encoder", config.in_channels, 2 * latents, levels, layers, "down_blocks", "downsamplers", config)
    yield from _coder(
        "decoder", latents, config.out_channels, levels[::-1], layers + 1, "up_blocks", "upsamplers", config
    )
    if config.use_quant_conv:
        yield from _conv("quant_conv", 2 * latents, 2 * latents, kernel=1)
    if config.use_post_quant_conv:
        yield from _conv("post_quant_conv", latents, latents, kernel=1)


def _coder(
    name: str,
    features_in: int,
    features_out: int,
    levels: Shape,
    layers: int,
    blocks: str,
    resamplers: str,
    config: VAEConfig,
) -> Tensors:
    middle = config.block_out_channels[-1]
    yield from _conv(f"{name}.conv_in", features_in, levels[0])
    current = levels[0]
    for level, features in enumerate(levels):
        for layer in range(layers):
            yield from _resnet(f"{name}.{blocks}.{level}.resnets.{layer}", current, features)
            current = features
        if level < len(levels) - 1:
            yield from _conv(f"{name}.{blocks}.{level}.{resamplers}.0.conv", current, current)
    for layer in range(2):
        yield from _resnet(f"{name}.mid_block.resnets.{layer}", middle, middle)
    if config.mid_block_add_attention:
        attention = f"{name}.mid_block.attentions.0"
        yield from _norm(f"{attention}.group_norm", middle)
        for layer_name in ("to_q", "to_k", "to_v", "to_out.0"):
            yield from _linear(f"{attention}.{layer_name}", middle, middle)
    yield from _norm(f"{name}.conv_norm_out", levels[-1])
    yield from _conv(f"{name}.conv_out", levels[-1], features_out)


# CLIPTextModel


def _text_encoder(config: CLIPTextConfig) -> Tensors:
    width = config.hidden_size
    yield "embeddings.token_embedding.weight", (config.vocab_size, width)
    yield "embeddings.position_embedding.weight", (config.max_position_embeddings, width)
    for layer in range(config.num_hidden_layers):
        name = f"encoder.layers.{layer}"
        yield from _norm(f"{name}.layer_norm1", width)
        yield from _norm(f"{name}.layer_norm2", width)
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _linear(f"{name}.self_attn.{projection}", width, width)
        yield from _linear(f"{name}.mlp.fc1", width, config.intermediate_size)
        yield from _linear(f"{name}.mlp.fc2", config.intermediate_size, width)
    yield from _norm("final_layer_norm", width)
    if config.projection_dim is not None:
        yield from _linear("text_projection", width, config.projection_dim, bias=False)


# Layers


def _resnet(name: str, features_in: int, features: int, time: int | None = None) -> Tensors:
    yield from _norm(f"{name}.norm1", features_in)
    yield from _conv(f"{name}.conv1", features_in, features)
    if time is not None:
        yield from _linear(f"{name}.time_emb_proj", time, features)
    yield from _norm(f"{name}.norm2", features)
    yield from _conv(f"{name}.conv2", features, features)
    if features_in != features:
        yield from _conv(f"{name}.conv_shortcut", features_in, features, kernel=1)


def _conv(name: str, features_in: int, features_out: int, kernel: int = 3) -> Tensors:
    yield f"{name}.weight", (features_out, features_in, kernel, kernel)
    yield f"{name}.bias", (features_out,)


def _linear(name: str, features_in: int, features_out: int, *, bias: bool = True) -> Tensors:
    yield f"{name}.weight", (features_out, features_in)
    if bias:
        yield f"{name}.bias", (features_out,)


def _norm(name: str, features: int) -> Tensors:
    yield f"{name}.weight", (features,)
    yield f"{name}.bias", (features,)
