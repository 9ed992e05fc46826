"""Every sampler by its name in the API, and which of them can follow a schedule. A new sampler is an entry here."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial

from app.diffusion.samplers.dpm_solver import dpmpp_2m, dpmpp_2m_sde, unipc
from app.diffusion.samplers.dpmpp_sde import dpmpp_sde
from app.diffusion.samplers.first_order import ddim, ddpm, euler, euler_ancestral, lcm
from app.diffusion.samplers.flow import FlowSchedule, flow_euler
from app.diffusion.samplers.noise_levels import (
    Grid,
    beta,
    deis_grid,
    dpm_grid,
    dpm_karras_grid,
    euler_grid,
    exponential,
    karras,
)
from app.diffusion.samplers.noise_multistep import deis, heun, lms
from app.diffusion.samplers.plms import pndm
from app.diffusion.samplers.schedule import Schedule
from app.diffusion.samplers.table import SamplerTable
from app.types import InvalidField

Builder = Callable[[int, Schedule, int], SamplerTable]  # steps, schedule, and how many steps are left out


def on(grid: Callable[[int, Schedule], Grid], method: Callable[[Grid, Schedule], SamplerTable]) -> Builder:
    return lambda steps, schedule, begin: method(grid(steps, schedule).after(begin), schedule)


def trailing(builder: Builder) -> Builder:
    """With trailing timesteps, whatever the checkpoint's file says: few-step models are distilled on these."""
    return lambda steps, schedule, begin: builder(steps, replace(schedule, timestep_spacing="trailing"), begin)


_euler_karras, _euler_exponential, _euler_beta = (
    partial(euler_grid, levels=levels) for levels in (karras, exponential, beta)
)
_BETA: dict[str, Builder] = {
    "ddim": ddim,
    "ddim_trailing": trailing(ddim),
    "ddpm": ddpm,
    "euler": on(euler_grid, euler),
    "euler_karras": on(_euler_karras, euler),
    "euler_exponential": on(_euler_exponential, euler),
    "euler_beta": on(_euler_beta, euler),
    "euler_trailing": trailing(on(euler_grid, euler)),
    "euler_ancestral": on(euler_grid, euler_ancestral),
    "euler_ancestral_trailing": trailing(on(euler_grid, euler_ancestral)),
    "heun": on(euler_grid, heun),
    "heun_karras": on(_euler_karras, heun),
    "lms": on(euler_grid, lms),
    "lms_karras": on(_euler_karras, lms),
    "dpmpp_2m": on(dpm_grid, dpmpp_2m),
    "dpmpp_2m_karras": on(dpm_karras_grid, dpmpp_2m),
    "dpmpp_2m_sde": on(dpm_grid, dpmpp_2m_sde),
    "dpmpp_2m_sde_karras": on(dpm_karras_grid, dpmpp_2m_sde),
    "dpmpp_sde": on(euler_grid, dpmpp_sde),
    "dpmpp_sde_karras": on(_euler_karras, dpmpp_sde),
    "deis": on(deis_grid, deis),
    "unipc": on(dpm_grid, unipc),
    "unipc_karras": on(dpm_karras_grid, unipc),
    "pndm": pndm,
    "lcm": lcm,
}
_FLOW = {"euler": flow_euler}
SAMPLERS = tuple(_BETA)


def samplers_for(schedule: Schedule | FlowSchedule) -> tuple[str, ...]:
    """The samplers that can follow this schedule."""
    if isinstance(schedule, FlowSchedule):
        return tuple(_FLOW)
    unable = set()
    if schedule.prediction_type == "sample":
        unable.add("pndm")  # mixes outputs as if they were noise
    if schedule.rescale_betas_zero_snr:
        # pndm divides by alpha_bar, zero at the first timestep of such a schedule. For the others diffusers has no
        # noise level there.
        unable |= {"pndm", "deis", "heun", "heun_karras", "lms", "lms_karras", "dpmpp_sde", "dpmpp_sde_karras"}
    if schedule.beta_schedule == "squaredcos_cap_v2":
        # diffusers truncates the timesteps here, and those that are whole come out a hair below: noise decides.
        unable |= {"dpmpp_2m_karras", "dpmpp_2m_sde_karras"}
    return tuple(name for name in SAMPLERS if name not in unable)


@lru_cache(maxsize=256)
def make_table(
    name: str,
    num_inference_steps: int,
    schedule: Schedule | FlowSchedule,
    image_tokens: int | None = None,
    begin: int = 0,
) -> SamplerTable:
    """The table of sampler `name`: a row for each evaluation of the denoiser, which some samplers have more of.

    An edit leaves out the first `begin` steps (`skipped_steps`).

    `image_tokens` is what a picture of the size at hand has in the transformer. It counts where a flow schedule's
    shift follows it. Raises InvalidField for a sampler, or a number of steps, that the schedule cannot have.
    """
    if name not in samplers_for(schedule):
        message = f"sampler must be one of {', '.join(samplers_for(schedule))}, got {name}."
        if isinstance(schedule, FlowSchedule) and name in SAMPLERS:
            message += f" This model was trained by flow matching, and {name} steps through a schedule of betas."
        raise InvalidField("sampler", message)
    most = schedule.num_train_timesteps
    if isinstance(schedule, Schedule) and name == "lcm":
        most = min(most, schedule.original_inference_steps)
    if not 1 <= num_inference_steps <= most:
        message = f"num_inference_steps must be between 1 and {most} for sampler {name}, got {num_inference_steps}."
        raise InvalidField("num_inference_steps", message)
    if isinstance(schedule, FlowSchedule):
        return _FLOW[name](num_inference_steps, schedule, image_tokens, begin)
    return _BETA[name](num_inference_steps, schedule, begin)


def skipped_steps(strength: float, num_inference_steps: int, schedule: Schedule | FlowSchedule) -> int:
    """How many steps an edit of this strength leaves out, as `get_timesteps` of diffusers' pipelines.

    Those of flow models round the steps that are left up, the others down. Raises InvalidField where no step is left.
    """
    steps = num_inference_steps
    left = min(steps * strength, steps)
    skipped = int(steps - left) if isinstance(schedule, FlowSchedule) else steps - int(left)
    if skipped >= steps:
        least = f"at least {1 / steps:.3g}, which is one of {steps} steps"
        raise InvalidField("strength", f"strength must be {least}, got {strength:g}.")
    return skipped


def evaluations(name: str | None, num_inference_steps: int) -> int:
    """How often a sampler evaluates the denoiser for an image: the rows of its table, without making one.

    Of `None`, the checkpoint's own sampler, it knows nothing better than one evaluation a step.
    """
    steps = num_inference_steps
    if name is not None and name.removesuffix("_karras") in ("heun", "dpmpp_sde"):
        return 2 * steps - 1
    return steps + 1 if name == "pndm" and steps > 1 else steps
