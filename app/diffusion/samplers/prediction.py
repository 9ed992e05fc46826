"""What a model's output says about the image and the noise in latents x = sqrt(abar) x_0 + sqrt(1 - abar) eps."""

import numpy as np

from app.diffusion.samplers.schedule import Schedule
from app.diffusion.samplers.table import Float64

Weights = tuple[Float64, Float64]  # p and q of m = p x + q o


def to_denoised(alphas_bar: Float64, schedule: Schedule) -> Weights:
    """p and q for m = x_0; v is Salimans and Ho 2022, arXiv:2202.00512, appendix D."""
    signal, noise = np.sqrt(alphas_bar), np.sqrt(1 - alphas_bar)
    if schedule.prediction_type == "sample":
        return np.zeros(len(signal)), np.ones(len(signal))
    if schedule.prediction_type == "v_prediction":
        return signal, -noise
    return 1 / signal, -noise / signal


def to_noise(alphas_bar: Float64, schedule: Schedule) -> Weights:
    """p and q for m = eps = (x - sqrt(abar) x_0) / sqrt(1 - abar)."""
    p, q = to_denoised(alphas_bar, schedule)
    signal, noise = np.sqrt(alphas_bar), np.sqrt(1 - alphas_bar)
    return (1 - signal * p) / noise, -signal * q / noise
