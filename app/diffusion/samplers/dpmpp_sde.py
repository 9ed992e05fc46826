"""DPM-Solver++(S) for the SDE, known as DPM++ SDE (k-diffusion): two evaluations and two noises a step."""

import numpy as np

from app.diffusion.samplers.noise_levels import Grid, levels_of, timesteps_of
from app.diffusion.samplers.prediction import to_denoised
from app.diffusion.samplers.schedule import Schedule
from app.diffusion.samplers.table import SamplerTable, table_of


def dpmpp_sde(grid: Grid, schedule: Schedule) -> SamplerTable:
    """In sigma space, with ancestral steps from sigma to sigma' by way of sigma_m = sqrt(sigma sigma').

    y_m = A y + (1 - A) x_0 + u z_1, with A = sigma_m^2 / sigma^2 and u = sigma_m sqrt(1 - A);
    y'  = C y + (1 - C) x_0m + v (sqrt(w) z_1 + sqrt(1 - w) z_2), with C = sigma'^2 / sigma^2, v = sigma' sqrt(1 - C).

    The noises are increments of one Brownian motion over sigma, so z_1 returns with w = (sigma - sigma_m) / (sigma -
    sigma'). The second evaluation needs y and z_1, which are gone. But it needs only C y + v sqrt(w) z_1, a multiple
    B = v sqrt(w) / u of y_m - m, if the first output is kept as m = (A - C / B) y + (1 - A) x_0.
    The last step ends at 0 and is Euler's.
    """
    sigma, target = grid.sigmas[:-2], grid.sigmas[1:-1]
    middle = np.sqrt(sigma * target)
    down, whole_down = (middle / sigma) ** 2, (target / sigma) ** 2
    up, whole_up = middle * np.sqrt(1 - down), target * np.sqrt(1 - whole_down)
    shared = (sigma - middle) / (sigma - target)
    back = whole_up * np.sqrt(shared) / up
    keep = whole_down / back

    levels = np.append(_interleaved(sigma, middle), grid.sigmas[-2:])
    scale = np.sqrt(levels**2 + 1)
    p, q = to_denoised(1 / scale[:-1] ** 2, schedule)
    first, second = slice(0, -1, 2), slice(1, -1, 2)
    p[first] = (down - keep) * scale[:-1][first] + (1 - down) * p[first]
    q[first] *= 1 - down
    a, newest, older, n = np.zeros(len(p)), np.ones(len(p)), np.zeros(len(p)), np.zeros(len(p))
    a[first], n[first] = keep * scale[:-1][first], up
    a[second], n[second] = back * scale[:-1][second], whole_up * np.sqrt(1 - shared)
    newest[second], older[second] = 1 - whole_down, -back
    denoised = np.ones(len(p))
    denoised[first] = 1 / (1 - keep)  # x_0 but for a small share of the noise in y
    return table_of(
        np.append(_interleaved(grid.timesteps[:-1], timesteps_of(middle, schedule)), grid.timesteps[-1]),
        p=p,
        q=q,
        a=a / scale[1:],
        b=[newest / scale[1:], older / scale[1:]],
        n=n / scale[1:],
        preview=(0.0, denoised),
        levels=levels_of(1 / scale[:-1] ** 2),
        initial_scale=grid.initial_scale,
    )


def _interleaved(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.stack([first, second], axis=-1).ravel()
