"""Tiny checkpoints of flow models whose weights follow from their names, and the inputs that they are run on.

golden_flow.py runs them in PyTorch and commits the answers only; the tests write the same files and run them in ours.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers.pre_tokenizers import ByteLevel

from tests import tiny

Shapes = dict[str, list[int]]  # tensor name -> shape

TENSORS = Path(__file__).parent / "golden" / "flow_tensors.json"
STEMS = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}

TEXT_LENGTH = 32  # instead of 512 tokens
PROMPTS = ["A red house, under 2 yellow suns!", "the sea"]  # as messages the first is longer, the second shorter
NEGATIVE_PROMPTS = {"tiny-klein": ["", ""], "tiny-z-image": ["the red", ""]}

_MERGES = [
    "Ġ t",
    "h e",
    "Ġt he",
    "r e",
    "Ġ re",
    "Ġre d",
    "h o",
    "Ġ ho",
    "Ġho u",
    "s e",
    "Ġhou se",
    "u s",
    "us er",
    "e r",
]
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
# As Qwen3's own says what one user's message becomes.
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)

_TEXT: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_size": 24,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "max_window_layers": 5,
    "model_type": "qwen3",
    "num_attention_heads": 4,
    "num_hidden_layers": 5,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 280,
    "max_sequence_length": TEXT_LENGTH,
}
_VAE: dict[str, Any] = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}

HIDDEN_STATES = {"tiny-klein": (1, 2, 4), "tiny-z-image": (-2,)}

# Widths, heads and axes all differ, so that none can stand in for another.
MODELS: dict[str, dict[str, dict[str, Any]]] = {
    "tiny-klein": {
        "text_encoder": _TEXT | {"text_encoder_out_layers": [*HIDDEN_STATES["tiny-klein"]]},
        "transformer": {
            "_class_name": "Flux2Transformer2DModel",
            "attention_head_dim": 16,
            "axes_dims_rope": [2, 4, 6, 4],
            "guidance_embeds": False,
            "in_channels": 16,
            "joint_attention_dim": 72,
            "mlp_ratio": 2.0,
            "num_attention_heads": 3,
            "num_layers": 2,
            "num_single_layers": 2,
            "out_channels": None,
            "patch_size": 1,
            "rope_theta": 2000,
            "timestep_guidance_channels": 32,
        },
        "vae": _VAE
        | {"_class_name": "AutoencoderKLFlux2", "batch_norm_eps": 1e-4, "patch_size": [2, 2], "sample_size": 16},
        "scheduler": {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "shift": 3.0,
            "time_shift_type": "exponential",
            "use_dynamic_shifting": True,
        },
    },
    "tiny-z-image": {
        "text_encoder": _TEXT | {"num_hidden_layers": 4},
        "transformer": {
            "_class_name": "ZImageTransformer2DModel",
            "all_f_patch_size": [1],
            "all_patch_size": [2],
            "axes_dims": [4, 8, 4],
            "axes_lens": [128, 32, 32],
            "cap_feat_dim": 24,
            "dim": 48,
            "in_channels": 4,
            "n_heads": 3,
            "n_kv_heads": 3,
            "n_layers": 2,
            "n_refiner_layers": 2,
            "norm_eps": 1e-5,
            "qk_norm": True,
            "rope_theta": 256.0,
            "siglip_feat_dim": None,
            "t_scale": 1000.0,
        },
        "vae": _VAE
        | {
            "_class_name": "AutoencoderKL",
            "sample_size": 16,
            "scaling_factor": 0.3611,
            "shift_factor": 0.1159,
            "use_post_quant_conv": False,
            "use_quant_conv": False,
        },
        "scheduler": {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "shift": 3.0,
            "use_dynamic_shifting": False,
        },
    },
}
# Whole pictures: num_inference_steps and guidance_scale, as this project counts it; klein's first is distilled.
RUNS = {"tiny-klein": [(4, 1.0), (3, 4.0)], "tiny-z-image": [(4, 1.0), (3, 4.0)]}
IMAGE_SIZES = {"tiny-klein": (16, 24), "tiny-z-image": (24, 16)}  # height, width


def latents(model: str) -> np.ndarray:
    """Initial noise of a whole run, [2, h, w, C]."""
    height, width = IMAGE_SIZES[model]
    if model == "tiny-klein":
        return tiny.noise("klein run", 2, height // 4, width // 4, 16)
    return tiny.noise("z-image run", 2, height // 2, width // 2, 4)


def inputs(model: str) -> dict[str, np.ndarray]:
    """What each network is run on; channels last."""
    rng = np.random.default_rng(0)
    input_ids = rng.integers(0, 275, (2, 9)).astype(np.int32)
    input_ids[1, 4:] = ~input_ids[1, 4:]  # padding
    answer: dict[str, np.ndarray] = {"input_ids": input_ids}
    if model == "tiny-klein":
        return answer | {
            "latents": tiny.noise("klein latents", 2, 3, 5, 16),
            "timesteps": np.array([981.25, 250.0], np.float32),
            "prompt_embeds": tiny.noise("klein embeds", 2, 7, 72),
            "vae_latents": tiny.noise("klein vae", 1, 3, 2, 16),
        }
    return answer | {
        "latents": tiny.noise("z-image latents", 2, 6, 10, 4),
        "clock": np.array([0.015625, 0.75], np.float32),
        "prompt_embeds": tiny.noise("z-image embeds", 2, 64, 24),
        "text_lengths": np.array([5, 40], np.int32),
        "vae_latents": tiny.noise("z-image vae", 1, 6, 4, 4),
    }


def collapsed(shapes: Mapping[str, tuple[int, ...] | list[int]]) -> Shapes:
    """Layers of one shape as one line: `layers.0..35.mlp.up_proj.weight`."""
    layers: dict[tuple[str, str, tuple[int, ...]], list[int]] = {}
    table: Shapes = {}
    for name, shape in shapes.items():
        if match := re.match(r"(.*?\.)(\d+)(\..*)", name):
            layers.setdefault((match[1], match[3], tuple(shape)), []).append(int(match[2]))
        else:
            table[name] = list(shape)
    for (before, after, shape), numbers in layers.items():
        first, last = min(numbers), max(numbers)
        assert len(numbers) == last - first + 1, "layers of a shape stand together"
        table[f"{before}{first}..{last}{after}"] = list(shape)
    return dict(sorted(table.items()))


def expanded(table: Mapping[str, list[int]]) -> Shapes:
    shapes: Shapes = {}
    for name, shape in table.items():
        if match := re.match(r"(.*?\.)(\d+)\.\.(\d+)(\..*)", name):
            shapes |= {f"{match[1]}{i}{match[4]}": shape for i in range(int(match[2]), int(match[3]) + 1)}
        else:
            shapes[name] = shape
    return shapes


def tensor_tables() -> dict[str, dict[str, Shapes]]:
    """By checkpoint and component, with layers of one shape as one line."""
    tables: dict[str, dict[str, Shapes]] = json.loads(TENSORS.read_text("utf-8"))
    return tables


def weight(component: str, name: str, shape: list[int]) -> np.ndarray:
    if name.endswith("num_batches_tracked"):
        return np.array(7, np.int64)
    if name.endswith("running_var"):
        return 0.5 + np.abs(tiny.weight(component, name, shape))
    return tiny.weight(component, name, shape)


def write_checkpoint(folder: Path, model: str, tables: Mapping[str, Shapes], *, is_distilled: bool = True) -> Path:
    pipelines = {"tiny-klein": "Flux2KleinPipeline", "tiny-z-image": "ZImagePipeline"}
    index: dict[str, Any] = {"_class_name": pipelines[model], "tokenizer": ["transformers", "Qwen2Tokenizer"]}
    if model == "tiny-klein":
        index["is_distilled"] = is_distilled
    for component, config in MODELS[model].items():
        tiny.write_json(
            folder / component / ("scheduler_config.json" if component == "scheduler" else "config.json"), config
        )
        library = "transformers" if component == "text_encoder" else "diffusers"
        index[component] = [library, config.get("_class_name", "Qwen3ForCausalLM")]
    for component, stem in STEMS.items():
        tensors = {name: weight(component, name, shape) for name, shape in expanded(tables[component]).items()}
        save_file(tensors, folder / component / f"{stem}.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder / "tokenizer")
    tiny.write_json(folder / "model_index.json", index)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Qwen2's layout: byte-level BPE, then special tokens, and the chat template."""
    words = [*sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in _MERGES)]
    tiny.write_json(folder / "vocab.json", {word: i for i, word in enumerate(words)})
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *_MERGES, ""]), "utf-8")
    added = {
        str(len(words) + i): {
            "content": content,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": i < 3,
        }
        for i, content in enumerate(_SPECIAL)
    }
    config = {
        "added_tokens_decoder": added,
        "chat_template": _TEMPLATE,
        "eos_token": "<|im_end|>",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    tiny.write_json(folder / "tokenizer_config.json", config)
