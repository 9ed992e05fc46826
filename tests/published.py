"""The JSON files of the published Stable Diffusion checkpoints, without fields that say nothing about the networks."""

from typing import Any

Config = dict[str, Any]

_UNET: Config = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
_UNET_1 = _UNET | {"attention_head_dim": 8, "cross_attention_dim": 768, "sample_size": 64}
_UNET_2 = _UNET | {
    "_name_or_path": "hf-models/stable-diffusion-v2-768x768/unet",
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "sample_size": 96,
    "use_linear_projection": True,
}

_VAE: Config = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}

_TEXT: Config = {
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "pad_token_id": 1,
    "torch_dtype": "float32",
    "vocab_size": 49408,
}
_TEXT_1 = _TEXT | {
    "_name_or_path": "openai/clip-vit-large-patch14",
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "transformers_version": "4.22.0.dev0",
}
_TEXT_2 = _TEXT | {
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "projection_dim": 512,
    "transformers_version": "4.25.0.dev0",
}

_SCHEDULER: Config = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
_SCHEDULER_1 = _SCHEDULER | {"_class_name": "PNDMScheduler", "_diffusers_version": "0.7.0.dev0"}
_SCHEDULER_2 = _SCHEDULER | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}

CHECKPOINTS: dict[str, dict[str, Config]] = {
    "stable-diffusion-v1-4": {
        "unet": _UNET_1 | {"_diffusers_version": "0.2.2"},
        "vae": _VAE | {"_diffusers_version": "0.2.2"},
        "text_encoder": _TEXT_1,
        "scheduler": _SCHEDULER_1,
    },
    "stable-diffusion-v1-5": {
        "unet": _UNET_1 | {"_diffusers_version": "0.6.0"},
        "vae": _VAE | {"_diffusers_version": "0.6.0", "norm_num_groups": 32},
        "text_encoder": _TEXT_1 | {"projection_dim": 768},
        "scheduler": _SCHEDULER_1,
    },
    "stable-diffusion-2": {
        "unet": _UNET_2 | {"_diffusers_version": "0.8.0"},
        "vae": _VAE | {"_diffusers_version": "0.8.0", "norm_num_groups": 32, "sample_size": 768},
        "text_encoder": _TEXT_2,
        "scheduler": _SCHEDULER_2 | {"_diffusers_version": "0.8.0"},
    },
    "stable-diffusion-2-1": {
        "unet": _UNET_2
        | {
            "_diffusers_version": "0.10.0.dev0",
            "num_class_embeds": None,
            "only_cross_attention": False,
            "upcast_attention": True,
        },
        "vae": _VAE | {"_diffusers_version": "0.10.0.dev0", "norm_num_groups": 32, "sample_size": 768},
        "text_encoder": _TEXT_2,
        "scheduler": _SCHEDULER_2 | {"_diffusers_version": "0.8.0"},
    },
}
