"""Names of CompVis' latent diffusion code (Rombach et al. 2022) and of OpenCLIP, as diffusers and transformers name
the same tensors.

CompVis numbers the blocks of a UNet through all levels, so a block's place follows from those before it. Knows names
alone, neither shapes nor files.
"""

import re
from collections.abc import Collection, Iterator

RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
UNET = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
VAE = {
    r"(encoder|decoder)\.mid\.block_1": r"\1.mid_block.resnets.0",
    r"(encoder|decoder)\.mid\.attn_1\.norm": r"\1.mid_block.attentions.0.group_norm",
    r"(encoder|decoder)\.mid\.attn_1\.([qkv])": r"\1.mid_block.attentions.0.to_\2",
    r"(encoder|decoder)\.mid\.attn_1\.proj_out": r"\1.mid_block.attentions.0.to_out.0",
    r"(encoder|decoder)\.mid\.block_2": r"\1.mid_block.resnets.1",
    r"(encoder|decoder)\.norm_out": r"\1.conv_norm_out",
    r"encoder\.down\.(\d+)\.block\.(\d+)": r"encoder.down_blocks.\1.resnets.\2",
    r"encoder\.down\.(\d+)\.downsample": r"encoder.down_blocks.\1.downsamplers.0",
}
OPEN_CLIP = {
    "token_embedding": "embeddings.token_embedding",
    "ln_final": "final_layer_norm",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def unet_names(keys: Collection[str]) -> dict[str, str]:
    """CompVis' names in a UNet, without their prefix -> diffusers' UNet2DConditionModel's.

    Names that are not CompVis' stay as they are.
    """
    blocks = UNET | dict(down_blocks(keys)) | dict(up_blocks(keys))
    return {key: unet_name(key, blocks) for key in keys}


def unet_name(key: str, blocks: dict[str, str]) -> str:
    start = next((start for start in prefixes(key) if start in blocks), "")
    if not start:
        return key
    name, rest = blocks[start], key.removeprefix(start)
    if ".resnets." in name:
        rest = replaced(rest, RESNET)
    return name + rest


def prefixes(key: str) -> Iterator[str]:
    """'a.b.c' -> 'a.b', 'a'."""
    while "." in key:
        key = key.rpartition(".")[0]
        yield key


def down_blocks(keys: Collection[str]) -> Iterator[tuple[str, str]]:
    """Modules of input_blocks: resnets, an attention behind each or none, and a downsampler at the end of a level."""
    level = layer = 0
    for i in range(1, count(keys, "input_blocks")):
        if f"input_blocks.{i}.0.op.weight" in keys:
            yield f"input_blocks.{i}.0.op", f"down_blocks.{level}.downsamplers.0.conv"
            level, layer = level + 1, 0
        else:
            yield f"input_blocks.{i}.0", f"down_blocks.{level}.resnets.{layer}"
            yield f"input_blocks.{i}.1", f"down_blocks.{level}.attentions.{layer}"
            layer += 1


def up_blocks(keys: Collection[str]) -> Iterator[tuple[str, str]]:
    """Modules of output_blocks. An upsampler is the last module of a level's last block."""
    level = layer = 0
    for i in range(count(keys, "output_blocks")):
        block = f"output_blocks.{i}"
        yield f"{block}.0", f"up_blocks.{level}.resnets.{layer}"
        resampler = next((f"{block}.{j}.conv" for j in (1, 2) if f"{block}.{j}.conv.weight" in keys), None)
        if resampler != f"{block}.1.conv":
            yield f"{block}.1", f"up_blocks.{level}.attentions.{layer}"
        layer += 1
        if resampler:
            yield resampler, f"up_blocks.{level}.upsamplers.0.conv"
            level, layer = level + 1, 0


def vae_names(keys: Collection[str]) -> dict[str, str]:
    """CompVis' names in an autoencoder, without their prefix -> diffusers' AutoencoderKL's.

    CompVis counts the decoder's levels from the finest, diffusers from the coarsest.
    """
    last = count(keys, "decoder.up") - 1

    def name(key: str) -> str:
        if match := re.fullmatch(r"decoder\.up\.(\d+)\.(?:block\.(\d+)|upsample)\.(.+)", key):
            block = f"decoder.up_blocks.{last - int(match[1])}"
            inner = f"resnets.{match[2]}" if match[2] else "upsamplers.0"
            key = f"{block}.{inner}.{match[3]}"
        for pattern, replacement in VAE.items():
            key = re.sub(rf"^{pattern}(?=\.)", replacement, key)
        return key.replace(".nin_shortcut.", ".conv_shortcut.")

    return {key: name(key) for key in keys}


def open_clip_name(key: str) -> str:
    """OpenCLIP's name in a text encoder, without its prefix -> transformers'. The fused `in_proj` has no other name."""
    if key == "positional_embedding":
        return "embeddings.position_embedding.weight"
    if key == "text_projection":
        return "text_projection.weight"
    key = re.sub(r"^transformer\.resblocks\.", "encoder.layers.", key)
    return replaced(f".{key}", OPEN_CLIP)[1:]


def replaced(name: str, parts: dict[str, str]) -> str:
    """The first part that stands in `.name.` as whole words is replaced."""
    for part, replacement in parts.items():
        if f".{part}." in f"{name}.":
            return f"{name}.".replace(f".{part}.", f".{replacement}.", 1)[:-1]
    return name


def count(keys: Collection[str], list_name: str) -> int:
    """How many entries a numbered list has."""
    numbers = (re.match(rf"{re.escape(list_name)}\.(\d+)\.", key) for key in keys)
    return 1 + max((int(match[1]) for match in numbers if match), default=-1)
