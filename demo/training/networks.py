"""The architectures that can be trained, as diffusers' configuration files describe them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from app.diffusion.models.config import CLIPTextConfig, UNetConfig, VAEConfig
from app.diffusion.models.tokenizer import Tokenizer

VAE_JSON: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [16, 32, 64, 96],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "force_upcast": False,
    "in_channels": 3,
    "latent_channels": 8,
    "layers_per_block": 1,
    "mid_block_add_attention": False,
    "norm_num_groups": 1,
    "out_channels": 3,
    "sample_size": 128,
    "scaling_factor": 1.0,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
UNET_JSON: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "attention_head_dim": [2, 4, 4],
    "block_out_channels": [48, 112, 144],
    "center_input_sample": False,
    "cross_attention_dim": 160,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 8,
    "layers_per_block": 1,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-5,
    "norm_num_groups": 8,
    "out_channels": 8,
    "sample_size": 16,
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}
TEXT_JSON: dict[str, Any] = {
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "hidden_act": "quick_gelu",
    "hidden_size": 160,
    "intermediate_size": 640,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 32,
    "model_type": "clip_text_model",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "projection_dim": 160,
}
# beta_end is far above Stable Diffusion's 0.012: 1.5 % of the picture is left at the last timestep, instead of 6.8 %.
# So both a white and a black background can be reached from pure noise (Lin et al. 2023).
SCHEDULER_JSON: dict[str, Any] = {
    "_class_name": "DPMSolverMultistepScheduler",
    "algorithm_type": "dpmsolver++",
    "beta_end": 0.02,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "solver_order": 2,
    "solver_type": "midpoint",
    "steps_offset": 1,
    "timestep_spacing": "trailing",
}


@dataclass(frozen=True)
class Architecture:
    """The config.json of each network; the text encoder's vocabulary size is its tokenizer's."""

    vae_json: Mapping[str, Any]
    unet_json: Mapping[str, Any]
    text_json: Mapping[str, Any]

    @property
    def vae(self) -> VAEConfig:
        return VAEConfig.from_json(self.vae_json, [])

    @property
    def unet(self) -> UNetConfig:
        return UNetConfig.from_json(self.unet_json, [])

    def text_encoder(self, tokenizer: Tokenizer) -> CLIPTextConfig:
        return CLIPTextConfig.from_json({**self.text_json, "vocab_size": len(tokenizer.tokenizer)}, [])


ARCHITECTURES = {
    "bundled": Architecture(VAE_JSON, UNET_JSON, TEXT_JSON),
    # Every layer of a kind has one shape, and there are few: it compiles in seconds and learns next to nothing.
    "tiny": Architecture(
        VAE_JSON | {"block_out_channels": [8] * 4},
        UNET_JSON
        | {
            "attention_head_dim": [2, 2],
            "block_out_channels": [32, 32],
            "cross_attention_dim": 32,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        },
        TEXT_JSON
        | {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "projection_dim": 32,
        },
    ),
}
