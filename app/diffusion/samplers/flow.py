"""Flow matching (Lipman et al. 2022, arXiv:2210.02747): its schedule and its sampler.

Latents are x = (1 - sigma) x_0 + sigma noise, and the denoiser predicts the velocity noise - x_0. Timesteps are
num_train_timesteps * sigma. A model that answers with the negative velocity is negated by its family.

A shift moves the noise levels up: sigma -> s sigma / (1 + (s - 1) sigma). It is a constant of the checkpoint, or
exp(mu) with mu from the number of image tokens, and for FLUX.2 also from the number of steps.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from app.diffusion.samplers.table import SamplerTable, table_of
from app.types import InvalidField


@dataclass(frozen=True)
class FlowSchedule:
    """A flow model's scheduler_config.json. `dynamic` says how its family computes mu; None: the shift is constant."""

    kind: ClassVar = "flow"

    class_name: str = "FlowMatchEulerDiscreteScheduler"
    num_train_timesteps: int = 1000
    shift: float = 1.0
    dynamic: str | None = None  # a key of MU
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, dynamic: str = "linear") -> "FlowSchedule":
        """Check a parsed scheduler_config.json; all problems are raised as one ValueError.

        `dynamic` is the rule of the family's pipeline, a key of MU. It counts where the file asks for a dynamic shift.
        """
        problems = []
        if (name := config.get("_class_name")) != cls.class_name:
            problems.append(f"_class_name must be {cls.class_name} for a flow model, got {name!r}")
        options = {name: value for name, value in config.items() if not name.startswith("_")}
        for name, value in options.items():
            if name in _FIXED:
                if value not in _FIXED[name]:
                    problems.append(f"{name} must be {' or '.join(map(repr, _FIXED[name]))}, got {value!r}")
            elif name not in cls.__dataclass_fields__ or name == "dynamic":
                problems.append(f"{name} is not an option that is known here, got {value!r}")
            elif isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                problems.append(f"{name} must be a number above 0, got {value!r}")
        if problems:
            raise ValueError(f"The scheduler config cannot be followed: {'; '.join(problems)}.")
        kept = {name: value for name, value in options.items() if name not in _FIXED}
        return cls(**kept, dynamic=dynamic if options.get("use_dynamic_shifting") else None)


# Only these values are followed. The others are for video models, or change what a table must know.
_FIXED: dict[str, tuple[Any, ...]] = {
    "use_dynamic_shifting": (True, False),
    "invert_sigmas": (False,),
    "shift_terminal": (None,),
    "stochastic_sampling": (False,),
    "time_shift_type": ("exponential",),
    "use_beta_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_karras_sigmas": (False, None),
}


def linear_mu(schedule: FlowSchedule, image_tokens: int, steps: int) -> float:
    """FLUX.1 and Z-Image: linear in the number of image tokens, between the two that the checkpoint names."""
    slope = (schedule.max_shift - schedule.base_shift) / (schedule.max_image_seq_len - schedule.base_image_seq_len)
    return schedule.base_shift + slope * (image_tokens - schedule.base_image_seq_len)


def flux2_mu(schedule: FlowSchedule, image_tokens: int, steps: int) -> float:
    """FLUX.2: linear between two fits, for 10 and for 200 steps; from 4301 tokens on the latter alone.

    diffusers: pipelines/flux2/pipeline_flux2.py, compute_empirical_mu.
    """
    at_200 = 0.00016927 * image_tokens + 0.45666666
    if image_tokens > 4300:
        return at_200
    at_10 = 8.73809524e-05 * image_tokens + 1.89833333
    return at_10 + (at_200 - at_10) * (steps - 10) / 190


MU = {"linear": linear_mu, "flux2": flux2_mu}


def flow_euler(steps: int, schedule: FlowSchedule, image_tokens: int | None, begin: int = 0) -> SamplerTable:
    """Euler's method on dx = v dsigma: x' = x + (sigma' - sigma) v, with m = v.

    The preview is x_0 = x' - sigma' v. diffusers' pipelines space sigma linearly from 1 to 1 / steps before the shift.
    """
    sigmas = np.linspace(1.0, 1 / steps, steps)
    if schedule.dynamic is None:
        shift = schedule.shift
    elif image_tokens is None:
        raise InvalidField("sampler", "A dynamic shift needs the number of image tokens, got none.")
    else:
        shift = math.exp(MU[schedule.dynamic](schedule, image_tokens, steps))
    sigmas = (shift * sigmas / (1 + (shift - 1) * sigmas))[begin:]
    target = np.append(sigmas[1:], 0.0)
    timesteps = sigmas * schedule.num_train_timesteps
    b, levels = [target - sigmas], (1 - sigmas, sigmas)
    return table_of(timesteps, p=0.0, q=1.0, a=1.0, b=b, preview=(1.0, -target), levels=levels)
