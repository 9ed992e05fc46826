"""The config.json of each component of a one-file checkpoint, read off the names and shapes of its tensors.

Names are diffusers' and transformers'. Where a tensor is missing, a size is 0, and the reader of the configuration
refuses it. Imports nothing but the standard library.
"""

from collections.abc import Mapping
from typing import Any

from app.diffusion.models.ldm_names import count

Json = dict[str, Any]
Shapes = Mapping[str, tuple[int, ...]]
HEAD = 64  # channels of an attention head, in CLIP and in the UNets of SD 2.x and SDXL


def text_config(shapes: Shapes, activation: str) -> Json:
    rows, width = shape(shapes, "embeddings.token_embedding.weight", 2)
    config = {
        "architectures": ["CLIPTextModel"],
        "vocab_size": rows,
        "hidden_size": width,
        "intermediate_size": shape(shapes, "encoder.layers.0.mlp.fc1.bias", 1)[0],
        "num_hidden_layers": count(shapes, "encoder.layers"),
        "num_attention_heads": max(1, width // HEAD),
        "max_position_embeddings": shape(shapes, "embeddings.position_embedding.weight", 2)[0],
        "hidden_act": activation,
        "eos_token_id": 2,  # as old configs have it: a text ends at its largest id, which is CLIP's end token
    }
    if "text_projection.weight" in shapes:
        width = shape(shapes, "text_projection.weight", 2)[0]
        config |= {"architectures": ["CLIPTextModelWithProjection"], "projection_dim": width}
    return config


def unet_config(shapes: Shapes, heads: int | None) -> Json:
    levels = range(count(shapes, "down_blocks"))
    channels = [shape(shapes, f"down_blocks.{level}.resnets.0.conv2.weight", 4)[0] for level in levels]
    depths = [count(shapes, f"down_blocks.{level}.attentions.0.transformer_blocks") for level in levels]
    ups = [count(shapes, f"up_blocks.{level}.attentions") for level in levels]
    middle = count(shapes, "mid_block.attentions.0.transformer_blocks")
    config = {
        "_class_name": "UNet2DConditionModel",
        "in_channels": shape(shapes, "conv_in.weight", 4)[1],
        "out_channels": shape(shapes, "conv_out.weight", 4)[0],
        "block_out_channels": channels,
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if attentions else "UpBlock2D" for attentions in ups],
        "layers_per_block": count(shapes, "down_blocks.0.resnets"),
        "attention_head_dim": heads or [max(1, width // HEAD) for width in channels],
        "cross_attention_dim": shape(shapes, "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight", 2)[1],
    }
    # A level without attentions has no depth. diffusers takes the middle block's from the last level.
    depths = [depth or 1 for depth in depths[:-1]] + [middle]
    if set(depths) != {1}:
        config["transformer_layers_per_block"] = depths
    if "add_embedding.linear_1.weight" in shapes:
        width = shape(shapes, "add_embedding.linear_1.weight", 2)[1]
        config |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
        config |= {"projection_class_embeddings_input_dim": width}
    return config


def vae_config(shapes: Shapes, scaling_factor: float) -> Json:
    levels = range(count(shapes, "encoder.down_blocks"))
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": shape(shapes, "encoder.conv_in.weight", 4)[1],
        "out_channels": shape(shapes, "decoder.conv_out.weight", 4)[0],
        "latent_channels": shape(shapes, "decoder.conv_in.weight", 4)[1],
        "block_out_channels": [
            shape(shapes, f"encoder.down_blocks.{level}.resnets.0.conv2.weight", 4)[0] for level in levels
        ],
        "down_block_types": ["DownEncoderBlock2D" for _ in levels],
        "up_block_types": ["UpDecoderBlock2D" for _ in levels],
        "layers_per_block": count(shapes, "encoder.down_blocks.0.resnets"),
        "mid_block_add_attention": "encoder.mid_block.attentions.0.to_q.weight" in shapes,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "scaling_factor": scaling_factor,
    }


def shape(shapes: Mapping[str, tuple[int, ...]], name: str, rank: int) -> tuple[int, ...]:
    """Zeros where there is no such tensor of that rank; the loader then says what is missing."""
    return shapes[name] if len(shapes.get(name, ())) == rank else (0,) * rank
