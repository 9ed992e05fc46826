"""A family of models that the app does not know: per-pixel networks, and conditioning of two arrays in a tuple."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from flax import nnx
from safetensors.numpy import save_file

from app.diffusion.families.components import CLIP_TOKENIZER
from app.diffusion.families.family import (
    Array,
    Component,
    Conditioning,
    FamilyDefaults,
    Json,
    Networks,
    Strips,
    TokenizerKind,
)
from app.diffusion.models.shapes import Shape
from app.diffusion.samplers import Schedule
from tests import tiny


@dataclass(frozen=True)
class Linear:
    features_in: int
    features_out: int
    vocab_size: int = 526
    max_position_embeddings: int = 9

    @classmethod
    def from_json(cls, content: Json, problems: list[str], where: str) -> "Linear":
        return cls(**content)

    def tensors(self) -> dict[str, Shape]:
        return {"layer.weight": (self.features_out, self.features_in), "layer.bias": (self.features_out,)}


class Network(nnx.Module):
    def __init__(self, config: Linear, *, dtype: Any, rngs: nnx.Rngs):
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.layer = nnx.Linear(config.features_in, config.features_out, **options)

    def __call__(self, x: Array) -> Array:
        return self.layer(x)


@dataclass(frozen=True)
class Toy(FamilyDefaults):
    PIPELINES: ClassVar[tuple[str, ...]] = ("ToyPipeline",)
    COMPONENTS: ClassVar[Mapping[str, Component]] = {
        "encoder": Component("Linear", "encode", Linear.from_json, Linear.tensors, Network),
        "denoiser": Component("Linear", "denoise", Linear.from_json, Linear.tensors, Network),
        "decoder": Component("Linear", "decode", Linear.from_json, Linear.tensors, Network),
    }
    TOKENIZERS: ClassVar[Mapping[str, str]] = {"words": "encoder"}
    TOKENIZER: ClassVar[TokenizerKind] = CLIP_TOKENIZER

    encoder: Linear
    denoiser: Linear
    decoder: Linear

    @classmethod
    def of(cls, configs: Mapping[str, Any], index: Json) -> "Toy":
        return cls(**configs)

    @classmethod
    def schedule(cls, config: Json) -> tuple[Schedule, list[str]]:
        return Schedule.from_config(config), []

    def problems(self) -> list[str]:
        return []

    @property
    def latent_channels(self) -> int:
        return self.decoder.features_in

    @property
    def pixels_per_latent(self) -> int:
        return 1

    @property
    def size_multiple(self) -> int:
        return 5

    @property
    def text_lengths(self) -> Mapping[str, int]:
        return {"words": self.encoder.max_position_embeddings}

    def encode(self, networks: Networks, input_ids: Mapping[str, Array]) -> Conditioning:
        ids = input_ids["words"]
        return networks["encoder"](ids / self.encoder.vocab_size), (ids != ids[:, -1:]).sum(axis=1)

    def denoise(
        self, networks: Networks, latents: Array, timesteps: Array, conditioning: Conditioning, *, strips: Strips
    ) -> Array:
        embeds, lengths = conditioning
        shift = embeds + (timesteps / 1000 + lengths)[:, None]
        return networks["denoiser"](latents + shift[:, None, None])

    def decode(self, networks: Networks, latents: Array, *, strips: Strips) -> Array:
        return networks["decoder"](latents)


def write_checkpoint(folder: Path) -> Path:
    configs = {"encoder": Linear(9, 5), "denoiser": Linear(5, 5), "decoder": Linear(5, 3)}
    for part, config in configs.items():
        tiny.write_json(folder / part / "config.json", asdict(config))
        weights = {name: tiny.weight(part, name, [*shape]) for name, shape in config.tensors().items()}
        save_file(weights, folder / part / f"{Toy.COMPONENTS[part].stem}.safetensors", metadata={"format": "pt"})
    scheduler = tiny.MODELS["tiny-sd1"]["scheduler"] | {"_class_name": "EulerDiscreteScheduler"}
    tiny.write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    tiny.write_tokenizer(folder / "words", "tiny-sd1")
    file = folder / "words" / "tokenizer_config.json"
    tiny.write_json(file, json.loads(file.read_text()) | {"model_max_length": 9})
    index = {part: ["toys", "Linear"] for part in configs} | {"words": ["transformers", "CLIPTokenizer"]}
    tiny.write_json(folder / "model_index.json", index | {"_class_name": "ToyPipeline"})
    return folder
