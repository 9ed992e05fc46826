"""Samplers that integrate dy / dsigma = eps in sigma space, y = x_0 + sigma eps, from the last outputs m = eps.

Each is y' = y + sum_j c_j m_{i-j} with weights c of its own.
"""

from collections.abc import Sequence

import numpy as np

from app.diffusion.samplers.noise_levels import Grid, levels_of
from app.diffusion.samplers.prediction import to_noise
from app.diffusion.samplers.schedule import Schedule
from app.diffusion.samplers.table import Float64, SamplerTable, table_of


def lms(grid: Grid, schedule: Schedule) -> SamplerTable:
    """Linear multistep of order 4: eps is the polynomial in sigma through the last four outputs (k-diffusion's LMS)."""
    steps = len(grid.timesteps)
    weights = np.zeros((4, steps))
    # Gauss-Legendre with four nodes is exact for these polynomials of degree three.
    nodes, shares = np.polynomial.legendre.leggauss(4)
    for i in range(steps):
        known, target = grid.sigmas[max(0, i - 3) : i + 1][::-1], grid.sigmas[i + 1]
        half = (target - known[0]) / 2
        at = known[0] + half * (nodes + 1)
        for j, sigma in enumerate(known):
            others = np.delete(known, j)
            basis = np.prod((at[:, None] - others) / (sigma - others), axis=1)
            weights[j, i] = half * shares @ basis
    return _integrated(grid, schedule, weights)


def deis(grid: Grid, schedule: Schedule) -> SamplerTable:
    """DEIS of order 2 (Zhang and Chen 2022, arXiv:2204.13902), where eps is linear in log sigma.

    The first step is of first order, and so is the last of fewer than 15, as in diffusers.
    """
    sigma, target = grid.sigmas[:-1], grid.sigmas[1:]
    newest, older = target - sigma, np.zeros(len(sigma))
    second = slice(1, len(sigma) - 1 if grid.skipped + len(sigma) < 15 else None)
    now, before, then = sigma[second], sigma[: len(sigma) - 1][: len(sigma[second])], target[second]

    def integral(anchor: Float64, zero: Float64) -> Float64:
        """Of the line in log sigma that is 1 at `anchor` and 0 at `zero`, over the step."""
        ends = [end * (np.log(end / zero) - 1) / np.log(anchor / zero) for end in (now, then)]
        return np.asarray(ends[1] - ends[0])

    newest[second], older[second] = integral(now, before), integral(before, now)
    return _integrated(grid, schedule, [newest, older])


def heun(grid: Grid, schedule: Schedule) -> SamplerTable:
    """Heun's method (Karras et al. 2022, arXiv:2206.00364, algorithm 1 without churn): two evaluations a step.

    The first goes to y' = y + (sigma' - sigma) m, the second replaces m by the mean of both outputs:
    y'' = y' + (sigma' - sigma) (m' - m) / 2. The last step ends at 0 and has the first alone.
    """
    twice = np.repeat(grid.sigmas[1:-1], 2)
    fine = Grid(
        np.append(grid.timesteps[0], np.repeat(grid.timesteps[1:], 2)),
        np.concatenate([grid.sigmas[:1], twice, grid.sigmas[-1:]]),
        grid.initial_scale,
        grid.skipped,
    )
    step = np.repeat(np.diff(grid.sigmas), 2)[:-1]
    second = np.arange(len(step)) % 2 == 1
    return _integrated(fine, schedule, [np.where(second, step / 2, step), np.where(second, -step / 2, 0.0)])


def _integrated(grid: Grid, schedule: Schedule, weights: Sequence[Float64] | Float64) -> SamplerTable:
    scale = np.sqrt(grid.sigmas**2 + 1)
    p, q = to_noise(1 / scale[:-1] ** 2, schedule)
    return table_of(
        grid.timesteps,
        p=p,
        q=q,
        a=scale[:-1] / scale[1:],
        b=[column / scale[1:] for column in weights],
        preview=(scale[1:], -grid.sigmas[1:]),
        levels=levels_of(1 / scale[:-1] ** 2),
        initial_scale=grid.initial_scale,
    )
