"""The flow model's networks, in klein's form, as diffusers' and transformers' configuration files describe them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from app.diffusion.models.flow_config import Flux2Config, Qwen3Config

TEXT_LENGTH = 24  # the longest caption has 18 tokens
HIDDEN_STATES = (1, 2, 3)
TRANSFORMER_JSON: dict[str, Any] = {
    "_class_name": "Flux2Transformer2DModel",
    "attention_head_dim": 64,
    "axes_dims_rope": [4, 24, 24, 12],
    "eps": 1e-6,
    "guidance_embeds": False,
    "in_channels": 32,
    "joint_attention_dim": 384,
    "mlp_ratio": 2.0,
    "num_attention_heads": 3,
    "num_layers": 2,
    "num_single_layers": 5,
    "out_channels": None,
    "patch_size": 1,
    "rope_theta": 100,  # of places up to 24, not thousands
    "timestep_guidance_channels": 256,
}
TEXT_JSON: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 128,
    "intermediate_size": 256,
    "max_position_embeddings": TEXT_LENGTH,
    "max_sequence_length": TEXT_LENGTH,
    "model_type": "qwen3",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 100,
    "text_encoder_out_layers": [*HIDDEN_STATES],
    "tie_word_embeddings": True,
    "use_sliding_window": False,
}
VAE_CHANGES: dict[str, Any] = {  # of an AutoencoderKL's configuration
    "_class_name": "AutoencoderKLFlux2",
    "batch_norm_eps": 1e-4,
    "batch_norm_momentum": 0.1,
    "patch_size": [2, 2],
}
SCHEDULER_JSON: dict[str, Any] = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 2.0,
    "use_dynamic_shifting": False,
}


@dataclass(frozen=True)
class FlowArchitecture:
    """The config.json of each network; the text encoder's vocabulary size is its tokenizer's."""

    transformer_json: Mapping[str, Any]
    text_json: Mapping[str, Any]

    @property
    def transformer(self) -> Flux2Config:
        return Flux2Config.from_json(self.transformer_json, [], "transformer/config.json")

    def text_encoder(self, vocabulary: int) -> Qwen3Config:
        json = {**self.text_json, "vocab_size": vocabulary}
        return Qwen3Config.from_json(json, [], "text_encoder/config.json", HIDDEN_STATES)


ARCHITECTURES = {
    "bundled": FlowArchitecture(TRANSFORMER_JSON, TEXT_JSON),
    "tiny": FlowArchitecture(
        TRANSFORMER_JSON
        | {
            "attention_head_dim": 16,
            "axes_dims_rope": [2, 6, 6, 2],
            "joint_attention_dim": 96,
            "num_attention_heads": 2,
            "num_layers": 1,
            "num_single_layers": 2,
        },
        TEXT_JSON | {"head_dim": 8, "hidden_size": 32, "intermediate_size": 64},
    ),
}
