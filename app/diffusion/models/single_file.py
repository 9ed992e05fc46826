"""A checkpoint as one safetensors file with CompVis' names, as its components with diffusers' names.

SD 1.x, SD 2.x and SDXL have such files. What shapes do not say follows from the kind: numbers of heads, activations,
the VAE's scale and the schedule (CompVis' and Stability's model configs; diffusers takes them from a repo of the same
kind). Reads headers alone, and imports no JAX.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from app.diffusion.models.derived_configs import text_config, unet_config, vae_config
from app.diffusion.models.ldm_names import count, open_clip_name, unet_names, vae_names
from app.diffusion.models.tensor_names import NOT_WEIGHTS, current_name
from app.diffusion.models.weight_files import Tensor, read_tensors, unreadable

Json = dict[str, Any]
Tensors = dict[str, Tensor]

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "transformer.", "model."  # behind an encoder's prefix, by the code that it comes from
END, ZERO = "<|endoftext|>", "!"  # padding tokens: CLIP's end token, and OpenCLIP's token 0

BETAS: Json = {"beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000}
BETAS |= {"clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1}


@dataclass(frozen=True)
class Kind:
    """What a file's names say about it, and its shapes do not."""

    index: Json  # what its model_index.json would say
    encoders: Mapping[str, str]  # text encoder -> prefix of its tensors
    scheduler: Json
    scaling_factor: float = 0.18215
    heads: int | None = None  # of each attention of the UNet; None: as many as leave 64 channels a head


KINDS = {
    "Stable Diffusion 1.x": Kind(
        {"_class_name": "StableDiffusionPipeline"},
        {"text_encoder": f"cond_stage_model.{CLIP}"},
        BETAS | {"_class_name": "PNDMScheduler"},
        heads=8,
    ),
    "Stable Diffusion 2.x": Kind(
        {"_class_name": "StableDiffusionPipeline"},
        {"text_encoder": f"cond_stage_model.{OPEN_CLIP}"},
        BETAS | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},
    ),
    "SDXL": Kind(
        {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True},
        {"text_encoder": f"conditioner.embedders.0.{CLIP}", "text_encoder_2": f"conditioner.embedders.1.{OPEN_CLIP}"},
        BETAS
        | {
            "_class_name": "EulerDiscreteScheduler",
            "interpolation_type": "linear",
            "timestep_spacing": "leading",
            "use_karras_sigmas": False,
        },
        scaling_factor=0.13025,
    ),
}

GLOBAL_STEP = "global_step"  # of training
V_PREDICTION, ZERO_SNR = "v_pred", "ztsnr"  # empty tensors by which SDXL fine-tunes say how they were trained
# What such files contain besides weights: training's averages, losses and constants, and parts of CLIP that draw
# nothing. Prefixes and whole names.
SURPLUS_PREFIXES = ("model_ema.", "first_stage_model.loss.", "first_stage_model.model_ema.")
SURPLUS = {
    *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
    *("log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"),
    *("posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
    *("lvlb_weights", "logvar", "scale_factor", "denoiser.sigmas"),
    *(GLOBAL_STEP, V_PREDICTION, ZERO_SNR),
}
TEXT_SURPLUS = {"logit_scale", "attn_mask", "text_projection.weight"} | NOT_WEIGHTS


@dataclass(frozen=True)
class SingleFile:
    """What the files of a folder in diffusers layout would say. All but `index` and `scheduler` are by component."""

    index: Json
    configs: dict[str, Json]
    scheduler: Json
    tensors: dict[str, Tensors]
    padding: dict[str, str]  # text encoder -> token


def read_single_file(file: Path, problems: list[str]) -> SingleFile | None:
    """None with a problem where the file cannot be read, or is of none of KINDS."""
    stored, metadata = read_tensors(file, file.name, problems)
    return components(stored, metadata, file.name, problems) if stored else None


def components(stored: Tensors, metadata: Mapping[str, str], where: str, problems: list[str]) -> SingleFile | None:
    """From all tensors of a file, which problems call `where`, and its metadata."""
    kind = kind_of(stored, where, problems)
    if kind is None:
        return None
    before = len(problems)
    hints = stored
    stored = {key: tensor for key, tensor in stored.items() if not surplus(key, kind)}
    unet, vae = with_prefix(stored, UNET), with_prefix(stored, VAE)
    renamed: dict[str, Iterable[tuple[str, Tensor]]] = {
        "unet": ((name, unet[key]) for key, name in unet_names(unet).items()),
        "vae": ((name, vae[key]) for key, name in vae_names(vae).items()),
    }
    for part, prefix in kind.encoders.items():
        encoder = with_prefix(stored, prefix)
        renamed[part] = clip(encoder) if prefix.endswith(CLIP) else open_clip(encoder, part)
    tensors = {part: by_name(pairs, where, problems) for part, pairs in renamed.items()}
    for part, prefix in {"unet": UNET, "vae": VAE, **kind.encoders}.items():
        if not tensors[part]:
            problems.append(f"{where} has no {part}: none of its tensors begins with {prefix}")
    prefixes = (UNET, VAE, *kind.encoders.values())
    for key in stored:
        if not key.startswith(prefixes):
            problems.append(f"{where}: tensor {key} belongs to none of {', '.join(tensors)}.")
    problems += (problem for part in tensors.values() for problem in unreadable(part))
    if len(problems) > before:
        return None
    shapes = {part: {name: tensor.shape for name, tensor in named.items()} for part, named in tensors.items()}
    configs = {"unet": unet_config(shapes["unet"], kind.heads), "vae": vae_config(shapes["vae"], kind.scaling_factor)}
    for part, prefix in kind.encoders.items():
        configs[part] = text_config(shapes[part], "quick_gelu" if prefix.endswith(CLIP) else "gelu")
    padding = {part: END if prefix.endswith(CLIP) else ZERO for part, prefix in kind.encoders.items()}
    return SingleFile(kind.index, configs, scheduler_config(kind, hints, metadata), tensors, padding)


def by_name(pairs: Iterable[tuple[str, Tensor]], where: str, problems: list[str]) -> Tensors:
    tensors: Tensors = {}
    for name, tensor in pairs:
        if name in tensors:
            problems.append(f"{where}: tensors {tensors[name].key} and {tensor.key} are both {name}.")
        tensors[name] = tensor
    return tensors


def kind_of(stored: Tensors, where: str, problems: list[str]) -> Kind | None:
    for kind in KINDS.values():
        if all(with_prefix(stored, prefix) for prefix in kind.encoders.values()):
            return kind
    prefixes = sorted({key.rpartition(".")[0].partition(".")[0] or key for key in stored})
    problems.append(
        f"{where} is no checkpoint of {', '.join(KINDS)} in one file: it has no text encoder of theirs "
        f"({'; '.join(' and '.join(kind.encoders.values()) for kind in KINDS.values())}), "
        f"and its tensors begin with {', '.join(prefixes[:5])}."
    )
    return None


def with_prefix(tensors: Tensors, prefix: str) -> Tensors:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def surplus(key: str, kind: Kind) -> bool:
    """Whether a tensor is expected beside the weights."""
    models = {prefix.removesuffix(CLIP).removesuffix(OPEN_CLIP) for prefix in kind.encoders.values()}
    return key.startswith(SURPLUS_PREFIXES) or key in SURPLUS | {f"{model}logit_scale" for model in models}


# The text encoders


def clip(tensors: Tensors) -> Iterator[tuple[str, Tensor]]:
    """CLIP by transformers' names."""
    for key, tensor in tensors.items():
        if current_name(key) not in TEXT_SURPLUS:
            yield current_name(key), tensor


def open_clip(tensors: Tensors, part: str) -> Iterator[tuple[str, Tensor]]:
    """OpenCLIP by transformers' names, with queries, keys and values apart.

    SD 2.x reads the layer before the last: its pipeline has no last layer, and no projection.
    """
    whole = "text_projection" in tensors
    last = count(tensors, "transformer.resblocks") - 1
    for key, tensor in tensors.items():
        name = open_clip_name(key)
        if part == "text_encoder" and (
            name in TEXT_SURPLUS or (whole and key.startswith(f"transformer.resblocks.{last}."))
        ):
            continue
        if name == "text_projection.weight":  # a product from the left there
            yield name, replace(tensor, transposed=True)
        elif ".attn.in_proj_" in key and tensor.shape and tensor.shape[0] % 3 == 0:
            block, _, leaf = name.partition(".attn.in_proj_")
            for i, projection in enumerate(("q_proj", "k_proj", "v_proj")):
                yield f"{block}.self_attn.{projection}.{leaf}", tensor.part(i, 3)
        elif name not in TEXT_SURPLUS:
            yield name, tensor


# The schedule


def scheduler_config(kind: Kind, stored: Tensors, metadata: Mapping[str, str]) -> Json:
    """As files of the kind have it, but with the prediction type that this file's own hints tell."""
    hints = [
        (metadata.get("modelspec.prediction_type"), {"v": "v_prediction", "epsilon": "epsilon"}),
        (metadata.get("modelspec.architecture"), {"stable-diffusion-v2-512": "epsilon"}),
        (V_PREDICTION if V_PREDICTION in stored else None, {V_PREDICTION: "v_prediction"}),
        # The length of training of SD 2.0 base, whose output is noise (diffusers' _legacy_load_scheduler).
        (str(step_of(stored)), {"875000": "epsilon"}),
    ]
    default = kind.scheduler.get("prediction_type", "epsilon")
    prediction = next((meanings[hint] for hint, meanings in hints if hint in meanings), default)
    zero_snr = {"rescale_betas_zero_snr": True} if ZERO_SNR in stored else {}
    return kind.scheduler | {"prediction_type": prediction} | zero_snr


def step_of(stored: Tensors) -> int | None:
    tensor = stored.get(GLOBAL_STEP)
    if tensor is None or tensor.dtype != "I64":
        return None
    return int(np.fromfile(tensor.file, "<i8", 1, offset=tensor.start)[0])
