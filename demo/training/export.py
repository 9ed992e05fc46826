"""Writes the trained networks as a folder in diffusers layout."""

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from app.diffusion.models.clip import CLIPText
from app.diffusion.models.tensors import to_tensors
from app.diffusion.models.unet import UNet
from app.diffusion.models.vae import VAE
from demo.training.files import write_json
from demo.training.networks import SCHEDULER_JSON, Architecture


def export(
    out: Path, architecture: Architecture, vae: VAE, unet: UNet, text_encoder: CLIPText, scaling_factor: float
) -> None:
    """Writes the networks in float16."""
    text_json = {**architecture.text_json, "vocab_size": text_encoder.config.vocab_size}
    parts = {
        "vae": ("diffusion_pytorch_model", vae, {**architecture.vae_json, "scaling_factor": round(scaling_factor, 6)}),
        "unet": ("diffusion_pytorch_model", unet, architecture.unet_json),
        "text_encoder": ("model", text_encoder, text_json),
    }
    for part, (stem, module, config) in parts.items():
        (out / part).mkdir(parents=True, exist_ok=True)
        write_json(out / part / "config.json", config)
        save_file(to_tensors(module, np.float16), out / part / f"{stem}.safetensors", {"format": "pt"})
    (out / "scheduler").mkdir(exist_ok=True)
    write_json(out / "scheduler" / "scheduler_config.json", SCHEDULER_JSON)
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", SCHEDULER_JSON["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    write_json(out / "model_index.json", index)
