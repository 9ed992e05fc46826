"""Checkpoints as one file, as people trade them: tensors by the names of CompVis' code and of OpenCLIP.

It is the reverse of app/diffusion/models/ldm_names.py, written apart from it.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from app.diffusion.families.stable_diffusion import StableDiffusion
from app.diffusion.families.stable_diffusion_xl import StableDiffusionXL
from tests import tiny

Config = Mapping[str, Any]
Arrays = dict[str, np.ndarray[Any, Any]]

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
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.attentions.0": "middle_block.1",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "encoder.layers": "transformer.resblocks",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "final_layer_norm": "ln_final",
    "text_projection.weight": "text_projection",
}

_TEXT = {"architectures": ["CLIPTextModel"], "eos_token_id": 2, "max_position_embeddings": 77, "vocab_size": 526}
_UNET = {"_class_name": "UNet2DConditionModel"}
_VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [32, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "layers_per_block": 1,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}
# Whole checkpoints whose sizes are the smallest that have what shapes do not say: 32 groups, and 8 heads or 64 channels
# a head. Attention is on other levels and in other numbers of layers each.
MODELS: dict[str, dict[str, Config]] = {
    "sd1": {
        "unet": _UNET
        | {
            "attention_head_dim": 8,
            "block_out_channels": [32, 64],
            "cross_attention_dim": 64,
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "layers_per_block": 2,
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        },
        "vae": _VAE,
        "text_encoder": _TEXT
        | {
            "hidden_act": "quick_gelu",
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_attention_heads": 1,
            "num_hidden_layers": 2,
        },
    },
    "sd2": {
        "unet": _UNET
        | {
            "attention_head_dim": [1, 2],
            "block_out_channels": [64, 128],
            "cross_attention_dim": 128,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "layers_per_block": 1,
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
            "use_linear_projection": True,
        },
        "vae": _VAE | {"layers_per_block": 2},
        "text_encoder": _TEXT
        | {
            "hidden_act": "gelu",
            "hidden_size": 128,
            "intermediate_size": 80,
            "num_attention_heads": 2,
            "num_hidden_layers": 3,
        },
    },
    "sdxl": {
        "unet": _UNET
        | {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "attention_head_dim": [1, 1, 2],
            "block_out_channels": [32, 64, 128],
            "cross_attention_dim": 128,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "layers_per_block": 1,
            "projection_class_embeddings_input_dim": 40 + 6 * 256,
            "transformer_layers_per_block": [1, 1, 2],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "use_linear_projection": True,
        },
        "vae": _VAE | {"scaling_factor": 0.13025},
        "text_encoder": _TEXT
        | {
            "hidden_act": "quick_gelu",
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_attention_heads": 1,
            "num_hidden_layers": 2,
        },
        "text_encoder_2": _TEXT
        | {
            "architectures": ["CLIPTextModelWithProjection"],
            "hidden_act": "gelu",
            "hidden_size": 64,
            "intermediate_size": 80,
            "num_attention_heads": 1,
            "num_hidden_layers": 3,
            "projection_dim": 40,
        },
    },
}
SCHEDULERS = {name: tiny.MODELS[f"tiny-{name}"]["scheduler"] for name in MODELS}


def arrays(model: str) -> dict[str, Arrays]:
    """The tensors of one of MODELS by component, by diffusers' names."""
    components = (StableDiffusionXL if model == "sdxl" else StableDiffusion).COMPONENTS
    problems: list[str] = []
    tensors = {}
    for part, component in components.items():
        shapes = component.tensors(component.read(MODELS[model][part], problems, part))
        tensors[part] = {name: tiny.weight(part, name, [*shape]) for name, shape in shapes.items()}
    assert not problems, problems
    return tensors


def write_one_file(file: Path, model: str, metadata: dict[str, str] | None = None, **more: Any) -> Path:
    """One of MODELS, with more tensors beside it."""
    tensors = one_file(arrays(model), MODELS[model]) | more
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, file, metadata=metadata)
    return file


def one_file(tensors: Mapping[str, Arrays], configs: Mapping[str, Config]) -> Arrays:
    """A checkpoint's tensors by diffusers' names, by component -> all by CompVis' names."""
    file: Arrays = {}
    for name, value in tensors["unet"].items():
        file[f"model.diffusion_model.{unet_name(name, configs['unet'])}"] = value
    for name, value in tensors["vae"].items():
        if re.search(r"attentions.*(to_q|to_k|to_v|to_out\.0)\.weight", name):
            value = value[:, :, None, None]  # convolutions of one position there
        file[f"first_stage_model.{vae_name(name, configs['vae'])}"] = value
    two = "text_encoder_2" in tensors
    for part, config in configs.items():
        if not part.startswith("text_encoder"):
            continue
        model = "cond_stage_model" if not two else f"conditioner.embedders.{int(part.endswith('2'))}"
        named = {name.removeprefix("text_model."): value for name, value in tensors[part].items()}
        if config["hidden_act"] == "gelu":
            file |= {f"{model}.model.{name}": value for name, value in open_clip(named).items()}
        else:
            file |= {f"{model}.transformer.text_model.{name}": value for name, value in named.items()}
    return file


def unet_name(name: str, config: Config) -> str:
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


def vae_name(name: str, config: Config) -> str:
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


def open_clip(tensors: Arrays) -> Arrays:
    """Queries, keys and values are one product there, and the projection is transposed."""
    renamed: Arrays = {}
    for name, value in tensors.items():
        if match := re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)", name):
            fused = [tensors[name.replace("q_proj", projection)] for projection in ("q_proj", "k_proj", "v_proj")]
            renamed[f"transformer.resblocks.{match[1]}.attn.in_proj_{match[2]}"] = np.concatenate(fused)
        elif ".k_proj." not in name and ".v_proj." not in name:
            value = value.T if name == "text_projection.weight" else value
            for ours, open_clip_name in OPEN_CLIP.items():
                name = name.replace(ours, open_clip_name)
            renamed[name] = value
    return renamed
