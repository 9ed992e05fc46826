"""The default sampler of a checkpoint: what its scheduler folder names, or the nearest to it.

A file may name a class that is not sampled with here, or options of its class that no sampler here has. The model is
the same for all samplers, so it loads, and `departures` says what differs.
"""

from collections.abc import Mapping, Set
from typing import Any

from app.diffusion.samplers.catalogue import samplers_for
from app.diffusion.samplers.flow import FlowSchedule
from app.diffusion.samplers.schedule import SOLVER_OPTIONS, Schedule

_SAMPLER_OF_CLASS = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "DEISMultistepScheduler": "deis",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "DPMSolverSDEScheduler": "dpmpp_sde",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "EulerDiscreteScheduler": "euler",
    "HeunDiscreteScheduler": "heun",
    "LCMScheduler": "lcm",
    "LMSDiscreteScheduler": "lms",
    "PNDMScheduler": "pndm",
    "UniPCMultistepScheduler": "unipc",
}
# As many evaluations a step, and noise where the class draws it.
_NEAREST_OF_CLASS = {
    "DPMSolverSinglestepScheduler": "dpmpp_2m",
    "KDPM2AncestralDiscreteScheduler": "dpmpp_sde",
    "KDPM2DiscreteScheduler": "heun",
    "SASolverScheduler": "dpmpp_2m_sde",
    "TCDScheduler": "lcm",
}
_SPACINGS = {"use_karras_sigmas": "_karras", "use_exponential_sigmas": "_exponential", "use_beta_sigmas": "_beta"}
# The options that a class reads. Files also keep options of a class that their scheduler was made from; these mean
# nothing. A class that is not among these reads none of SOLVER_OPTIONS.
_READ_BY_CLASS: Mapping[str, Set[str]] = {
    **dict.fromkeys(("DPMSolverSDEScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler"), _SPACINGS.keys()),
    **dict.fromkeys(("KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler"), _SPACINGS.keys()),
    **dict.fromkeys(("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"), SOLVER_OPTIONS),
    **dict.fromkeys(("SASolverScheduler", "UniPCMultistepScheduler"), SOLVER_OPTIONS),
    "DDPMScheduler": {"variance_type"},
    "DEISMultistepScheduler": _SPACINGS.keys() | {"lower_order_final", "solver_order"},
    "EulerDiscreteScheduler": _SPACINGS.keys() | {"final_sigmas_type", "interpolation_type", "sigma_max", "sigma_min"},
}
# What the samplers here do, where a class has the option. Where the final sigma is zero the last step of DPM-Solver is
# first order in any case, so lower_order_final and euler_at_final change nothing.
_FOLLOWED: Mapping[str, tuple[Any, ...]] = {
    "corrector_order": (2,),
    "disable_corrector": ("[]",),
    "euler_at_final": (True, False),
    "final_sigmas_type": ("zero",),
    "interpolation_type": ("linear",),
    "lambda_min_clipped": (float("-inf"),),
    "lower_order_final": (True, False),
    "predict_x0": (True,),
    "predictor_order": (2,),
    "sigma_max": (None,),
    "sigma_min": (None,),
    "solver_order": (2,),
    "solver_p": (None,),
    "solver_type": ("midpoint", "bh2", "logrho"),
    "tau_func": (None,),
    "use_lu_lambdas": (False,),
    "variance_type": (None, "fixed_small"),
    "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "deis"),
}
_FOLLOWED_BY: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "deis": {"lower_order_final": (True,)},
    "unipc": {"lower_order_final": (True,)},
}


def default_sampler(schedule: Schedule | FlowSchedule) -> str:
    """The sampler that the checkpoint's scheduler folder names, or the nearest that can follow its schedule."""
    return _resolved(schedule)[0]


def departures(schedule: Schedule | FlowSchedule) -> tuple[str, ...]:
    """A sentence for each way in which the default sampler is not what the checkpoint's scheduler folder names."""
    return _resolved(schedule)[1]


def _resolved(schedule: Schedule | FlowSchedule) -> tuple[str, tuple[str, ...]]:
    if isinstance(schedule, FlowSchedule):
        return "euler", ()
    able, read = samplers_for(schedule), _READ_BY_CLASS.get(schedule.class_name, set())
    options = {name: value for name, value in schedule.solver if name in read}
    method = _SAMPLER_OF_CLASS.get(schedule.class_name)
    if method == "dpmpp_2m" and str(options.get("algorithm_type")).startswith("sde-"):
        method = "dpmpp_2m_sde"
    wanted = method or _NEAREST_OF_CLASS[schedule.class_name]
    spacing = next((suffix for option, suffix in _SPACINGS.items() if options.get(option)), "")
    name = next(name for name in (wanted + spacing, wanted, "ddim") if name in able)
    sentences = []
    if method is None or not name.startswith(wanted):
        sentences.append(f"The checkpoint names {schedule.class_name}; the default sampler is the nearest, {name}.")
    followed = {**_FOLLOWED, **_FOLLOWED_BY.get(wanted, {})}
    unlike = [f"{option} {value}" for option, value in options.items() if value not in followed.get(option, (value,))]
    if spacing and not name.endswith(spacing):
        unlike.append(f"{spacing[1:]} sigmas")
    if unlike:
        sentences.append(f"The default sampler, {name}, does not follow the checkpoint's {', '.join(unlike)}.")
    return name, tuple(sentences)
