"""Tiny checkpoints in diffusers layout whose weights follow from their names, and the inputs that they are run on.

make_golden.py runs them in PyTorch and commits the answers only; the tests write the same files and run them in ours.
"""

import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file
from tokenizers.pre_tokenizers import ByteLevel

Float32 = npt.NDArray[np.float32]
Shapes = Mapping[str, Mapping[str, list[int]]]  # component -> tensor name -> shape

TENSORS = Path(__file__).parent / "golden" / "tensors.json"

PROMPTS = ["A red house, under 2 yellow suns!", "the sea at night " * 9]  # the second is longer than either length
NEGATIVE_PROMPTS = ["blurry house", ""]

_MERGES = ["t h", "th e</w>", "r e", "re d</w>", "h o", "ho u", "hou s", "hous e</w>", "s u", "su n", "n i", "a t</w>"]

_TEXT = {
    "architectures": ["CLIPTextModel"],
    "bos_token_id": 524,
    "eos_token_id": 525,
    "hidden_size": 32,
    "model_type": "clip_text_model",
    "vocab_size": 526,
}
_BETAS = {"beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000}

MODELS: dict[str, dict[str, dict[str, Any]]] = {
    # Three levels with attention on all but the coarsest, a number for attention_head_dim, 1x1 convolutions around the
    # transformers, quick-GELU, epsilon; groups, heads and widths all differ, so that none can stand in for another.
    "tiny-sd1": {
        "text_encoder": _TEXT
        | {
            "hidden_act": "quick_gelu",
            "intermediate_size": 72,
            "max_position_embeddings": 77,
            "num_attention_heads": 4,
            "num_hidden_layers": 3,
        },
        "unet": {
            "_class_name": "UNet2DConditionModel",
            "attention_head_dim": 2,
            "block_out_channels": [12, 24, 36],
            "cross_attention_dim": 32,
            "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
            "layers_per_block": 2,
            "norm_num_groups": 6,
            "sample_size": 8,
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        },
        "vae": {
            "_class_name": "AutoencoderKL",
            "block_out_channels": [8, 12, 16],
            "down_block_types": ["DownEncoderBlock2D"] * 3,
            "layers_per_block": 2,
            "norm_num_groups": 4,
            "sample_size": 32,
            "up_block_types": ["UpDecoderBlock2D"] * 3,
        },
        "scheduler": _BETAS
        | {
            "_class_name": "PNDMScheduler",
            "clip_sample": False,
            "set_alpha_to_one": False,
            "skip_prk_steps": True,
            "steps_offset": 1,
        },
    },
    # Two levels with attention on the coarser alone, a list of head numbers, linear layers around the transformers,
    # GELU, one text layer fewer, upcast attention, v-prediction, another scaling factor and padding token.
    "tiny-sd2": {
        "text_encoder": _TEXT
        | {
            "hidden_act": "gelu",
            "intermediate_size": 48,
            "max_position_embeddings": 24,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
        },
        "unet": {
            "_class_name": "UNet2DConditionModel",
            "attention_head_dim": [2, 5],
            "block_out_channels": [16, 40],
            "cross_attention_dim": 32,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "sample_size": 8,
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
            "upcast_attention": True,
            "use_linear_projection": True,
        },
        "vae": {
            "_class_name": "AutoencoderKL",
            "block_out_channels": [8, 16],
            "down_block_types": ["DownEncoderBlock2D"] * 2,
            "layers_per_block": 1,
            "norm_num_groups": 2,
            "sample_size": 16,
            "scaling_factor": 0.3,
            "up_block_types": ["UpDecoderBlock2D"] * 2,
        },
        "scheduler": _BETAS
        | {
            "_class_name": "DDIMScheduler",
            "clip_sample": False,
            "prediction_type": "v_prediction",
            "set_alpha_to_one": False,
            "skip_prk_steps": True,
            "steps_offset": 1,
        },
    },
}

# SDXL: two text encoders, transformers of two layers and of one, size numbers, and a second tokenizer that pads with
# token 0. The second text encoder's config has the old id of the end token.
MODELS["tiny-sdxl"] = {
    "text_encoder": _TEXT
    | {
        "hidden_act": "quick_gelu",
        "hidden_size": 16,
        "intermediate_size": 24,
        "max_position_embeddings": 24,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "projection_dim": 8,
    },
    "text_encoder_2": _TEXT
    | {
        "architectures": ["CLIPTextModelWithProjection"],
        "eos_token_id": 2,
        "hidden_act": "gelu",
        "hidden_size": 24,
        "intermediate_size": 36,
        "max_position_embeddings": 24,
        "num_attention_heads": 3,
        "num_hidden_layers": 3,
        "projection_dim": 20,
    },
    "unet": {
        "_class_name": "UNet2DConditionModel",
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "attention_head_dim": [2, 3],
        "block_out_channels": [8, 12],
        "cross_attention_dim": 40,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "projection_class_embeddings_input_dim": 68,
        "sample_size": 8,
        "transformer_layers_per_block": [1, 2],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        "use_linear_projection": True,
    },
    "vae": MODELS["tiny-sd2"]["vae"] | {"force_upcast": True, "scaling_factor": 0.13025},
    "scheduler": _BETAS
    | {
        "_class_name": "EulerDiscreteScheduler",
        "clip_sample": False,
        "interpolation_type": "linear",
        "prediction_type": "epsilon",
        "sample_max_value": 1.0,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "trained_betas": None,
        "use_karras_sigmas": False,
    },
}

# Whole pictures: sampler, num_inference_steps, guidance_scale.
RUNS: dict[str, list[tuple[str, int, float]]] = {
    "tiny-sd1": [("pndm", 5, 7.5), ("dpmpp_2m_karras", 7, 3.0)],
    "tiny-sd2": [("ddim", 5, 7.5), ("euler", 3, 1.0)],
}
# Of SDXL: sampler, num_inference_steps, guidance_scale, negative prompts (None: zeros), and fields of the request.
XL_PROMPTS = ["A red house, under 2 yellow suns!", "the sea"]
XL_RUNS: list[tuple[str, int, float, list[str] | None, dict[str, tuple[int, int]]]] = [
    ("euler", 3, 5.0, ["blurry house", "rain"], {}),
    ("euler", 3, 5.0, None, {"original_size": (64, 48), "crops_coords_top_left": (2, 6), "target_size": (32, 16)}),
    ("dpmpp_2m", 4, 0.0, None, {}),
]
# tiny-sd2 as a latent consistency model: its UNet takes the guidance scale as a number. LCM_RUN: steps and that scale.
LCM: dict[str, dict[str, Any]] = {
    "unet": MODELS["tiny-sd2"]["unet"] | {"time_cond_proj_dim": 10},
    "scheduler": _BETAS | {"_class_name": "LCMScheduler", "clip_sample": False, "prediction_type": "epsilon"},
}
LCM_RUN = (4, 8.5)
IMAGE_SIZES = {"tiny-sd1": (48, 32), "tiny-sd2": (16, 24), "tiny-sdxl": (24, 16)}  # height, width


def tensor_shapes(path: Path = TENSORS) -> dict[str, Shapes]:
    """Shapes of every tensor of full-size and tiny checkpoints; one that equals another is stored as its name."""
    stored = json.loads(path.read_text("utf-8"))
    return {name: stored[entry] if isinstance(entry, str) else entry for name, entry in stored.items()}


def weight(component: str, name: str, shape: list[int]) -> Float32:
    """Random, but fixed by the tensor's name; of a size that keeps activations near 1, with no norm at rest."""
    rng = np.random.default_rng(zlib.crc32(f"{component}/{name}".encode()))
    values = rng.standard_normal(shape)
    if len(shape) == 1:
        values = 1 + 0.2 * values if name.endswith("weight") else 0.05 * values
    else:
        values /= np.sqrt(np.prod(shape[1:]))
    return values.astype(np.float32)


def noise(name: str, *shape: int) -> Float32:
    """Standard normal input, fixed by its name."""
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)


def latents(model: str) -> Float32:
    """Initial noise of a whole run, [2, h, w, C]."""
    factor = 2 ** (len(MODELS[model]["vae"]["block_out_channels"]) - 1)
    height, width = IMAGE_SIZES[model]
    return noise(f"{model} latents", 2, height // factor, width // factor, 4)


def lcm_noises() -> Float32:
    """[1 + steps, 2, h, w, C]: of a run the initial latents, and the noise after each step."""
    first = latents("tiny-sd2")
    return np.stack([first, *(noise(f"lcm {i}", *first.shape) for i in range(LCM_RUN[0]))])


def inputs(model: str) -> dict[str, Float32]:
    """What each submodule is run on; channels last. Some are faint, so that a norm's epsilon shows."""
    unet, text = MODELS[model]["unet"], MODELS[model]["text_encoder"]
    first, wide = unet["block_out_channels"][:2]
    tokens, features = text["max_position_embeddings"], unet["cross_attention_dim"]
    second = MODELS[model].get("text_encoder_2")
    height, width = IMAGE_SIZES[model]
    shape = latents(model).shape[1:]
    faint = np.array([1, 0.05], np.float32).reshape(2, 1, 1, 1)
    return {
        "resnet": 0.01 * noise("resnet", 2, 5, 3, first),
        "time": noise("time", 2, 4 * first),
        "transformer": 0.01 * noise("transformer", 2, 3, 5, wide),
        "context": noise("context", 3, tokens, features),
        "unet": noise("unet", 3, *shape),
        "timesteps": np.array([981.0, 249.75, 1.0], np.float32),
        "pixels": np.clip(noise("pixels", 2, height, width, 3), -1, 1) * faint,
        "vae_latents": noise("vae", 2, *shape) * faint,
    } | (
        {
            "text_embeds": noise("text_embeds", 3, second["projection_dim"]),
            "time_ids": np.array([[16, 24, 0, 0, 16, 24], [64, 48, 2, 6, 32, 16], [1024.0] * 6], np.float32),
        }
        if second
        else {}
    )


def write_checkpoint(
    folder: Path,
    model: str,
    shapes: Shapes,
    *,
    dtype: Any = np.float32,
    rename: Callable[[str, str], str] = lambda component, name: name,
    variant: str | None = None,
    shards: int = 1,
    changes: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> Path:
    """A whole checkpoint; `rename` gives tensors the names of older checkpoints, weights may lie in shards, and
    `changes` replace configurations by component."""
    xl = "text_encoder_2" in MODELS[model]
    name = "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline"
    index: dict[str, Any] = {"_class_name": name}
    index |= {"force_zeros_for_empty_prompt": True} if xl else {"requires_safety_checker": False}
    for component, config in {**MODELS[model], **changes}.items():
        file = "scheduler_config.json" if component == "scheduler" else "config.json"
        write_json(folder / component / file, config)
        class_name = config.get("_class_name", config.get("architectures", [""])[0])
        index[component] = ["transformers" if component.startswith("text_encoder") else "diffusers", class_name]
    for component in shapes:
        stem = "model" if component.startswith("text_encoder") else "diffusion_pytorch_model"
        tensors = {
            rename(component, name): weight(component, name, shape).astype(dtype)
            for name, shape in shapes[component].items()
        }
        write_weights(folder / component, stem, tensors, variant, shards)
    # SD 2.x and SDXL's second tokenizer pad with token 0, and say so in special_tokens_map.json only.
    write_tokenizer(folder / "tokenizer", model, pad="!" if model == "tiny-sd2" else "<|endoftext|>")
    index |= {"tokenizer": ["transformers", "CLIPTokenizer"], "feature_extractor": [None, None]}
    if xl:
        write_tokenizer(folder / "tokenizer_2", model, pad="!")
        index["tokenizer_2"] = ["transformers", "CLIPTokenizer"]
    else:
        index["safety_checker"] = [None, None]
    write_json(folder / "model_index.json", index)
    return folder


def write_lcm_checkpoint(folder: Path, shapes: Shapes) -> Path:
    """`shapes` are tiny-sd2's."""
    features = [LCM["unet"]["block_out_channels"][0], LCM["unet"]["time_cond_proj_dim"]]
    unet = {**shapes["unet"], "time_embedding.cond_proj.weight": features}
    return write_checkpoint(folder, "tiny-sd2", {**shapes, "unet": unet}, changes=LCM)


def write_inpainting_checkpoint(folder: Path, model: str, shapes: Shapes) -> Path:
    """`shapes` are the model's; the UNet also takes a mask and the latents of what is outside of it."""
    unet = MODELS[model]["unet"]
    conv_in = [unet["block_out_channels"][0], 9, 3, 3]
    wider = {**shapes, "unet": {**shapes["unet"], "conv_in.weight": conv_in}}
    return write_checkpoint(folder, model, wider, changes={"unet": unet | {"in_channels": 9}})


def write_weights(folder: Path, stem: str, tensors: Mapping[str, Any], variant: str | None, shards: int) -> None:
    """As `save_pretrained` of diffusers and transformers names files, with `variant=` and a small `max_shard_size=`."""
    dotted = f".{variant}" if variant else ""
    if shards == 1:
        save_file(dict(tensors), folder / f"{stem}{dotted}.safetensors", metadata={"format": "pt"})
        return
    places = {name: f"{stem}{dotted}-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)}
    for file in sorted(set(places.values())):
        save_file({name: tensors[name] for name in tensors if places[name] == file}, folder / file)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    write_json(folder / f"{stem}.safetensors.index{dotted}.json", index)


def write_tokenizer(folder: Path, model: str, pad: str = "<|endoftext|>") -> None:
    """CLIP's own layout: all bytes, all bytes at a word's end, the merges, and the two special tokens last."""
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in _MERGES)]
    vocab = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    assert len(vocab) == MODELS[model]["text_encoder"]["vocab_size"]
    write_json(folder / "vocab.json", vocab)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *_MERGES, ""]), "utf-8")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    length = MODELS[model]["text_encoder"]["max_position_embeddings"]
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "do_lower_case": True}
    write_json(folder / "tokenizer_config.json", config | special | {"pad_token": "<|endoftext|>"})
    write_json(folder / "special_tokens_map.json", special | {"pad_token": pad})


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2), "utf-8")
