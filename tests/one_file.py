"""A checkpoint as one file, as people trade them: the names that CompVis' own code gives to the tensors of SD 1.x."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests import tiny

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.attentions.0": "middle_block.1",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def write_one_file(file: Path, model: str) -> None:
    """tiny-sd1's or another SD 1.x-like model's tensors, whole."""
    shapes, config = tiny.tensor_shapes()[model], tiny.MODELS[model]
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for name, shape in shapes["unet"].items():
        tensors[f"model.diffusion_model.{unet_name(name, config['unet'])}"] = tiny.weight("unet", name, shape)
    for name, shape in shapes["vae"].items():
        value = tiny.weight("vae", name, shape)
        if re.search(r"attentions.*(to_q|to_k|to_v|to_out\.0)\.weight", name):
            value = value[:, :, None, None]  # convolutions of one position there
        tensors[f"first_stage_model.{vae_name(name, config['vae'])}"] = value
    for name, shape in shapes["text_encoder"].items():
        tensors[f"cond_stage_model.transformer.text_model.{name}"] = tiny.weight("text_encoder", name, shape)
    save_file(tensors, file)


def unet_name(name: str, config: Mapping[str, Any]) -> str:
    """Levels and their layers are counted through there, a level's last entry being what changes the size."""
    stage = config["layers_per_block"] + 1

    def down(match: re.Match[str]) -> str:
        level, kind, layer = int(match[1]), match[2], int(match[3])
        if kind == "downsamplers":
            return f"input_blocks.{stage * (level + 1)}.0.op"
        return f"input_blocks.{stage * level + layer + 1}.{int(kind == 'attentions')}"

    def up(match: re.Match[str]) -> str:
        level, kind, layer = int(match[1]), match[2], int(match[3])
        if kind == "upsamplers":
            behind = 1 + ("CrossAttn" in config["up_block_types"][level])
            return f"output_blocks.{stage * (level + 1) - 1}.{behind}.conv"
        return f"output_blocks.{stage * level + layer}.{int(kind == 'attentions')}"

    name = re.sub(r"down_blocks\.(\d+)\.(\w+)\.(\d+)(?:\.conv(?=\.))?", down, name)
    name = re.sub(r"up_blocks\.(\d+)\.(\w+)\.(\d+)(?:\.conv(?=\.))?", up, name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"middle_block.{2 * int(match[1])}", name)
    for ours, compvis in ENDS.items():
        name = re.sub(rf"^{re.escape(ours)}(?=\.)", compvis, name)
    if "transformer_blocks" in name:  # whose norms keep their names
        return name
    return re.sub(r"(?<=\.)(\w+)(?=\.(?:weight|bias)$)", lambda match: RESNET.get(match[1], match[1]), name)


def vae_name(name: str, config: Mapping[str, Any]) -> str:
    """The decoder's levels are counted from the finest there."""
    last = len(config["block_out_channels"]) - 1
    name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda match: f"up.{last - int(match[1])}.block", name)
    name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda match: f"up.{last - int(match[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
    if "mid_block.attentions.0" in name:
        name = name.replace("mid_block.attentions.0", "mid.attn_1")
        for ours, compvis in ATTENTION.items():
            name = name.replace(f".{ours}.", f".{compvis}.")
    return name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
