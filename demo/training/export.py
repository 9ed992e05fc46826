"""Writes the trained networks as folders in diffusers layout."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from app.diffusion.models.clip import CLIPText
from app.diffusion.models.flux2 import Flux2
from app.diffusion.models.loading import Checkpoint
from app.diffusion.models.qwen3 import Qwen3
from app.diffusion.models.small_files import read_json
from app.diffusion.models.tensors import to_tensors
from app.diffusion.models.unet import UNet
from app.diffusion.models.vae import VAE
from demo.training.files import write_json
from demo.training.flow_networks import SCHEDULER_JSON as FLOW_SCHEDULER_JSON
from demo.training.flow_networks import VAE_CHANGES, FlowArchitecture
from demo.training.networks import SCHEDULER_JSON, Architecture


def export(
    out: Path, architecture: Architecture, vae: VAE, unet: UNet, text_encoder: CLIPText, scaling_factor: float
) -> None:
    """Writes the networks in float16."""
    text_json = {**architecture.text_json, "vocab_size": text_encoder.config.vocab_size}
    vae_json = {**architecture.vae_json, "scaling_factor": round(scaling_factor, 6)}
    parts = {
        "vae": (to_tensors(vae, np.float16), vae_json),
        "unet": (to_tensors(unet, np.float16), architecture.unet_json),
        "text_encoder": (to_tensors(text_encoder, np.float16), text_json),
    }
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
    write_folder(out, parts, SCHEDULER_JSON, index)


def write_folder(
    out: Path,
    parts: Mapping[str, tuple[dict[str, np.ndarray], Mapping[str, Any]]],
    scheduler: Mapping[str, Any],
    index: Mapping[str, Any],
) -> None:
    """Writes the tensors and the config.json of each part, the scheduler's file and model_index.json."""
    for part, (tensors, config) in parts.items():
        (out / part).mkdir(parents=True, exist_ok=True)
        write_json(out / part / "config.json", config)
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        save_file(tensors, out / part / f"{stem}.safetensors", {"format": "pt"})
    (out / "scheduler").mkdir(exist_ok=True)
    write_json(out / "scheduler" / "scheduler_config.json", scheduler)
    write_json(out / "model_index.json", index)


def export_flow(
    out: Path,
    architecture: FlowArchitecture,
    transformer: Flux2,
    text_encoder: Qwen3,
    vae: Checkpoint,
    mean: np.ndarray,
    deviation: np.ndarray,
) -> None:
    """Writes the networks in float16, but for the statistics: mean and deviation of each channel of the VAE's patches.

    `vae` is a checkpoint whose AutoencoderKL becomes an AutoencoderKLFlux2.
    """
    text_json = {**architecture.text_json, "vocab_size": text_encoder.config.vocab_size}
    text_tensors = {f"model.{name}": tensor for name, tensor in to_tensors(text_encoder, np.float16).items()}
    # transformers builds one more layer and a norm than anything reads.
    last = text_encoder.config.layers_read
    text_tensors |= {
        name.replace(f".layers.{last - 1}.", f".layers.{last}."): tensor for name, tensor in text_tensors.items()
    }
    text_tensors["model.norm.weight"] = np.ones(text_encoder.config.hidden_size, np.float16)
    statistics = {
        "bn.running_mean": mean.astype(np.float32),
        "bn.running_var": np.square(deviation).astype(np.float32) - np.float32(VAE_CHANGES["batch_norm_eps"]),
        "bn.num_batches_tracked": np.array(1, np.int64),
    }
    vae_json = read_json(vae.path / "vae" / "config.json", "vae/config.json", []) | VAE_CHANGES
    parts = {
        "transformer": (to_tensors(transformer, np.float16), architecture.transformer_json),
        "vae": (to_tensors(vae.networks["vae"], np.float16) | statistics, vae_json),
        "text_encoder": (text_tensors, text_json),
    }
    index = {
        "_class_name": "Flux2KleinPipeline",
        "is_distilled": False,
        "scheduler": ["diffusers", FLOW_SCHEDULER_JSON["_class_name"]],
        "text_encoder": ["transformers", "Qwen3ForCausalLM"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "Flux2Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLFlux2"],
    }
    write_folder(out, parts, FLOW_SCHEDULER_JSON, index)
