"""Stable Diffusion 1.x and 2.x (Rombach et al. 2022): a UNet over the last hidden states of one text encoder."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from app.diffusion.families.components import (
    CLIP_TEXT,
    CLIP_TOKENIZER,
    UNET,
    VAE,
    UNetFamily,
    few_step_defaults,
    guidance_numbers,
)
from app.diffusion.families.family import Array, Component, Conditioning, Json, Networks, TokenizerKind
from app.diffusion.models.config import CLIPTextConfig, UNetConfig, VAEConfig, mismatches
from app.diffusion.models.scheduler_config import corrected
from app.diffusion.samplers import FlowSchedule, Schedule
from app.types import RequestDefaults, Size


@dataclass(frozen=True)
class StableDiffusion(UNetFamily):
    PIPELINES: ClassVar[tuple[str, ...]] = ("StableDiffusionPipeline", "LatentConsistencyModelPipeline")
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
        problems = mismatches(self.unet, self.vae, self.text_encoder)
        if self.unet.added_features is not None:
            problems.append("unet/config.json: addition_embed_type must be None for Stable Diffusion, got 'text_time'.")
        return problems

    def defaults(self, schedule: Schedule | FlowSchedule) -> RequestDefaults:
        return few_step_defaults(self.unet, schedule) or RequestDefaults(guidance_scale=7.5)

    @property
    def text_lengths(self) -> Mapping[str, int]:
        return {"tokenizer": self.text_encoder.max_position_embeddings}

    def encode(self, networks: Networks, input_ids: Mapping[str, Array]) -> Conditioning:
        return {"prompt_embeds": networks["text_encoder"](input_ids["tokenizer"])}

    def numbers(
        self, size: Size, guidance_scale: float, fields: Mapping[str, Any]
    ) -> dict[str, npt.NDArray[np.float32]]:
        return guidance_numbers(self.unet, guidance_scale)
