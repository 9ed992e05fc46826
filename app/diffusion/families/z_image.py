"""Z-Image (Tongyi-MAI 2025), Turbo and base: a single-stream transformer over a hidden state of Qwen3."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from app.diffusion.families.components import THINKING_TOKENIZER, VAE, AutoencoderFamily, qwen3
from app.diffusion.families.family import Array, Component, Conditioning, Json, Networks, Strips, TokenizerKind
from app.diffusion.models.config import VAEConfig
from app.diffusion.models.flow_config import Qwen3Config, ZImageConfig
from app.diffusion.models.flow_shapes import z_image_tensors
from app.diffusion.samplers import FlowSchedule, Schedule
from app.types import Capabilities, RequestDefaults, Size

TEXT_MULTIPLE = 32  # the denoiser's text is padded to multiples of so many tokens


def z_image(config: ZImageConfig, **options: Any) -> Any:
    from app.diffusion.models.z_image import ZImage

    return ZImage(config, **options)


@dataclass(frozen=True)
class ZImage(AutoencoderFamily):
    PIPELINES: ClassVar[tuple[str, ...]] = ("ZImagePipeline",)
    COMPONENTS: ClassVar[Mapping[str, Component]] = {
        "transformer": Component(
            "ZImageTransformer2DModel", "denoise", ZImageConfig.from_json, z_image_tensors, z_image
        ),
        "vae": VAE,
        "text_encoder": qwen3((-2,)),
    }
    TOKENIZERS: ClassVar[Mapping[str, str]] = {"tokenizer": "text_encoder"}
    TOKENIZER: ClassVar[TokenizerKind] = THINKING_TOKENIZER
    TRANSFORMER: ClassVar[bool] = True

    transformer: ZImageConfig
    vae: VAEConfig
    text_encoder: Qwen3Config

    @classmethod
    def of(cls, configs: Mapping[str, Any], index: Json) -> "ZImage":
        return cls(**configs)

    @classmethod
    def schedule(cls, config: Json) -> tuple[FlowSchedule, list[str]]:
        return FlowSchedule.from_config(config), []

    def problems(self) -> list[str]:
        pairs = [
            (
                "cap_feat_dim",
                self.transformer.cap_feat_dim,
                "the text encoder's hidden_size",
                self.text_encoder.features,
            ),
            ("in_channels", self.transformer.in_channels, "the VAE's latent_channels", self.vae.latent_channels),
        ]
        problems = [
            f"transformer/config.json: {name} must be {what} {wanted}, got {got}."
            for name, got, what, wanted in pairs
            if got != wanted
        ]
        if self.text_encoder.text_length % TEXT_MULTIPLE:
            problems.append(
                f"text_encoder/config.json: max_sequence_length must be a multiple of {TEXT_MULTIPLE}, "
                f"got {self.text_encoder.text_length}."
            )
        return problems

    def defaults(self, schedule: Schedule | FlowSchedule) -> RequestDefaults:
        """ZImagePipeline's, whose guidance counts from 0. No file says that Turbo is distilled."""
        return RequestDefaults(50, 6.0)

    @property
    def size_multiple(self) -> int:
        return 2 * self.vae.scale_factor

    def image_tokens(self, size: Size) -> int:
        width, height = (side // self.size_multiple for side in size)
        return width * height

    @property
    def text_lengths(self) -> Mapping[str, int]:
        return {"tokenizer": self.text_encoder.text_length}

    def encode(self, networks: Networks, input_ids: Mapping[str, Array]) -> Conditioning:
        ids = input_ids["tokenizer"]
        return {"prompt_embeds": networks["text_encoder"](ids), "length": (ids >= 0).sum(axis=1)}

    @property
    def capabilities(self) -> Capabilities:
        """With the strengths of ZImageImg2ImgPipeline and ZImageInpaintPipeline."""
        return Capabilities(edits=True, masks=True, strength=0.6)

    def denoise(
        self, networks: Networks, latents: Array, timesteps: Array, conditioning: Conditioning, *, strips: Strips
    ) -> Array:
        """This model's clock runs from noise to the image, and so does its velocity."""
        clock = 1 - timesteps / 1000
        return -networks["transformer"](latents, clock, conditioning["prompt_embeds"], conditioning["length"])
