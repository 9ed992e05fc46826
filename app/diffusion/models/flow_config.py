"""Architectures of FLUX.2-klein and Z-Image, from their JSON files. Knows nothing of weights or arrays.

As in config.py, each `from_json` appends a sentence to `problems` for everything that it cannot honour.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from app.diffusion.models.config import Fields, VAEConfig

# Options of transformers' Qwen3 that would change what it computes, at the values that its checkpoints have.
QWEN3_FIXED: dict[str, Any] = {
    "attention_bias": False,
    "hidden_act": "silu",
    "quantization_config": None,
    "rope_scaling": None,
    "use_sliding_window": False,
}
FLUX2_FIXED: dict[str, Any] = {"guidance_embeds": False, "patch_size": 1}
FLUX2_VAE_FIXED: dict[str, Any] = {"act_fn": "silu", "decoder_block_out_channels": None, "patch_size": [2, 2]}
Z_IMAGE_FIXED: dict[str, Any] = {
    "all_f_patch_size": [1],
    "all_patch_size": [2],
    "qk_norm": True,
    "siglip_feat_dim": None,
}


@dataclasses.dataclass(frozen=True)
class Qwen3Config:
    """Qwen3ForCausalLM as a text encoder of texts of `text_length` tokens, padded.

    It reads `hidden_states`: 0 is the embedding, i the output of layer i.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    hidden_states: tuple[int, ...]
    text_length: int = 512  # as diffusers' pipelines have it

    @property
    def layers_read(self) -> int:
        return max(self.hidden_states)

    @property
    def features(self) -> int:
        """Of a token's embedding: the hidden states stand side by side."""
        return len(self.hidden_states) * self.hidden_size

    def unread(self, tensor: str) -> bool:
        """Whether a tensor of the checkpoint lies behind the last hidden state that is read."""
        if match := re.match(r"layers\.(\d+)\.", tensor):
            return self.layers_read <= int(match[1]) < self.num_hidden_layers
        return tensor in ("norm.weight", "lm_head.weight")

    @classmethod
    def from_json(
        cls, json: Mapping[str, Any], problems: list[str], where: str, hidden_states: Sequence[int]
    ) -> "Qwen3Config":
        """A negative hidden state counts from the last one, -1.

        A small checkpoint may say otherwise, by the names of arguments that diffusers' pipelines take:
        `text_encoder_out_layers` and `max_sequence_length`.
        """
        got = json.get("model_type", "qwen3")
        if got != "qwen3":
            problems.append(f"{where}: model_type must be qwen3, got {got}.")
        for name, fixed in QWEN3_FIXED.items():
            if json.get(name) and json[name] != fixed:
                problems.append(f"{where}: {name} must be {fixed!r}, got {json[name]!r}.")
        # transformers 5 writes rope_theta among these.
        rope = json.get("rope_parameters") or {"rope_theta": json.get("rope_theta", 1e6)}
        if rope.get("rope_type", "default") != "default":
            problems.append(f"{where}: rope_type must be default, got {rope['rope_type']}.")
        layers = json.get("num_hidden_layers", 36)
        numbers = {
            "vocab_size": json.get("vocab_size", 151936),
            "hidden_size": json.get("hidden_size", 2560),
            "intermediate_size": json.get("intermediate_size", 9728),
            "num_hidden_layers": layers,
            "num_attention_heads": json.get("num_attention_heads", 32),
            "num_key_value_heads": json.get("num_key_value_heads", 8),
            "head_dim": json.get("head_dim", 128),
            "rms_norm_eps": json.get("rms_norm_eps", 1e-6),
            "rope_theta": rope.get("rope_theta", 1e6),
        }
        for name, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
                problems.append(f"{where}: {name} must be a positive number, got {value!r}.")
                return cls(**{field: 1 for field in numbers}, hidden_states=(1,))
        states = json.get("text_encoder_out_layers", [*hidden_states])
        if not isinstance(states, list) or not states or not all(type(i) is int and i >= -layers for i in states):
            problems.append(f"{where}: text_encoder_out_layers must be a list of layers' numbers, got {states!r}.")
            states = [1]
        text_length = json.get("max_sequence_length", cls.text_length)
        if type(text_length) is not int or text_length < 1:
            problems.append(f"{where}: max_sequence_length must be a positive integer, got {text_length!r}.")
            text_length = cls.text_length
        counted = tuple(i if i >= 0 else layers + 1 + i for i in states)
        # The last hidden state is behind the final norm, which nobody reads.
        if max(counted) >= layers:
            problems.append(f"{where}: num_hidden_layers must be at least {max(counted) + 1}, got {layers}.")
        config = cls(**numbers, hidden_states=counted, text_length=text_length)
        if config.num_attention_heads % config.num_key_value_heads:
            problems.append(
                f"{where}: {config.num_attention_heads} heads (num_attention_heads) cannot share "
                f"{config.num_key_value_heads} (num_key_value_heads)."
            )
        return config


@dataclasses.dataclass(frozen=True)
class Flux2Config:
    """Flux2Transformer2DModel without an embedding of the guidance scale, as FLUX.2-klein is."""

    in_channels: int
    out_channels: int
    num_layers: int
    num_single_layers: int
    attention_head_dim: int
    num_attention_heads: int
    joint_attention_dim: int
    timestep_guidance_channels: int
    mlp_ratio: float
    axes_dims_rope: tuple[int, ...]
    rope_theta: float
    eps: float

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def mlp_width(self) -> int:
        return int(self.width * self.mlp_ratio)

    @classmethod
    def from_json(cls, json: Mapping[str, Any], problems: list[str], where: str) -> "Flux2Config":
        # diffusers' default, an embedding of the guidance scale, is FLUX.2-dev's.
        json = {"guidance_embeds": True, **json}
        fields = Fields(where, "Flux2Transformer2DModel", json, FLUX2_FIXED, problems)
        channels = fields.get("in_channels", 128)
        fields.used("out_channels")
        config = cls(
            in_channels=channels,
            out_channels=json.get("out_channels") or channels,
            num_layers=fields.get("num_layers", 8),
            num_single_layers=fields.get("num_single_layers", 48),
            attention_head_dim=fields.get("attention_head_dim", 128),
            num_attention_heads=fields.get("num_attention_heads", 48),
            joint_attention_dim=fields.get("joint_attention_dim", 15360),
            timestep_guidance_channels=fields.get("timestep_guidance_channels", 256),
            mlp_ratio=fields.get("mlp_ratio", 3.0),
            axes_dims_rope=fields.numbers("axes_dims_rope", (32, 32, 32, 32)),
            rope_theta=fields.get("rope_theta", 2000.0),
            eps=fields.get("eps", 1e-6),
        )
        fields.finish()
        if config.out_channels != config.in_channels:
            problems.append(
                f"{where}: out_channels must be in_channels {config.in_channels}, got {config.out_channels}."
            )
        if len(config.axes_dims_rope) != 4 or sum(config.axes_dims_rope) != config.attention_head_dim:
            problems.append(
                f"{where}: axes_dims_rope must be four numbers whose sum is attention_head_dim "
                f"{config.attention_head_dim}, got {list(config.axes_dims_rope)}."
            )
        return config


@dataclasses.dataclass(frozen=True)
class Flux2VAEConfig(VAEConfig):
    """AutoencoderKLFlux2: the denoiser's latents are patches of 2x2, scaled by running statistics."""

    batch_norm_eps: float

    @property
    def patch_channels(self) -> int:
        return 4 * self.latent_channels

    @classmethod
    def from_json(
        cls, json: Mapping[str, Any], problems: list[str], where: str = "vae/config.json"
    ) -> "Flux2VAEConfig":
        json = {"latent_channels": 32, "layers_per_block": 2, **json}
        own = {"batch_norm_eps", "batch_norm_momentum", *FLUX2_VAE_FIXED} - {"act_fn"}
        for name, fixed in FLUX2_VAE_FIXED.items():
            if json.get(name, fixed) != fixed:
                problems.append(f"{where}: {name} must be {fixed!r}, got {json[name]!r}.")
        class_name = json.get("_class_name", "AutoencoderKLFlux2")
        if class_name != "AutoencoderKLFlux2":
            problems.append(f"{where}: _class_name must be AutoencoderKLFlux2, got {class_name}.")
        shared = {name: value for name, value in json.items() if name not in own and name != "_class_name"}
        base = VAEConfig.from_json(shared, problems, where)
        epsilon = json.get("batch_norm_eps", 1e-4)
        if isinstance(epsilon, bool) or not isinstance(epsilon, (int, float)) or epsilon <= 0:
            problems.append(f"{where}: batch_norm_eps must be a positive number, got {epsilon!r}.")
        values = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
        return cls(**values | {"scaling_factor": 1.0, "batch_norm_eps": epsilon})


@dataclasses.dataclass(frozen=True)
class ZImageConfig:
    """ZImageTransformer2DModel without the image encoder of its Omni variant."""

    in_channels: int
    dim: int
    n_layers: int
    n_refiner_layers: int
    n_heads: int
    norm_eps: float
    cap_feat_dim: int
    rope_theta: float
    t_scale: float
    axes_dims: tuple[int, ...]
    axes_lens: tuple[int, ...]

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def mlp_width(self) -> int:
        return int(self.dim / 3 * 8)

    @property
    def time_width(self) -> int:
        """Of the timestep's embedding."""
        return min(self.dim, 256)

    @property
    def patch_channels(self) -> int:
        return 4 * self.in_channels

    @classmethod
    def from_json(cls, json: Mapping[str, Any], problems: list[str], where: str) -> "ZImageConfig":
        fields = Fields(where, "ZImageTransformer2DModel", json, Z_IMAGE_FIXED, problems)
        config = cls(
            in_channels=fields.get("in_channels", 16),
            dim=fields.get("dim", 3840),
            n_layers=fields.get("n_layers", 30),
            n_refiner_layers=fields.get("n_refiner_layers", 2),
            n_heads=fields.get("n_heads", 30),
            norm_eps=fields.get("norm_eps", 1e-5),
            cap_feat_dim=fields.get("cap_feat_dim", 2560),
            rope_theta=fields.get("rope_theta", 256.0),
            t_scale=fields.get("t_scale", 1000.0),
            axes_dims=fields.numbers("axes_dims", (32, 48, 48)),
            axes_lens=fields.numbers("axes_lens", (1024, 512, 512)),
        )
        fields.divides(config.dim, config.n_heads, "heads (n_heads)")
        if (heads := fields.get("n_kv_heads", config.n_heads)) != config.n_heads:
            problems.append(f"{where}: n_kv_heads must be n_heads {config.n_heads}, got {heads}.")
        fields.finish()
        if len(config.axes_dims) != 3 or sum(config.axes_dims) != config.head_dim:
            problems.append(
                f"{where}: axes_dims must be three numbers whose sum is dim / n_heads {config.head_dim}, "
                f"got {list(config.axes_dims)}."
            )
        return config
