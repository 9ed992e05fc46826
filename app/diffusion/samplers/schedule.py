"""A checkpoint's scheduler_config.json, where its model was trained by a beta schedule. Knows nothing of samplers.

What counts are the betas, the prediction type and the spacing of timesteps: every sampler follows them. What else the
file says is about the class that it names, and `solver` keeps it for the choice of the default sampler.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Schedule:
    """How a model was trained to see noise.

    `timestep_spacing` and `set_alpha_to_one` are None where the file is silent: diffusers then takes the default of
    the class that samples, not of the class that the file names, and so do we.
    """

    kind: ClassVar = "beta"

    class_name: str
    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    prediction_type: str = "epsilon"
    timestep_spacing: str | None = None
    steps_offset: int = 0
    set_alpha_to_one: bool | None = None
    rescale_betas_zero_snr: bool = False
    original_inference_steps: int = 50
    timestep_scaling: float = 10.0
    solver: tuple[tuple[str, Any], ...] = ()  # options about how the file's class samples, by name

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Schedule":
        """Check every option of a parsed scheduler_config.json; all problems are raised as one ValueError."""
        class_name = config.get("_class_name")
        options = {name: value for name, value in config.items() if not name.startswith("_")}
        problems = []
        if class_name not in _BETAS_OF_CLASS:
            problems.append(f"_class_name must be one of {', '.join(_BETAS_OF_CLASS)}, got {class_name!r}")
        for name, value in options.items():
            if class_name not in _READ_BY.get(name, (class_name,)):
                continue  # left over from another class, as diffusers writes files
            if name in _CHOICES:
                if not any(type(value) is type(choice) and value == choice for choice in _CHOICES[name]):
                    problems.append(f"{name} must be {' or '.join(map(repr, _CHOICES[name]))}, got {value!r}")
            elif name in _NUMBERS:
                kind, low, high = _NUMBERS[name]
                is_number = isinstance(value, (int, kind)) and not isinstance(value, bool)
                if not is_number or not low <= value <= high:
                    problems.append(f"{name} must be {_ranged(kind, low, high)}, got {value!r}")
            elif name not in _INERT | SOLVER_OPTIONS | {"trained_betas"}:
                problems.append(f"{name} is not an option that is known here, got {value!r}")
        problems += _contradictions(class_name, options)
        if problems:
            raise ValueError(f"The scheduler config cannot be followed: {'; '.join(problems)}.")
        kept = {
            name: value for name, value in options.items() if name in cls.__dataclass_fields__ and value is not None
        }
        if "trained_betas" in kept:
            kept["trained_betas"] = tuple(kept["trained_betas"])
        kept["solver"] = tuple((name, hashable(options[name])) for name in sorted(SOLVER_OPTIONS & options.keys()))
        return cls(**{"class_name": class_name, **_BETAS_OF_CLASS[str(class_name)], **kept})


# diffusers' classes and the betas that each has where a file is silent.
_EARLY: dict[str, Any] = {}
_STABLE: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012}
_LATENT: dict[str, Any] = _STABLE | {"beta_schedule": "scaled_linear"}
_BETAS_OF_CLASS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": _EARLY,
    "DDPMScheduler": _EARLY,
    "DEISMultistepScheduler": _EARLY,
    "DPMSolverMultistepScheduler": _EARLY,
    "DPMSolverSDEScheduler": _STABLE,
    "DPMSolverSinglestepScheduler": _EARLY,
    "EulerAncestralDiscreteScheduler": _EARLY,
    "EulerDiscreteScheduler": _EARLY,
    "HeunDiscreteScheduler": _STABLE,
    "KDPM2AncestralDiscreteScheduler": _STABLE,
    "KDPM2DiscreteScheduler": _STABLE,
    "LCMScheduler": _LATENT,
    "LMSDiscreteScheduler": _EARLY,
    "PNDMScheduler": _EARLY,
    "SASolverScheduler": _EARLY,
    "TCDScheduler": _LATENT,
    "UniPCMultistepScheduler": _EARLY,
}

# What each option may be; an option that is missing has diffusers' default, which is among these but for two:
# `clip_sample` (StableDiffusionPipeline turns it off for latents) and `skip_prk_steps` (see _contradictions).
_CHOICES: dict[str, tuple[object, ...]] = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "set_alpha_to_one": (True, False),
    "rescale_betas_zero_snr": (True, False),
    "skip_prk_steps": (True, False),
    "use_karras_sigmas": (True, False, None),
    "use_exponential_sigmas": (True, False, None),
    "use_beta_sigmas": (True, False, None),
    # Nothing else can be said as a table: clipping is not linear, and the others belong to other kinds of models.
    "clip_sample": (False,),
    "thresholding": (False,),
    "timestep_type": ("discrete",),
    "use_dynamic_shifting": (False,),
    "use_flow_sigmas": (False,),
}

# Other classes ignore these.
_READ_BY: dict[str, set[str]] = {
    "clip_sample": {"DDIMScheduler", "DDPMScheduler", "HeunDiscreteScheduler", "LCMScheduler", "TCDScheduler"},
    "timestep_type": {"EulerDiscreteScheduler"},
}

_NUMBERS: dict[str, tuple[type, float, float]] = {
    "num_train_timesteps": (int, 2, math.inf),
    "beta_start": (float, 1e-9, 0.999),
    "beta_end": (float, 1e-9, 0.999),
    "steps_offset": (int, 0, math.inf),
    "original_inference_steps": (int, 1, math.inf),
    "timestep_scaling": (float, 1e-9, math.inf),
}

# These say how the class samples that the file names. They choose the default sampler and touch no other.
SOLVER_OPTIONS = {
    "algorithm_type",
    "corrector_order",
    "disable_corrector",
    "euler_at_final",
    "final_sigmas_type",
    "interpolation_type",
    "lambda_min_clipped",
    "lower_order_final",
    "predict_x0",
    "predictor_order",
    "sigma_max",
    "sigma_min",
    "solver_order",
    "solver_p",
    "solver_type",
    "tau_func",
    "use_beta_sigmas",
    "use_exponential_sigmas",
    "use_karras_sigmas",
    "use_lu_lambdas",
    "variance_type",
}

# These qualify a switch that is off wherever it is accepted at all.
_INERT = {
    "clip_sample_range",
    "dynamic_thresholding_ratio",
    "flow_shift",
    "noise_sampler_seed",
    "sample_max_value",
    "shift_terminal",
    "time_shift_type",
}


def hashable(value: Any) -> Any:
    return str(value) if isinstance(value, list | dict) else value


def _ranged(kind: type, low: float, high: float) -> str:
    noun = "a whole number" if kind is int else "a number"
    return f"{noun} of {low:g} or more" if math.isinf(high) else f"{noun} from {low:g} to {high:g}"


def _contradictions(class_name: str | None, options: Mapping[str, Any]) -> list[str]:
    problems = []
    if class_name == "PNDMScheduler" and options.get("skip_prk_steps") is not True:
        problems.append("skip_prk_steps must be True for PNDMScheduler, whose Runge-Kutta start is not supported")
    if options.get("rescale_betas_zero_snr") is True and options.get("prediction_type", "epsilon") == "epsilon":
        # Where nothing of the image is left in the latents, the noise says nothing about it either.
        problems.append("rescale_betas_zero_snr must be False with prediction_type 'epsilon', got True")
    train, original = options.get("num_train_timesteps", 1000), options.get("original_inference_steps", 50)
    if class_name == "LCMScheduler" and isinstance(original, int) and isinstance(train, int) and original > train:
        problems.append(f"original_inference_steps must be at most num_train_timesteps ({train}), got {original}")
    betas = options.get("trained_betas")
    is_list = isinstance(betas, list) and len(betas) == train
    if betas is not None and not (is_list and all(isinstance(beta, float) and 0 < beta < 1 for beta in betas)):
        problems.append(f"trained_betas must be null or {train} numbers between 0 and 1, got {str(betas)[:40]}")
    return problems
