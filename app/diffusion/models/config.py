"""Architectures, read from a checkpoint's own JSON files. Knows nothing of weights or arrays.

Each `from_json` appends a sentence to `problems` for everything it cannot honour, so that the loader can say all of
them at once; an option that we do not know is a problem too, never ignored.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

# Options of diffusers' UNet2DConditionModel that Stable Diffusion leaves at these values.
UNET_FIXED: dict[str, Any] = {
    "act_fn": "silu",
    "addition_embed_type_num_heads": 64,
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dropout": 0.0,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}
VAE_FIXED: dict[str, Any] = {
    "act_fn": "silu",
    "latents_mean": None,
    "latents_std": None,
}
# Options of transformers' CLIPTextModel, and of how diffusers calls it, that would change what it computes.
TEXT_FIXED: dict[str, Any] = {
    "add_cross_attention": False,
    "is_decoder": False,
    "pruned_heads": {},
    "quantization_config": None,
    "use_attention_mask": False,
}
PROJECTED = "CLIPTextModelWithProjection"
# Read by other code or by nobody: they change nothing in the network.
NEUTRAL = {"_class_name", "_diffusers_version", "_name_or_path", "sample_size", "upcast_attention", "force_upcast"}


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """UNet2DConditionModel. What differs by level stands finest first."""

    in_channels: int
    out_channels: int
    block_out_channels: tuple[int, ...]
    down_block_types: tuple[str, ...]
    up_block_types: tuple[str, ...]
    layers_per_block: int
    attention_heads: tuple[int, ...]
    transformer_layers: tuple[int, ...]
    cross_attention_dim: int
    norm_num_groups: int
    norm_eps: float
    added_features: int | None  # of the pooled text and the embedded size numbers, where the UNet takes them
    size_features: int | None  # of each embedded size number
    guidance_features: int | None  # of the embedded guidance scale, where a distilled UNet takes it

    @property
    def scale_factor(self) -> int:
        """Latents per position of the coarsest level, along each side."""
        return int(2 ** (len(self.block_out_channels) - 1))

    @classmethod
    def from_json(cls, json: Mapping[str, Any], problems: list[str], where: str = "unet/config.json") -> "UNetConfig":
        fields = Fields(where, "UNet2DConditionModel", json, UNET_FIXED, problems)
        channels = fields.numbers("block_out_channels", (320, 640, 1280, 1280))
        # diffusers' name is wrong for history's sake: it counts heads (huggingface/diffusers issue 2011).
        heads = fields.per_level("attention_head_dim", 8, len(channels))
        fields.choice("addition_embed_type", (None, "text_time"))
        added = json.get("addition_embed_type") is not None
        config = cls(
            in_channels=fields.get("in_channels", 4),
            out_channels=fields.get("out_channels", 4),
            block_out_channels=channels,
            down_block_types=fields.choices(
                "down_block_types", ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), len(channels)
            ),
            up_block_types=fields.choices(
                "up_block_types", ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, len(channels)
            ),
            layers_per_block=fields.get("layers_per_block", 2),
            attention_heads=heads,
            transformer_layers=fields.per_level("transformer_layers_per_block", 1, len(channels)),
            cross_attention_dim=fields.get("cross_attention_dim", 1280),
            norm_num_groups=fields.get("norm_num_groups", 32),
            norm_eps=fields.get("norm_eps", 1e-5),
            added_features=fields.number("projection_class_embeddings_input_dim", needed=added) if added else None,
            size_features=fields.number("addition_time_embed_dim", needed=added) if added else None,
            guidance_features=fields.number("time_cond_proj_dim"),
        )
        fields.used("projection_class_embeddings_input_dim")
        fields.used("addition_time_embed_dim")
        fields.used("use_linear_projection")  # the loader takes a 1x1 convolution and a linear layer alike
        fields.finish()
        for channel, head in zip(channels, heads, strict=False):
            fields.divides(channel, head, "attention heads")
            fields.divides(channel, config.norm_num_groups, "groups (norm_num_groups)")
        return config


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """AutoencoderKL."""

    in_channels: int
    out_channels: int
    latent_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    norm_num_groups: int
    scaling_factor: float
    shift_factor: float
    mid_block_add_attention: bool
    use_quant_conv: bool
    use_post_quant_conv: bool
    encoder: bool = dataclasses.field(default=True, kw_only=True)  # False: the network only decodes

    def unread(self, tensor: str) -> bool:
        """Whether a tensor of the checkpoint belongs to the encoder of a network that has none."""
        return not self.encoder and tensor.startswith(("encoder.", "quant_conv."))

    @property
    def scale_factor(self) -> int:
        """Pixels per latent, along each side."""
        return int(2 ** (len(self.block_out_channels) - 1))

    @classmethod
    def from_json(cls, json: Mapping[str, Any], problems: list[str], where: str = "vae/config.json") -> "VAEConfig":
        fields = Fields(where, "AutoencoderKL", json, VAE_FIXED, problems)
        channels = fields.numbers("block_out_channels", (64,))
        fields.choices("down_block_types", ("DownEncoderBlock2D",), len(channels))
        fields.choices("up_block_types", ("UpDecoderBlock2D",), len(channels))
        config = cls(
            in_channels=fields.get("in_channels", 3),
            out_channels=fields.get("out_channels", 3),
            latent_channels=fields.get("latent_channels", 4),
            block_out_channels=channels,
            layers_per_block=fields.get("layers_per_block", 1),
            norm_num_groups=fields.get("norm_num_groups", 32),
            scaling_factor=fields.get("scaling_factor", 0.18215),
            shift_factor=fields.get("shift_factor", 0.0) if json.get("shift_factor") else 0.0,
            mid_block_add_attention=fields.get("mid_block_add_attention", True),
            use_quant_conv=fields.get("use_quant_conv", True),
            use_post_quant_conv=fields.get("use_post_quant_conv", True),
        )
        fields.used("shift_factor")
        fields.finish()
        if (config.in_channels, config.out_channels) != (3, 3):
            problems.append(
                f"vae/config.json: in_channels and out_channels must be 3 (RGB), "
                f"got {config.in_channels} and {config.out_channels}."
            )
        for channel in channels:
            fields.divides(channel, config.norm_num_groups, "groups (norm_num_groups)")
        return config


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """CLIPTextModel, or CLIPTextModelWithProjection where there is a `projection_dim`.

    SD 2.x's "penultimate layer" needs no option: its checkpoints simply hold one layer fewer.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    hidden_act: str
    layer_norm_eps: float
    eos_token_id: int
    projection_dim: int | None

    @classmethod
    def from_json(
        cls,
        json: Mapping[str, Any],
        problems: list[str],
        where: str = "text_encoder/config.json",
        *,
        class_name: str = "CLIPTextModel",
    ) -> "CLIPTextConfig":
        # transformers writes dozens of generation options into any config: only those that shape the network count.
        architecture = (json.get("architectures") or [class_name])[0]
        if architecture != class_name:
            problems.append(f"{where}: architectures must name {class_name}, got {architecture}.")
        projection_dim = json.get("projection_dim", 512) if class_name == PROJECTED else None
        if projection_dim is not None and (type(projection_dim) is not int or projection_dim < 1):
            problems.append(f"{where}: projection_dim must be a positive number, got {projection_dim!r}.")
        for name, fixed in TEXT_FIXED.items():
            if json.get(name) and json[name] != fixed:
                problems.append(f"{where}: {name} must be {fixed!r}, got {json[name]!r}.")
        act = json.get("hidden_act", "quick_gelu")
        if act not in ("quick_gelu", "gelu"):
            problems.append(f"{where}: hidden_act must be quick_gelu or gelu, got {act}.")
        config = cls(
            vocab_size=json.get("vocab_size", 49408),
            hidden_size=json.get("hidden_size", 512),
            intermediate_size=json.get("intermediate_size", 2048),
            num_hidden_layers=json.get("num_hidden_layers", 12),
            num_attention_heads=json.get("num_attention_heads", 8),
            max_position_embeddings=json.get("max_position_embeddings", 77),
            hidden_act=act,
            layer_norm_eps=json.get("layer_norm_eps", 1e-5),
            eos_token_id=json.get("eos_token_id", 49407),
            projection_dim=projection_dim,
        )
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if field.type in (int, float) and not (isinstance(value, (int, float)) and value > 0):
                problems.append(f"{where}: {field.name} must be a positive number, got {value!r}.")
                return config
        if config.hidden_size % config.num_attention_heads:
            problems.append(
                f"{where}: hidden_size {config.hidden_size} cannot be split into {config.num_attention_heads} heads."
            )
        return config


def mismatches(unet: UNetConfig, vae: VAEConfig, *texts: CLIPTextConfig) -> list[str]:
    """What the networks must agree on."""
    problems = []
    features = sum(text.hidden_size for text in texts)
    if unet.cross_attention_dim != features:
        whose = "the text encoder's hidden_size" if len(texts) == 1 else "the text encoders' hidden sizes together,"
        problems.append(
            f"unet/config.json: cross_attention_dim must be {whose} {features}, got {unet.cross_attention_dim}."
        )
    channels = vae.latent_channels
    if unet.in_channels not in (channels, 2 * channels + 1):
        problems.append(
            f"unet/config.json: in_channels must be the VAE's latent_channels {channels} (text to image) or "
            f"{2 * channels + 1} (inpainting), got {unet.in_channels}."
        )
    if unet.out_channels != channels:
        problems.append(
            f"unet/config.json: out_channels must be the VAE's latent_channels {channels}, got {unet.out_channels}."
        )
    return problems


class Fields:
    """Reads one diffusers config.json, and notes every option that was not read."""

    def __init__(
        self, where: str, class_name: str, json: Mapping[str, Any], fixed: dict[str, Any], problems: list[str]
    ):
        self.where, self.json, self.fixed, self.problems = where, json, fixed, problems
        self.seen = set(NEUTRAL)
        got = json.get("_class_name", class_name)
        if got != class_name:
            problems.append(f"{where}: _class_name must be {class_name}, got {got}.")

    def used(self, name: str) -> None:
        self.seen.add(name)

    def get(self, name: str, default: Any) -> Any:
        """A positive number or a boolean, as the default is."""
        self.used(name)
        value = self.json.get(name, default)
        if isinstance(default, bool):
            right, wanted = isinstance(value, bool), "true or false"
        else:
            kinds = (int, float) if isinstance(default, float) else (int,)
            right, wanted = type(value) in kinds and value > 0, "a positive number"
        if not right:
            self.problems.append(f"{self.where}: {name} must be {wanted}, got {value!r}.")
            return default
        return value

    def number(self, name: str, *, needed: bool = False) -> int | None:
        """A positive whole number; or null, unless it is needed."""
        self.used(name)
        value = self.json.get(name)
        if (value is None and not needed) or (type(value) is int and value > 0):
            return value
        self.problems.append(f"{self.where}: {name} must be a positive whole number, got {value!r}.")
        return None

    def choice(self, name: str, allowed: tuple[str | None, ...]) -> None:
        self.used(name)
        if (value := self.json.get(name)) not in allowed:
            self.problems.append(f"{self.where}: {name} must be {' or '.join(map(repr, allowed))}, got {value!r}.")

    def numbers(self, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
        self.used(name)
        value = self.json.get(name, default)
        if not isinstance(value, (list, tuple)) or not value or not all(type(v) is int and v > 0 for v in value):
            self.problems.append(f"{self.where}: {name} must be a list of positive whole numbers, got {value!r}.")
            return default
        return tuple(value)

    def per_level(self, name: str, default: int, levels: int) -> tuple[int, ...]:
        value = self.json.get(name, default)
        if type(value) is int and value > 0:
            self.used(name)
            return (value,) * levels
        values = self.numbers(name, (default,) * levels)
        if len(values) != levels:
            self.problems.append(f"{self.where}: {name} must have {levels} entries, one a level, got {list(values)}.")
            return (default,) * levels
        return values

    def choices(self, name: str, default: tuple[str, ...], levels: int) -> tuple[str, ...]:
        """Block types, one a level; the default's own set is the whole choice."""
        self.used(name)
        allowed = sorted(set(default))
        value = tuple(self.json.get(name, default))
        if len(value) != levels or not set(value) <= set(allowed):
            self.problems.append(
                f"{self.where}: {name} must name {levels} blocks out of {', '.join(allowed)}, got {list(value)}."
            )
            return (allowed[0],) * levels
        return value

    def divides(self, channels: int, parts: int, what: str) -> None:
        if channels % parts:
            self.problems.append(f"{self.where}: {channels} channels cannot be split into {parts} {what}.")

    def finish(self) -> None:
        for name, value in self.json.items():
            if name in self.seen:
                continue
            if name not in self.fixed:
                self.problems.append(f"{self.where}: {name} is not an option that we know (its value is {value!r}).")
            elif value != self.fixed[name]:
                self.problems.append(f"{self.where}: {name} must be {self.fixed[name]!r}, got {value!r}.")
