"""Stable Diffusion 1.x and 2.x (Rombach et al. 2022): a UNet over the last hidden states of one text encoder."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from app.diffusion.families.components import CLIP_TEXT, CLIP_TOKENIZER, UNET, VAE
from app.diffusion.families.family import Array, Component, Conditioning, Json, Networks, TokenizerKind
from app.diffusion.models.config import CLIPTextConfig, UNetConfig, VAEConfig, mismatches
from app.diffusion.models.scheduler_config import corrected
from app.diffusion.samplers import Schedule
from app.types import Generation, Size


@dataclass(frozen=True)
class StableDiffusion:
    PIPELINES: ClassVar[tuple[str, ...]] = ("StableDiffusionPipeline",)
    COMPONENTS: ClassVar[Mapping[str, Component]] = {"unet": UNET, "vae": VAE, "text_encoder": CLIP_TEXT}
    TOKENIZERS: ClassVar[Mapping[str, str]] = {"tokenizer": "text_encoder"}
    TOKENIZER: ClassVar[TokenizerKind] = CLIP_TOKENIZER

    unet: UNetConfig
    vae: VAEConfig
    text_encoder: CLIPTextConfig

    @classmethod
    def of(cls, configs: Mapping[str, Any], index: Json) -> "StableDiffusion":
        return cls(**configs)

    @classmethod
    def schedule(cls, config: Json) -> tuple[Schedule, list[str]]:
        changed, remarks = corrected(config)
        return Schedule.from_config(changed), remarks

    def problems(self) -> list[str]:
        return mismatches(self.unet, self.vae, self.text_encoder)

    def check(self, generation: Generation) -> None:
        """Every request can be followed."""

    def image_tokens(self, size: Size) -> None:
        return None

    @property
    def latent_channels(self) -> int:
        return self.vae.latent_channels

    @property
    def pixels_per_latent(self) -> int:
        return self.vae.scale_factor

    @property
    def size_multiple(self) -> int:
        return self.vae.scale_factor * self.unet.scale_factor

    @property
    def strip_rows(self) -> int:
        return self.unet.scale_factor

    @property
    def text_lengths(self) -> Mapping[str, int]:
        return {"tokenizer": self.text_encoder.max_position_embeddings}

    def encode(self, networks: Networks, input_ids: Mapping[str, Array]) -> Conditioning:
        return {"prompt_embeds": networks["text_encoder"](input_ids["tokenizer"])}

    def denoise(
        self, networks: Networks, latents: Array, timesteps: Array, conditioning: Conditioning, *, strips: int
    ) -> Array:
        return networks["unet"](latents, timesteps, conditioning["prompt_embeds"], strips=strips)

    def decode(self, networks: Networks, latents: Array, *, strips: int) -> Array:
        return networks["vae"].decode(latents, strips=strips)
