"""The networks that several families have. Their modules are imported where they are built, so this needs no JAX."""

from typing import Any

from app.diffusion.families.family import Component
from app.diffusion.models.config import CLIPTextConfig, UNetConfig, VAEConfig
from app.diffusion.models.shapes import text_encoder_tensors, unet_tensors, vae_tensors


def unet(config: UNetConfig, **options: Any) -> Any:
    from app.diffusion.models.unet import UNet

    return UNet(config, **options)


def vae(config: VAEConfig, **options: Any) -> Any:
    from app.diffusion.models.vae import VAE

    return VAE(config, **options)


def clip_text(config: CLIPTextConfig, **options: Any) -> Any:
    from app.diffusion.models.clip import CLIPText

    return CLIPText(config, **options)


UNET = Component("UNet2DConditionModel", "denoise", UNetConfig.from_json, unet_tensors, unet)
VAE = Component("AutoencoderKL", "decode", VAEConfig.from_json, vae_tensors, vae)
CLIP_TEXT = Component(
    "CLIPTextModel", "encode", CLIPTextConfig.from_json, text_encoder_tensors, clip_text, stem="model"
)
