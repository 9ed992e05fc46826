"""The noise levels of a beta schedule: those of training, and the grids of them that samplers step through.

A noise level is sigma = sqrt((1 - alpha_bar) / alpha_bar). Knows nothing of update rules.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple, TypeAlias

import numpy as np

from app.diffusion.samplers.schedule import Schedule
from app.diffusion.samplers.table import Float64

# Noise levels from the highest to the lowest, in so many steps.
Levels: TypeAlias = Callable[[float, float, int], Float64]


class Grid(NamedTuple):
    """Where a sampler evaluates the denoiser."""

    timesteps: Float64  # [N], falling; need not be whole
    sigmas: Float64  # [N + 1], falling; the last is the noise level of the result
    initial_scale: float = 1.0  # of the initial noise, in variance-preserving latents
    skipped: int = 0  # steps before the first

    def after(self, steps: int) -> "Grid":
        """The grid of an edit that leaves out the first `steps`. A multistep sampler begins there as at the start."""
        return Grid(self.timesteps[steps:], self.sigmas[steps:], self.initial_scale, steps)


def levels_of(alphas_bar: Float64) -> tuple[Float64, Float64]:
    """The shares of image and noise in variance-preserving latents."""
    return np.sqrt(alphas_bar), np.sqrt(1 - alphas_bar)


@lru_cache(maxsize=16)
def alphas_bar_of(schedule: Schedule) -> Float64:
    """alphas_cumprod of training, [num_train_timesteps]; the last is 0 if rescaled to zero terminal SNR."""
    steps = schedule.num_train_timesteps
    if schedule.trained_betas is not None:
        betas = np.array(schedule.trained_betas)
    elif schedule.beta_schedule == "squaredcos_cap_v2":
        # Nichol and Dhariwal 2021, arXiv:2102.09672, equation 17.
        curve = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - curve[1:] / curve[:-1], 0.999)
    elif schedule.beta_schedule == "scaled_linear":
        betas = np.linspace(schedule.beta_start**0.5, schedule.beta_end**0.5, steps) ** 2
    else:
        betas = np.linspace(schedule.beta_start, schedule.beta_end, steps)
    alphas_bar = np.cumprod(1 - betas)
    if schedule.rescale_betas_zero_snr:
        # Lin et al. 2023, arXiv:2305.08891, algorithm 1.
        root = np.sqrt(alphas_bar)
        alphas_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    alphas_bar.setflags(write=False)
    return alphas_bar


def trained_sigmas(schedule: Schedule) -> Float64:
    """[num_train_timesteps], rising."""
    alphas_bar = alphas_bar_of(schedule).copy()
    if schedule.rescale_betas_zero_snr:
        alphas_bar[-1] = 2.0**-24  # diffusers' stand-in for an infinite first sigma
    return np.asarray(np.sqrt((1 - alphas_bar) / alphas_bar))


def whole_timesteps(steps: int, schedule: Schedule, default_spacing: str) -> Float64:
    """`spaced_timesteps`, rounded."""
    return spaced_timesteps(steps, schedule, schedule.timestep_spacing or default_spacing).round()


def spaced_timesteps(steps: int, schedule: Schedule, spacing: str) -> Float64:
    """Falling timesteps [steps]; the spacings are table 2 of Lin et al. 2023, arXiv:2305.08891."""
    train = schedule.num_train_timesteps
    if spacing == "linspace":
        t = np.linspace(0, train - 1, steps)[::-1]
    elif spacing == "leading":
        t = np.arange(steps - 1, -1, -1.0) * (train // steps) + schedule.steps_offset
    else:
        # arange with a fractional stride can yield one value too many (61 steps of 1000 end at -1 in diffusers).
        t = np.arange(train, 0, -train / steps)[:steps].round() - 1
    check_timesteps(t, schedule, spacing)
    return t


def check_timesteps(t: Float64, schedule: Schedule, spacing: str) -> None:
    last = schedule.num_train_timesteps - 1
    if t.max() > last or not (np.diff(t) < 0).all():
        raise ValueError(
            f"num_inference_steps must leave distinct timesteps between 0 and {last}, but {len(t)} with "
            f"timestep_spacing {spacing} and steps_offset {schedule.steps_offset} do not; ask for fewer."
        )


def euler_grid(steps: int, schedule: Schedule, levels: Levels | None = None) -> Grid:
    """The grid of samplers that the literature writes in sigma space; it ends at 0.

    `levels` replaces the noise levels of the schedule's timesteps, but for the first and the last.
    """
    spacing = schedule.timestep_spacing or "linspace"
    t = spaced_timesteps(steps, schedule, spacing)
    sigmas = np.interp(t, np.arange(schedule.num_train_timesteps), trained_sigmas(schedule))
    # diffusers starts from y = sigma z, or from sqrt(sigma^2 + 1) z where the first timestep is short of the last
    # trained one and pure noise of sigma alone would be too little.
    initial_scale = 1.0 if spacing == "leading" else float(sigmas[0] / math.sqrt(sigmas[0] ** 2 + 1))
    if levels is not None:
        sigmas = levels(sigmas[0], sigmas[-1], steps)
        t = timesteps_of(sigmas, schedule)
    return Grid(t, np.append(sigmas, 0.0), initial_scale)


def dpm_grid(steps: int, schedule: Schedule) -> Grid:
    """The grid of the DPM-Solver family: whole timesteps, of which the last is a stride above 0; it ends at 0."""
    train = schedule.num_train_timesteps
    spacing = schedule.timestep_spacing or "linspace"
    if spacing == "linspace":
        t = np.linspace(0, train - 1, steps + 1).round()[:0:-1]
    elif spacing == "leading":
        t = np.arange(steps, 0, -1.0) * (train // (steps + 1)) + schedule.steps_offset
    else:
        t = spaced_timesteps(steps, schedule, spacing)
    check_timesteps(t, schedule, spacing)
    sigmas = np.interp(t, np.arange(train), trained_sigmas(schedule))
    return Grid(t, np.append(sigmas, 0.0))


def deis_grid(steps: int, schedule: Schedule) -> Grid:
    """As `dpm_grid`, but it ends at the smallest noise level of training: log sigma must be finite."""
    grid = dpm_grid(steps, schedule)
    return grid._replace(sigmas=np.append(grid.sigmas[:-1], trained_sigmas(schedule)[0]))


def dpm_karras_grid(steps: int, schedule: Schedule) -> Grid:
    """Karras noise levels from the largest to the smallest of training, at the whole timesteps next to them."""
    trained = trained_sigmas(schedule)
    sigmas = karras(trained[-1], trained[0], steps)
    return Grid(timesteps_of(sigmas, schedule).round(), np.append(sigmas, 0.0))


def karras(high: float, low: float, steps: int) -> Float64:
    """sigma^(1/7) falls linearly: Karras et al. 2022, arXiv:2206.00364, equation 5 with rho = 7."""
    return np.asarray((high ** (1 / 7) + np.linspace(0, 1, steps) * (low ** (1 / 7) - high ** (1 / 7))) ** 7)


def exponential(high: float, low: float, steps: int) -> Float64:
    """log(sigma) falls linearly."""
    return np.exp(np.linspace(math.log(high), math.log(low), steps))


def beta(high: float, low: float, steps: int) -> Float64:
    """Quantiles of the beta distribution with both parameters 0.6 (Lee et al. 2024, arXiv:2407.12173)."""
    return np.asarray(low + (high - low) * beta_quantiles(1 - np.linspace(0, 1, steps)))


def beta_quantiles(shares: Float64, shape: float = 0.6) -> Float64:
    """Where the cumulative beta distribution with both parameters `shape` has these values, by bisection.

    Below 1/2 its integral is smooth in t^shape; above, it is the mirror image.
    """
    nodes, weights = np.polynomial.legendre.leggauss(40)

    def integral(x: Float64) -> Float64:
        u = np.asarray(x**shape)[..., None] * (nodes + 1) / 2
        return np.asarray(x**shape / (2 * shape) * ((1 - u ** (1 / shape)) ** (shape - 1) @ weights))

    lower = np.minimum(shares, 1 - shares) * 2 * integral(np.array(0.5))
    low, high = np.zeros(len(shares)), np.full(len(shares), 0.5)
    for _ in range(60):
        middle = (low + high) / 2
        below = integral(middle) < lower
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    low = np.where(lower > 0, low, 0.0)
    return np.where(shares <= 0.5, low, 1 - low)


def timesteps_of(sigmas: Float64, schedule: Schedule) -> Float64:
    """The timesteps at which the denoiser was trained on these noise levels, by interpolating log sigma."""
    trained = trained_sigmas(schedule)
    return np.asarray(np.interp(np.log(sigmas), np.log(trained), np.arange(len(trained))))
