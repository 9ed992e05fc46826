"""Samplers that look at one output only: each step goes from a noise level to the next by the latest m = x_0."""

import numpy as np

from app.diffusion.samplers.noise_levels import Grid, alphas_bar_of, levels_of, whole_timesteps
from app.diffusion.samplers.prediction import to_denoised
from app.diffusion.samplers.schedule import Schedule
from app.diffusion.samplers.table import Float64, SamplerTable, table_of


def ddim(steps: int, schedule: Schedule, begin: int = 0) -> SamplerTable:
    """DDIM with eta 0 (Song et al. 2020, arXiv:2010.02502, equation 12).

    x' = sqrt(abar') x_0 + sqrt(1 - abar') eps, with eps = (x - sqrt(abar) x_0) / sqrt(1 - abar) and m = x_0.
    """
    t = whole_timesteps(steps, schedule, "leading")[begin:]
    alphas_bar = alphas_bar_of(schedule)
    # As in diffusers: a fixed stride back from t. Unless the spacing is leading, that is not exactly the next t.
    target = t.astype(int) - schedule.num_train_timesteps // steps
    end = 1.0 if schedule.set_alpha_to_one in (True, None) else alphas_bar[0]
    return deterministic(t, alphas_bar[t.astype(int)], np.where(target >= 0, alphas_bar[target], end), schedule)


def ddpm(steps: int, schedule: Schedule, begin: int = 0) -> SamplerTable:
    """Ancestral sampling with the smaller variance (Ho et al. 2020, arXiv:2006.11239, equations 6 and 7).

    With alpha = abar / abar' and m = x_0: x' = sqrt(abar') (1 - alpha) / (1 - abar) m
    + sqrt(alpha) (1 - abar') / (1 - abar) x + sqrt((1 - abar') (1 - alpha) / (1 - abar)) z.
    """
    t = whole_timesteps(steps, schedule, "leading")[begin:]
    bar = alphas_bar_of(schedule)[t.astype(int)]
    target_bar = np.append(bar[1:], 1.0)
    alpha = bar / target_bar
    p, q = to_denoised(bar, schedule)
    a, b = np.sqrt(alpha) * (1 - target_bar), np.sqrt(target_bar) * (1 - alpha)
    n = np.sqrt((1 - target_bar) * (1 - alpha) / (1 - bar))
    return table_of(t, p=p, q=q, a=a / (1 - bar), b=[b / (1 - bar)], n=n, levels=levels_of(bar))


def euler(grid: Grid, schedule: Schedule) -> SamplerTable:
    """Euler's method on the probability-flow ODE (Karras et al. 2022, arXiv:2206.00364, algorithm 1 without churn).

    y' = y + (sigma' - sigma) (y - x_0) / sigma. In variance-preserving latents that is DDIM's update, with
    abar = 1 / (sigma^2 + 1); the two differ in their timesteps, which here need not be whole, and in their last step.
    """
    bar = 1 / (grid.sigmas**2 + 1)
    return deterministic(grid.timesteps, bar[:-1], bar[1:], schedule, grid.initial_scale)


def euler_ancestral(grid: Grid, schedule: Schedule) -> SamplerTable:
    """Euler down to sigma_down, then fresh noise of sigma_up (Song et al. 2021, arXiv:2011.13456, appendix F).

    sigma_up^2 = sigma'^2 (sigma^2 - sigma'^2) / sigma^2, sigma_down^2 = sigma'^2 - sigma_up^2;
    y' = x_0 + (sigma_down / sigma) (y - x_0) + sigma_up z.
    """
    sigma, target = grid.sigmas[:-1], grid.sigmas[1:]
    up = target * np.sqrt(1 - (target / sigma) ** 2)
    down = target**2 / sigma
    scale, target_scale = np.sqrt(sigma**2 + 1), np.sqrt(target**2 + 1)
    p, q = to_denoised(1 / scale**2, schedule)
    a, b = down / sigma * scale / target_scale, (1 - down / sigma) / target_scale
    levels, start = levels_of(1 / scale**2), grid.initial_scale
    return table_of(grid.timesteps, p=p, q=q, a=a, b=[b], n=up / target_scale, levels=levels, initial_scale=start)


def lcm(steps: int, schedule: Schedule, begin: int = 0) -> SamplerTable:
    """Multistep consistency sampling (Luo et al. 2023, arXiv:2310.04378, algorithm 3).

    m = c_skip x + c_out x_0, with the boundary conditions c_skip = s^2 / (T^2 + s^2) and c_out = T / sqrt(T^2 + s^2)
    for s = 0.5 and T = timestep_scaling t; x' = sqrt(abar') m + sqrt(1 - abar') z, and the last step returns m. The
    timesteps are spread over the `original_inference_steps` that the model was distilled on, whatever the spacing.
    """
    original = schedule.original_inference_steps
    distilled = np.arange(original, 0, -1.0) * (schedule.num_train_timesteps // original) - 1
    t = distilled[np.floor(np.linspace(0, original, steps, endpoint=False)).astype(int)][begin:]
    bar = alphas_bar_of(schedule)[t.astype(int)]
    target_bar = np.append(bar[1:], 1.0)
    clock = schedule.timestep_scaling * t
    skip, out = 0.25 / (clock**2 + 0.25), clock / np.sqrt(clock**2 + 0.25)
    p, q = to_denoised(bar, schedule)
    signal, noise = levels_of(target_bar)
    return table_of(t, p=out * p + skip, q=out * q, a=0.0, b=[signal], n=noise, levels=levels_of(bar))


def deterministic(
    t: Float64, bar: Float64, target_bar: Float64, schedule: Schedule, initial_scale: float = 1.0
) -> SamplerTable:
    p, q = to_denoised(bar, schedule)
    a = np.sqrt((1 - target_bar) / (1 - bar))
    b, levels = [np.sqrt(target_bar) - a * np.sqrt(bar)], levels_of(bar)
    return table_of(t, p=p, q=q, a=a, b=b, levels=levels, initial_scale=initial_scale)
