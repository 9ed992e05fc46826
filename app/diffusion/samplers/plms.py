"""PLMS, a multistep method on whole timesteps, whose first step is taken twice."""

import numpy as np

from app.diffusion.samplers.noise_levels import alphas_bar_of, levels_of, whole_timesteps
from app.diffusion.samplers.prediction import to_denoised
from app.diffusion.samplers.schedule import Schedule
from app.diffusion.samplers.table import HISTORY, SamplerTable, table_of

_ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def pndm(steps: int, schedule: Schedule, begin: int = 0) -> SamplerTable:
    """PNDM without its Runge-Kutta start, that is PLMS (Liu et al. 2022, arXiv:2202.09778, equations 9 and 12).

    x' = sqrt(abar'/abar) x - (abar' - abar) e / (abar sqrt(1 - abar') + sqrt(abar (1 - abar) abar')), with e the
    Adams-Bashforth combination of the last outputs. The first step is taken twice, the second time from the same x_0
    with the mean of two outputs: x_0 = (x_1 - b_0 m_0) / a_0, so this is linear in what is at hand, too. Under
    v-prediction diffusers combines the v's and only then turns the result to epsilon; hence m is the raw output.

    An edit that leaves out the first `begin` steps takes its own first step twice, too. As in diffusers, it then has
    one timestep less for the noise levels that are left, so from its third row on each timestep is a stride too low.
    """
    train = schedule.num_train_timesteps
    t = whole_timesteps(steps, schedule, "leading").astype(int)
    if steps > 1:
        t = np.insert(t, 1, t[1])
    t = t[begin:]
    stride = train // steps
    source, target = t.copy(), t - stride
    if len(t) > 1:
        source[1], target[1] = t[1] + stride, t[1]
    alphas_bar = alphas_bar_of(schedule)
    end = 1.0 if schedule.set_alpha_to_one is True else alphas_bar[0]
    bar, target_bar = alphas_bar[source], np.where(target >= 0, alphas_bar[target], end)
    a = np.sqrt(target_bar / bar)
    e = -(target_bar - bar) / (bar * np.sqrt(1 - target_bar) + np.sqrt(bar * (1 - bar) * target_bar))
    if schedule.prediction_type == "v_prediction":
        a, e = a + e * np.sqrt(1 - bar), e * np.sqrt(bar)
    b = np.zeros((len(t), HISTORY))
    for i in range(len(t)):
        # Which earlier outputs count, newest first: all but that of evaluation 1, the redone step.
        lags = [i - k for k in range(i, -1, -1) if k != 1][:4] if i != 1 else [0, 1]
        weights = _ADAMS_BASHFORTH[len(lags)] if i != 1 else (1 / 2, 1 / 2)
        b[i, lags] = e[i] * np.array(weights)
    if len(t) > 1:
        b[1, 1] -= a[1] * e[0] / a[0]
        a[1] /= a[0]
    to_preview = to_denoised(target_bar, schedule)  # m_i is an output, and belongs to a timestep just before
    return table_of(t.astype(float), p=0.0, q=1.0, a=a, b=b.T, preview=to_preview, levels=levels_of(alphas_bar[t]))
