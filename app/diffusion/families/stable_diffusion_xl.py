"""SDXL (Podell et al. 2023): a UNet over the penultimate states of two text encoders, that also knows sizes.

SDXL-Turbo and the other distilled models of its architecture are of this family too: they differ in their schedule.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from app.diffusion.families.components import (
    CLIP_TEXT,
    CLIP_TEXT_PROJECTED,
    CLIP_TOKENIZER,
    UNET,
    VAE,
    UNetFamily,
    few_step_defaults,
    guidance_numbers,
)
from app.diffusion.families.family import Array, Component, Conditioning, Json, Networks, TokenizerKind
from app.diffusion.models.config import CLIPTextConfig, UNetConfig, VAEConfig, mismatches
from app.diffusion.samplers import FlowSchedule, Schedule
from app.types import Capabilities, RequestDefaults, Size

SIZE_NUMBERS = 6  # height and width of the original, top and left of the crop, height and width of the target


@dataclass(frozen=True)
class StableDiffusionXL(UNetFamily):
    PIPELINES: ClassVar[tuple[str, ...]] = ("StableDiffusionXLPipeline",)
    COMPONENTS: ClassVar[Mapping[str, Component]] = {
        "unet": UNET,
        "vae": VAE,
        "text_encoder": CLIP_TEXT,
        "text_encoder_2": CLIP_TEXT_PROJECTED,
    }
    TOKENIZERS: ClassVar[Mapping[str, str]] = {"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2"}
    TOKENIZER: ClassVar[TokenizerKind] = CLIP_TOKENIZER
    FIELDS: ClassVar[frozenset[str]] = frozenset({"original_size", "crops_coords_top_left", "target_size"})

    unet: UNetConfig
    vae: VAEConfig
    text_encoder: CLIPTextConfig
    text_encoder_2: CLIPTextConfig
    force_zeros_for_empty_prompt: bool  # an empty negative prompt is zeros instead of an encoded empty text

    @classmethod
    def of(cls, configs: Mapping[str, Any], index: Json) -> "StableDiffusionXL":
        return cls(**configs, force_zeros_for_empty_prompt=index.get("force_zeros_for_empty_prompt", True) is True)

    @classmethod
    def schedule(cls, config: Json) -> tuple[Schedule, list[str]]:
        return Schedule.from_config(config), []

    def problems(self) -> list[str]:
        texts = (self.text_encoder, self.text_encoder_2)
        problems = mismatches(self.unet, self.vae, *texts)
        lengths = [text.max_position_embeddings for text in texts]
        if lengths[0] != lengths[1]:
            problems.append(
                f"text_encoder_2/config.json: max_position_embeddings must be the first text encoder's {lengths[0]}, "
                f"got {lengths[1]}."
            )
        if self.unet.added_features is None or self.unet.size_features is None:
            problems.append(
                "unet/config.json: addition_embed_type must be 'text_time' for Stable Diffusion XL, got None."
            )
            return problems
        features = (self.text_encoder_2.projection_dim or 0) + SIZE_NUMBERS * self.unet.size_features
        if self.unet.added_features != features:
            problems.append(
                "unet/config.json: projection_class_embeddings_input_dim must be text_encoder_2's projection_dim and "
                f"{SIZE_NUMBERS} times addition_time_embed_dim, {features}, got {self.unet.added_features}."
            )
        return problems

    def defaults(self, schedule: Schedule | FlowSchedule) -> RequestDefaults:
        return few_step_defaults(self.unet, schedule) or RequestDefaults(guidance_scale=5.0)

    @property
    def text_lengths(self) -> Mapping[str, int]:
        return {name: getattr(self, part).max_position_embeddings for name, part in self.TOKENIZERS.items()}

    def encode(self, networks: Networks, input_ids: Mapping[str, Array]) -> Conditioning:
        states = {name: networks[part].penultimate(input_ids[name]) for name, part in self.TOKENIZERS.items()}
        pooled = networks["text_encoder_2"].pooled(input_ids["tokenizer_2"], states["tokenizer_2"])
        xp = pooled.__array_namespace__()
        return {"prompt_embeds": xp.concat(list(states.values()), axis=-1), "text_embeds": pooled}

    def numbers(
        self, size: Size, guidance_scale: float, fields: Mapping[str, Any]
    ) -> dict[str, npt.NDArray[np.float32]]:
        whole = size[::-1]  # diffusers' sizes are height and width
        defaults = {"original_size": whole, "crops_coords_top_left": (0, 0), "target_size": whole}
        time_ids = np.array([fields.get(name) or default for name, default in defaults.items()], np.float32).reshape(-1)
        return {"time_ids": np.stack([time_ids] * 2), **guidance_numbers(self.unet, guidance_scale)}

    @property
    def capabilities(self) -> Capabilities:
        """With the strengths of StableDiffusionXLImg2ImgPipeline and StableDiffusionXLInpaintPipeline."""
        return replace(super().capabilities, strength=0.3, mask_strength=0.9999)

    @property
    def zero_negative(self) -> bool:
        return self.force_zeros_for_empty_prompt
