"""What several families have in common. Modules are imported where they are built, so this needs no JAX."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from app.diffusion.families.family import (
    OUTSIDE,
    Array,
    Component,
    Conditioning,
    FamilyDefaults,
    Json,
    Networks,
    Role,
    Strips,
    TokenizerKind,
)
from app.diffusion.models.config import PROJECTED, CLIPTextConfig, UNetConfig, VAEConfig
from app.diffusion.models.flow_config import Qwen3Config
from app.diffusion.models.flow_shapes import qwen3_tensors
from app.diffusion.models.shapes import text_encoder_tensors, unet_tensors, vae_tensors
from app.diffusion.samplers import FlowSchedule, Schedule
from app.types import Capabilities, RequestDefaults, Size


def unet(config: UNetConfig, **options: Any) -> Any:
    from app.diffusion.models.unet import UNet

    return UNet(config, **options)


def vae(config: VAEConfig, **options: Any) -> Any:
    from app.diffusion.models.vae import VAE

    return VAE(config, **options)


def clip_text(config: CLIPTextConfig, **options: Any) -> Any:
    from app.diffusion.models.clip import CLIPText

    return CLIPText(config, **options)


def qwen3(hidden_states: tuple[int, ...]) -> Component:
    """A text encoder that gives these hidden states of Qwen3, unless its config.json names others."""

    def read(content: Json, problems: list[str], where: str) -> Qwen3Config:
        return Qwen3Config.from_json(content, problems, where, hidden_states)

    def network(config: Qwen3Config, **options: Any) -> Any:
        from app.diffusion.models.qwen3 import Qwen3

        return Qwen3(config, **options)

    options: dict[str, Any] = {"stem": "model", "unread": Qwen3Config.unread, "aliases": ("Qwen3Model",)}
    return Component("Qwen3ForCausalLM", "encode", read, qwen3_tensors, network, **options)


def clip_tokenizer(folder: Path, length: int) -> Any:
    from app.diffusion.models.tokenizer import Tokenizer

    return Tokenizer(folder, length)


def chat_tokenizer(folder: Path, length: int) -> Any:
    from app.diffusion.models.chat_tokenizer import ChatTokenizer

    return ChatTokenizer(folder, length, thinking=False)


def thinking_tokenizer(folder: Path, length: int) -> Any:
    from app.diffusion.models.chat_tokenizer import ChatTokenizer

    return ChatTokenizer(folder, length, thinking=True)


CLIP_TOKENIZER = TokenizerKind("CLIPTokenizer", clip_tokenizer, fixed_length=True)
CHAT_TOKENIZER = TokenizerKind("Qwen2Tokenizer", chat_tokenizer, fixed_length=False)
THINKING_TOKENIZER = TokenizerKind("Qwen2Tokenizer", thinking_tokenizer, fixed_length=False)

UNET = Component("UNet2DConditionModel", "denoise", UNetConfig.from_json, unet_tensors, unet)
VAE = Component("AutoencoderKL", "decode", VAEConfig.from_json, vae_tensors, vae, unread=VAEConfig.unread)
CLIP_TEXT = Component(
    "CLIPTextModel", "encode", CLIPTextConfig.from_json, text_encoder_tensors, clip_text, stem="model"
)
CLIP_TEXT_PROJECTED = Component(
    PROJECTED,
    "encode",
    partial(CLIPTextConfig.from_json, class_name=PROJECTED),
    text_encoder_tensors,
    clip_text,
    stem="model",
)


def few_step_defaults(unet: UNetConfig, schedule: Schedule | FlowSchedule) -> RequestDefaults | None:
    """Of a UNet whose files say that it was distilled to few steps; else None.

    Consistency models (Luo et al. 2023) embed the guidance scale, which LatentConsistencyModelPipeline sets to 8.5, or
    name their scheduler. Turbo models (Sauer et al. 2023) name Euler with trailing timesteps, as do models with a zero
    terminal SNR, which need many steps; but these predict no noise.
    """
    if unet.guidance_features is not None:
        return RequestDefaults(4, 8.5)
    if not isinstance(schedule, Schedule):
        return None
    consistent = schedule.class_name in ("LCMScheduler", "TCDScheduler")
    euler = schedule.class_name in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
    turbo = euler and schedule.timestep_spacing == "trailing" and schedule.prediction_type == "epsilon"
    return RequestDefaults(4, 1.0) if consistent or turbo else None


def guidance_embedding(guidance_scale: float, features: int) -> npt.NDArray[np.float32]:
    """[features]: what a UNet distilled with guidance takes (Meng et al. 2023; get_guidance_scale_embedding)."""
    half = features // 2
    frequencies = np.exp(-np.log(10000.0) / (half - 1) * np.arange(half))
    angles = 1000.0 * (guidance_scale - 1) * frequencies
    return np.pad(np.concatenate([np.sin(angles), np.cos(angles)]), (0, features % 2)).astype(np.float32)


def guidance_numbers(unet: UNetConfig, guidance_scale: float) -> dict[str, npt.NDArray[np.float32]]:
    """The embedded guidance scale for both rows, if this UNet takes it."""
    if unet.guidance_features is None:
        return {}
    return {"guidance": np.stack([guidance_embedding(guidance_scale, unet.guidance_features)] * 2)}


class AutoencoderFamily(FamilyDefaults):
    """What families with an AutoencoderKL have in common: how latents relate to pixels."""

    vae: VAEConfig

    @property
    def latent_channels(self) -> int:
        return self.vae.latent_channels

    @property
    def pixels_per_latent(self) -> int:
        return self.vae.scale_factor

    def encode_image(self, networks: Networks, pixels: Array, *, strips: Strips) -> tuple[Array, Array]:
        mean, deviation = networks["vae"].posterior(pixels, strips=strips)
        return mean, deviation

    def decode(self, networks: Networks, latents: Array, *, strips: Strips) -> Array:
        return networks["vae"].decode(latents, strips=strips)

    def divides_images(self, verb: Role, size: Size, chips: int) -> bool:
        return verb == "decode" and size[1] // self.pixels_per_latent % chips == 0


class UNetFamily(AutoencoderFamily):
    """What families of a UNet and an AutoencoderKL have in common."""

    unet: UNetConfig

    @property
    def size_multiple(self) -> int:
        return self.vae.scale_factor * self.unet.scale_factor

    @property
    def strip_rows(self) -> int:
        return self.unet.scale_factor

    @property
    def embeds_guidance(self) -> bool:
        return self.unet.guidance_features is not None

    @property
    def fills_masks(self) -> bool:
        return self.unet.in_channels != self.vae.latent_channels

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(generations=not self.fills_masks, edits=True, masks=True)

    def denoise(
        self, networks: Networks, latents: Array, timesteps: Array, conditioning: Conditioning, *, strips: Strips
    ) -> Array:
        """An inpainting UNet has the mask and the latents of what is outside of it as further channels."""
        others = {name: value for name, value in conditioning.items() if name != OUTSIDE}
        if self.fills_masks:
            latents = latents.__array_namespace__().concat([latents, conditioning[OUTSIDE]], axis=-1)
        return networks["unet"](latents, timesteps, **others, strips=strips)
