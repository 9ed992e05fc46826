"""FLUX.2-klein (Black Forest Labs 2026): a transformer over hidden states of Qwen3, distilled or guided."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from app.diffusion.families.components import CHAT_TOKENIZER, qwen3
from app.diffusion.families.family import (
    REFERENCES,
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
from app.diffusion.models.flow_config import Flux2Config, Flux2VAEConfig, Qwen3Config
from app.diffusion.models.flow_shapes import flux2_tensors, flux2_vae_tensors
from app.diffusion.samplers import FlowSchedule, Schedule
from app.types import Capabilities, Generation, InvalidField, Mask, RequestDefaults, Size

MOST_REFERENCES = 4  # as Black Forest Labs' documentation has it


def flux2(config: Flux2Config, **options: Any) -> Any:
    from app.diffusion.models.flux2 import Flux2

    return Flux2(config, **options)


def flux2_vae(config: Flux2VAEConfig, **options: Any) -> Any:
    from app.diffusion.models.flux2_vae import Flux2VAE

    return Flux2VAE(config, **options)


@dataclass(frozen=True)
class Flux2Klein(FamilyDefaults):
    PIPELINES: ClassVar[tuple[str, ...]] = ("Flux2KleinPipeline",)
    COMPONENTS: ClassVar[Mapping[str, Component]] = {
        "transformer": Component("Flux2Transformer2DModel", "denoise", Flux2Config.from_json, flux2_tensors, flux2),
        "vae": Component(
            "AutoencoderKLFlux2",
            "decode",
            Flux2VAEConfig.from_json,
            flux2_vae_tensors,
            flux2_vae,
            unread=Flux2VAEConfig.unread,
        ),
        "text_encoder": qwen3((9, 18, 27)),
    }
    TOKENIZERS: ClassVar[Mapping[str, str]] = {"tokenizer": "text_encoder"}
    TOKENIZER: ClassVar[TokenizerKind] = CHAT_TOKENIZER
    TRANSFORMER: ClassVar[bool] = True

    transformer: Flux2Config
    vae: Flux2VAEConfig
    text_encoder: Qwen3Config
    is_distilled: bool

    @classmethod
    def of(cls, configs: Mapping[str, Any], index: Json) -> "Flux2Klein":
        return cls(**configs, is_distilled=index.get("is_distilled") is True)

    @classmethod
    def schedule(cls, config: Json) -> tuple[FlowSchedule, list[str]]:
        return FlowSchedule.from_config(config, dynamic="flux2"), []

    def problems(self) -> list[str]:
        problems = []
        if self.transformer.joint_attention_dim != self.text_encoder.features:
            problems.append(
                f"transformer/config.json: joint_attention_dim must be {self.text_encoder.features}, "
                f"{len(self.text_encoder.hidden_states)} times the text encoder's hidden_size, "
                f"got {self.transformer.joint_attention_dim}."
            )
        if self.transformer.in_channels != self.vae.patch_channels:
            problems.append(
                f"transformer/config.json: in_channels must be {self.vae.patch_channels}, 4 times the VAE's "
                f"latent_channels, got {self.transformer.in_channels}."
            )
        return problems

    def check(self, generation: Generation) -> None:
        if not self.is_distilled:
            return
        why = "This model is distilled: it draws in one pass a step, without guidance"
        if generation.guided:
            raise InvalidField(
                "guidance_scale", f"guidance_scale must be at most 1, got {generation.guidance_scale:g}. {why}."
            )
        if generation.negative_prompt:
            raise InvalidField("negative_prompt", f"negative_prompt must be empty. {why}, so nothing would read it.")

    def defaults(self, schedule: Schedule | FlowSchedule) -> RequestDefaults:
        """As the model cards have them, and Flux2KleinPipeline for the guided one."""
        return RequestDefaults(4, 1.0) if self.is_distilled else RequestDefaults(50, 4.0)

    @property
    def latent_channels(self) -> int:
        return self.vae.patch_channels

    @property
    def pixels_per_latent(self) -> int:
        return 2 * self.vae.scale_factor

    @property
    def size_multiple(self) -> int:
        return self.pixels_per_latent

    def image_tokens(self, size: Size) -> int:
        width, height = (side // self.pixels_per_latent for side in size)
        return width * height

    @property
    def text_lengths(self) -> Mapping[str, int]:
        return {"tokenizer": self.text_encoder.text_length}

    def encode(self, networks: Networks, input_ids: Mapping[str, Array]) -> Conditioning:
        """Padding counts: the transformer attends to all of its tokens, as it was trained."""
        return {"prompt_embeds": networks["text_encoder"](input_ids["tokenizer"])}

    @property
    def capabilities(self) -> Capabilities:
        """With the strength of Flux2KleinInpaintPipeline. diffusers has no pipeline that begins from a whole image."""
        return Capabilities(edits=True, masks=True, references=MOST_REFERENCES, strength=0.8, mask_strength=0.8)

    def encode_image(self, networks: Networks, pixels: Array, *, strips: Strips) -> tuple[Array, Array]:
        mean, deviation = networks["vae"].posterior(pixels, strips=strips)
        return mean, deviation

    def latent_mask(self, mask: Mask) -> npt.NDArray[np.float32]:
        """As torch's bilinear interpolation has it: the mean of the four pixels in the middle of each patch."""
        side = self.pixels_per_latent
        height, width = (length // side for length in mask.shape)
        patches = mask.reshape(height, side, width, side)
        middle = slice(side // 2 - 1, side // 2 + 1)
        return patches[:, middle, :, middle].mean(axis=(1, 3), dtype=np.float32)

    def denoise(
        self, networks: Networks, latents: Array, timesteps: Array, conditioning: Conditioning, *, strips: Strips
    ) -> Array:
        embeds, references = conditioning["prompt_embeds"], conditioning.get(REFERENCES)
        return networks["transformer"](latents, timesteps, embeds, references, strips.shards)

    def decode(self, networks: Networks, latents: Array, *, strips: Strips) -> Array:
        return networks["vae"].decode(latents, strips=strips)

    def divides_images(self, verb: Role, size: Size, chips: int) -> bool:
        """The denoiser's text is divided too."""
        rows = size[1] // self.pixels_per_latent
        return rows % chips == 0 and (verb == "decode" or self.text_encoder.text_length % chips == 0)
