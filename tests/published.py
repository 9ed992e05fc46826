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

_UNET_XL = _UNET | {
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "class_embed_type": None,
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "time_cond_proj_dim": None,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "upcast_attention": None,
    "use_linear_projection": True,
}
_TEXT_XL = _TEXT | {
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}
_SCHEDULER_XL = _SCHEDULER | {
    "_class_name": "EulerDiscreteScheduler",
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}
_SDXL: dict[str, Config] = {
    "unet": _UNET_XL | {"_diffusers_version": "0.19.0.dev0"},
    "vae": _VAE | {"force_upcast": True, "norm_num_groups": 32, "sample_size": 1024, "scaling_factor": 0.13025},
    "text_encoder": _TEXT_1 | {"projection_dim": 768},
    "text_encoder_2": _TEXT_XL,
    "scheduler": _SCHEDULER_XL,
}
XL_CHECKPOINTS: dict[str, dict[str, Config]] = {
    "stable-diffusion-xl-base-1.0": _SDXL,
    "sdxl-turbo": _SDXL
    | {
        "scheduler": _SCHEDULER_XL | {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"},
    },
}

_QWEN3_4B: Config = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "initializer_range": 0.02,
    "intermediate_size": 9728,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
_VAE_OF_FLOW = _VAE | {
    "force_upcast": True,
    "latents_mean": None,
    "latents_std": None,
    "mid_block_add_attention": True,
    "norm_num_groups": 32,
    "sample_size": 1024,
}
_FLOW_SCHEDULER: Config = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
}

_KLEIN_4B: dict[str, Config] = {
    "transformer": {
        "_class_name": "Flux2Transformer2DModel",
        "attention_head_dim": 128,
        "axes_dims_rope": [32, 32, 32, 32],
        "eps": 1e-06,
        "guidance_embeds": False,
        "in_channels": 128,
        "joint_attention_dim": 7680,
        "mlp_ratio": 3.0,
        "num_attention_heads": 24,
        "num_layers": 5,
        "num_single_layers": 20,
        "out_channels": None,
        "patch_size": 1,
        "rope_theta": 2000,
        "timestep_guidance_channels": 256,
    },
    "vae": _VAE_OF_FLOW
    | {
        "_class_name": "AutoencoderKLFlux2",
        "batch_norm_eps": 0.0001,
        "batch_norm_momentum": 0.1,
        "latent_channels": 32,
        "patch_size": [2, 2],
        "use_post_quant_conv": True,
        "use_quant_conv": True,
    },
    "text_encoder": _QWEN3_4B,
    "scheduler": _FLOW_SCHEDULER
    | {
        "base_image_seq_len": 256,
        "base_shift": 0.5,
        "invert_sigmas": False,
        "max_image_seq_len": 4096,
        "max_shift": 1.15,
        "shift_terminal": None,
        "stochastic_sampling": False,
        "time_shift_type": "exponential",
        "use_beta_sigmas": False,
        "use_dynamic_shifting": True,
        "use_exponential_sigmas": False,
        "use_karras_sigmas": False,
    },
}

# FLUX.2-klein-base-4B has klein-4B's files but for model_index.json's is_distilled.
FLOW_CHECKPOINTS: dict[str, dict[str, Config]] = {
    "FLUX.2-klein-4B": _KLEIN_4B,
    "Z-Image-Turbo": {
        "transformer": {
            "_class_name": "ZImageTransformer2DModel",
            "all_f_patch_size": [1],
            "all_patch_size": [2],
            "axes_dims": [32, 48, 48],
            "axes_lens": [1536, 512, 512],
            "cap_feat_dim": 2560,
            "dim": 3840,
            "in_channels": 16,
            "n_heads": 30,
            "n_kv_heads": 30,
            "n_layers": 30,
            "n_refiner_layers": 2,
            "norm_eps": 1e-05,
            "qk_norm": True,
            "rope_theta": 256.0,
            "t_scale": 1000.0,
        },
        "vae": _VAE_OF_FLOW
        | {
            "latent_channels": 16,
            "scaling_factor": 0.3611,
            "shift_factor": 0.1159,
            "use_post_quant_conv": False,
            "use_quant_conv": False,
        },
        "text_encoder": _QWEN3_4B,
        "scheduler": _FLOW_SCHEDULER | {"use_dynamic_shifting": False},
    },
}
