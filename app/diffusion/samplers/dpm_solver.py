"""The DPM-Solver++ family: exponential integrators for m = x_0 that extrapolate from the last two outputs.

With alpha and s the latents' shares of image and noise, sigma = s / alpha and h = log(sigma / sigma'), a step is
x' = (s'/s) x + alpha' (1 - exp(-h)) D, and D = m_i + (h / 2 h_previous) (m_i - m_{i-1}). The first and the last step
have D = m_i.
"""

import numpy as np

from app.diffusion.samplers.noise_levels import Grid, levels_of
from app.diffusion.samplers.prediction import to_denoised
from app.diffusion.samplers.schedule import Schedule
from app.diffusion.samplers.table import Float64, SamplerTable, table_of


def dpmpp_2m(grid: Grid, schedule: Schedule) -> SamplerTable:
    """DPM-Solver++(2M), midpoint (Lu et al. 2022, arXiv:2211.01095, algorithm 2)."""
    bar, ratio = 1 / (grid.sigmas**2 + 1), grid.sigmas[1:] / grid.sigmas[:-1]
    p, q = to_denoised(bar[:-1], schedule)
    a, gain, lean = _shares(bar), np.sqrt(bar[1:]) * (1 - ratio), _lean(grid.sigmas)
    return table_of(grid.timesteps, p=p, q=q, a=a, b=[gain * (1 + lean), -gain * lean], levels=levels_of(bar[:-1]))


def dpmpp_2m_sde(grid: Grid, schedule: Schedule) -> SamplerTable:
    """SDE-DPM-Solver++(2M), midpoint (Lu et al. 2022, arXiv:2211.01095, equation 19).

    x' = (s'/s) exp(-h) x + alpha' (1 - exp(-2h)) D + s' sqrt(1 - exp(-2h)) z.
    """
    bar, ratio = 1 / (grid.sigmas**2 + 1), grid.sigmas[1:] / grid.sigmas[:-1]
    p, q = to_denoised(bar[:-1], schedule)
    gain, lean = np.sqrt(bar[1:]) * (1 - ratio**2), _lean(grid.sigmas)
    n = np.sqrt(1 - bar[1:]) * np.sqrt(1 - ratio**2)
    b, levels = [gain * (1 + lean), -gain * lean], levels_of(bar[:-1])
    return table_of(grid.timesteps, p=p, q=q, a=_shares(bar) * ratio, b=b, n=n, levels=levels)


def unipc(grid: Grid, schedule: Schedule) -> SamplerTable:
    """UniPC of order 2 with B(h) = exp(h) - 1 (Zhao et al. 2023, arXiv:2302.04867, algorithms 5 to 8).

    UniP predicts x_{i+1} from a corrected x_i as DPM-Solver++(2M) does. UniC corrects x_i once its output m_i is known:
    it takes the step that led to x_i again, with m_i. Both begin at the same latents, so the correction is a sum of
    outputs, c_i = x_i + gain_{i-1} (rho (m_i - m_{i-1}) + k (m_{i-2} - m_{i-1})), and c_i need not be kept.
    """
    bar, ratio = 1 / (grid.sigmas**2 + 1), grid.sigmas[1:] / grid.sigmas[:-1]
    p, q = to_denoised(bar[:-1], schedule)
    a, gain, lean = _shares(bar), np.sqrt(bar[1:]) * (1 - ratio), _lean(grid.sigmas)
    rho, k = np.zeros(len(p)), np.zeros(len(p))
    rho[1:2] = 1 / 2  # what corrects the first step is of first order
    h = _h(grid.sigmas)
    # The two conditions of order 2: rho_1 + rho = phi_1 and r rho_1 + rho = phi_2, where r = -h_previous / h.
    step, r = -h[1:], -h[:-1] / h[1:]
    grown = np.expm1(step)
    phi_1 = (grown / step - 1) / grown
    phi_2 = 2 * ((grown / step - 1) / step - 1 / 2) / grown
    rho_1 = (phi_1 - phi_2) / (1 - r)
    rho[2:], k[2:] = phi_1 - rho_1, (rho_1 - 1 / 2) / r
    correction = a * np.append(0.0, gain[:-1])
    b = [gain * (1 + lean) + correction * rho, -gain * lean - correction * (rho + k), correction * k]
    return table_of(grid.timesteps, p=p, q=q, a=a, b=b, levels=levels_of(bar[:-1]))


def _shares(bar: Float64) -> Float64:
    """s' / s of each step."""
    return np.asarray(np.sqrt((1 - bar[1:]) / (1 - bar[:-1])))


def _h(sigmas: Float64) -> Float64:
    """h of each step but the last, [N - 1]: the last ends at sigma 0, where it is infinite."""
    return np.asarray(np.log(sigmas[:-2] / sigmas[1:-1]))


def _lean(sigmas: Float64) -> Float64:
    """h / 2 h_previous of each step, 0 for the first and the last."""
    h, lean = _h(sigmas), np.zeros(len(sigmas) - 1)
    lean[1:-1] = h[1:] / (2 * h[:-1])
    return lean
