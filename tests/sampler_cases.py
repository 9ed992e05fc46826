"""The runs that hold app/diffusion/samplers/ to diffusers: make_golden.py records them, test_samplers.py replays
them."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from app.diffusion.samplers import SAMPLERS
from tests.published import CHECKPOINTS, FLOW_CHECKPOINTS

Float32 = npt.NDArray[np.float32]

LATENTS_SHAPE = (1, 2, 2, 2)  # [B, H, W, C]
MAX_EVALUATIONS = 51

_SD_BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

# As published with SimianLuo/LCM_Dreamshaper_v7.
LCM = {
    "_class_name": "LCMScheduler",
    "_diffusers_version": "0.22.0.dev0",
    **_SD_BETAS,
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "dynamic_thresholding_ratio": 0.995,
    "original_inference_steps": 50,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "thresholding": False,
    "timestep_scaling": 10.0,
    "timestep_spacing": "leading",
    "trained_betas": None,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "sd14": CHECKPOINTS["stable-diffusion-v1-4"]["scheduler"],
    "sd21": CHECKPOINTS["stable-diffusion-2-1"]["scheduler"],
    **{
        f"{spacing}-{prediction_type}": {
            "_class_name": "DDIMScheduler",
            **_SD_BETAS,
            "clip_sample": False,
            "prediction_type": prediction_type,
            "set_alpha_to_one": spacing != "linspace",
            "steps_offset": 0 if spacing == "trailing" else 1,
            "timestep_spacing": spacing,
        }
        for spacing in ("leading", "trailing", "linspace")
        for prediction_type in ("epsilon", "v_prediction")
    },
    "predicts-sample": {
        "_class_name": "DDIMScheduler",
        **_SD_BETAS,
        "clip_sample": False,
        "prediction_type": "sample",
        "steps_offset": 1,
    },
    # Silent wherever diffusers' classes differ in their defaults.
    "silent": {"_class_name": "EulerDiscreteScheduler", **_SD_BETAS},
    "zero-snr": {
        "_class_name": "DDIMScheduler",
        **_SD_BETAS,
        "clip_sample": False,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "set_alpha_to_one": True,
        "timestep_spacing": "trailing",
    },
    "linear": {
        "_class_name": "EulerAncestralDiscreteScheduler",
        **_SD_BETAS,
        "beta_schedule": "linear",
        "beta_end": 0.01,
        "num_train_timesteps": 500,
    },
    "cosine": {"_class_name": "DDIMScheduler", "beta_schedule": "squaredcos_cap_v2", "clip_sample": False},
    "dpm": {
        "_class_name": "DPMSolverMultistepScheduler",
        **_SD_BETAS,
        "algorithm_type": "dpmsolver++",
        "dynamic_thresholding_ratio": 0.995,
        "euler_at_final": False,
        "final_sigmas_type": "zero",
        "lambda_min_clipped": float("-inf"),
        "lower_order_final": True,
        "solver_order": 2,
        "solver_type": "midpoint",
        "timestep_spacing": "linspace",
        "use_karras_sigmas": True,
        "variance_type": None,
    },
    "lcm": LCM,
    "lcm-short": LCM | {"original_inference_steps": 30, "timestep_scaling": 0.01, "prediction_type": "v_prediction"},
}


class Flow(NamedTuple):
    """A flow model: its scheduler_config.json, its pipeline's rule for mu, and what a picture is to its transformer."""

    config: dict[str, Any]
    dynamic: str
    image_tokens: int


KLEIN, Z_IMAGE = (FLOW_CHECKPOINTS[name]["scheduler"] for name in ("FLUX.2-klein-4B", "Z-Image-Turbo"))

FLOWS = {
    "z-image": Flow(Z_IMAGE, "linear", 4096),
    "klein-1024": Flow(KLEIN, "flux2", 1024),
    "klein-4096": Flow(KLEIN, "flux2", 4096),
    "klein-6144": Flow(KLEIN, "flux2", 6144),
    "flux-1536": Flow(KLEIN, "linear", 1536),
}


def cases() -> list[tuple[str, str, int]]:
    """Every recorded run as (config name, sampler, number of steps)."""
    spaced = ("ddim", "euler", "euler_ancestral", "dpmpp_2m", "pndm")
    everything = (*spaced, "dpmpp_2m_karras", "lcm")
    runs = [(c, s, n) for c in ("sd14", "sd21") for s in everything for n in (1, 2, 5, 20, 50)]
    for name in CONFIGS:
        if "-" in name and name.split("-")[0] in ("leading", "trailing", "linspace"):
            runs += [(name, s, n) for s in spaced for n in (1, 2, 5, 20, 50)]
    for name in ("silent", "linear", "dpm"):
        runs += [(name, s, n) for s in everything for n in (3, 7)]
    runs += [("cosine", s, n) for s in everything if s != "dpmpp_2m_karras" for n in (3, 7)]
    runs += [("zero-snr", s, n) for s in everything if s != "pndm" for n in (1, 2, 6, 20)]
    runs += [(c, "lcm", n) for c in ("lcm", "lcm-short") for n in (1, 4, 7, 30)]
    varied = ("ddpm", "deis", "dpmpp_2m_sde", "dpmpp_sde", "heun", "lms", "unipc")
    levels = tuple(f"{name}_karras" for name in ("euler", "heun", "lms", "dpmpp_2m_sde", "dpmpp_sde", "unipc"))
    levels = (*levels, "euler_exponential", "euler_beta")
    named = ("ddim_trailing", "euler_trailing", "euler_ancestral_trailing")
    runs += [("sd14", s, n) for s in (*varied, *levels, *named) for n in (1, 2, 3, 5, 20)]
    runs += [("sd21", s, n) for s in (*varied, *levels, *named) for n in (2, 7)]
    for name in CONFIGS:
        if "-" in name and name.split("-")[0] in ("leading", "trailing", "linspace"):
            runs += [(name, s, n) for s in (*varied, "euler_karras") for n in (4, 9)]
    runs += [(c, s, 6) for c in ("silent", "linear", "dpm") for s in (*varied, *levels)]
    runs += [("cosine", s, 6) for s in (*varied, "unipc_karras", "lms_karras")]
    runs += [("zero-snr", s, n) for s in ("ddpm", "dpmpp_2m_sde", "unipc", "unipc_karras") for n in (1, 6, 20)]
    without = {"euler_ancestral", "dpmpp_sde", "pndm"}  # diffusers' classes refuse the prediction type
    runs += [("predicts-sample", s, n) for s in (*everything, *varied) if s not in without for n in (1, 5)]
    runs += [(c, "euler", n) for c in FLOWS for n in (1, 4, 8, 50)]
    return runs


class EditCase(NamedTuple):
    """A run that begins from an image, after so many steps; with a mask, half of the image is blended back."""

    config: str
    sampler: str
    steps: int
    begin: int
    masked: bool

    def __str__(self) -> str:
        return f"{self.config} {self.sampler} {self.steps} from {self.begin}{' masked' * self.masked}"


def edit_cases() -> list[EditCase]:
    """All samplers, over strengths and over what a config may say about timesteps."""
    runs = [
        EditCase("sd14", sampler, steps, begin, masked)
        for sampler in SAMPLERS
        for steps, begin, masked in ((5, 0, True), (5, 2, False), (6, 1, True), (5, 4, True), (20, 13, False))
    ]
    for config in ("sd21", "silent", "trailing-epsilon", "linspace-v_prediction"):
        runs += [
            EditCase(config, sampler, 7, 3, True)
            for sampler in ("ddim", "euler", "euler_ancestral", "dpmpp_2m_karras", "unipc", "pndm", "lcm")
        ]
    runs += [EditCase(config, "euler", 8, begin, True) for config in FLOWS for begin in (0, 3, 7)]
    # Halfway through a step diffusers blends an original of the step's end, although the latents are in between.
    return [run._replace(masked=run.masked and not run.sampler.startswith("dpmpp_sde")) for run in runs]


def original() -> Float32:
    """The latents of the image that an edit begins from."""
    return np.random.default_rng(21).standard_normal(LATENTS_SHAPE).astype(np.float32)


def redrawn() -> Float32:
    """1 where an edit with a mask redraws the image, [1, H, W, 1]."""
    return np.array([1, 0, 0, 1], np.float32).reshape(1, 2, 2, 1)


def noises() -> Float32:
    """[MAX_EVALUATIONS + 1, *LATENTS_SHAPE]: the initial noise, then the fresh noise of every step."""
    return np.random.default_rng(20).standard_normal((MAX_EVALUATIONS + 1, *LATENTS_SHAPE)).astype(np.float32)


def fake_unet(x: Float32, timestep: float) -> Float32:
    """Nonlinear in x, mixes its elements and knows the time: a wrong coefficient anywhere shows further down."""
    wide = x.astype(np.float64)
    neighbours = np.roll(wide, 1, axis=1) - 0.5 * np.roll(wide, 1, axis=3)
    clock = timestep / 1000
    out = 0.9 * np.tanh((1.1 - 0.3 * clock) * wide + 0.2 * neighbours) + 0.1 * np.cos(3 * clock + neighbours)
    return out.astype(np.float32)
