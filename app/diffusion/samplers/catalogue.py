"""Every sampler by its name in the API, and which of them can follow a schedule. A new sampler is an entry here."""

from collections.abc import Callable
from functools import lru_cache

from app.diffusion.samplers.first_order import ddim, euler, euler_ancestral, lcm
from app.diffusion.samplers.flow import FlowSchedule, flow_euler
from app.diffusion.samplers.multistep import dpmpp_2m, pndm
from app.diffusion.samplers.noise_levels import Grid, dpm_grid, dpm_karras_grid, euler_grid
from app.diffusion.samplers.schedule import Schedule
from app.diffusion.samplers.table import SamplerTable
from app.types import InvalidField

Builder = Callable[[int, Schedule], SamplerTable]


def on(grid: Callable[[int, Schedule], Grid], method: Callable[[Grid, Schedule], SamplerTable]) -> Builder:
    return lambda steps, schedule: method(grid(steps, schedule), schedule)


_BETA: dict[str, Builder] = {
    "ddim": ddim,
    "euler": on(euler_grid, euler),
    "euler_ancestral": on(euler_grid, euler_ancestral),
    "dpmpp_2m": on(dpm_grid, dpmpp_2m),
    "dpmpp_2m_karras": on(dpm_karras_grid, dpmpp_2m),
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
    if schedule.rescale_betas_zero_snr or schedule.prediction_type == "sample":
        unable.add("pndm")  # divides by alpha_bar, zero at the first timestep of the one; mixes outputs as if noise
    if schedule.beta_schedule == "squaredcos_cap_v2":
        # diffusers truncates the timesteps here, and those that are whole come out a hair below: noise decides.
        unable.add("dpmpp_2m_karras")
    return tuple(name for name in SAMPLERS if name not in unable)


@lru_cache(maxsize=256)
def make_table(
    name: str, num_inference_steps: int, schedule: Schedule | FlowSchedule, image_tokens: int | None = None
) -> SamplerTable:
    """The table of sampler `name`: a row for each evaluation of the denoiser, which some samplers have more of.

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
        return _FLOW[name](num_inference_steps, schedule, image_tokens)
    return _BETA[name](num_inference_steps, schedule)
