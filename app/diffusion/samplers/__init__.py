"""Every sampler as a table of coefficients. Needs numpy only; knows nothing of devices, requests or networks.

The latents of a beta schedule stay variance-preserving, x = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise, under
every sampler, because the denoiser takes such latents. Samplers that the literature writes in sigma space
(y = x_0 + sigma noise) are rescaled by y = sqrt(sigma^2 + 1) x, so the device has no input scaling to do. diffusers'
schedulers are the oracle: tests/make_golden.py records them, and tests/diffusion/test_samplers.py compares every step
with them.

CONTRIBUTING.md says how to add a sampler.
"""

from app.diffusion.samplers.catalogue import SAMPLERS, evaluations, make_table, samplers_for, skipped_steps
from app.diffusion.samplers.defaults import default_sampler, departures
from app.diffusion.samplers.flow import FlowSchedule
from app.diffusion.samplers.noise_levels import alphas_bar_of
from app.diffusion.samplers.schedule import Schedule
from app.diffusion.samplers.table import HISTORY, Coefficients, SamplerTable, update

__all__ = [
    "HISTORY",
    "SAMPLERS",
    "Coefficients",
    "FlowSchedule",
    "SamplerTable",
    "Schedule",
    "alphas_bar_of",
    "default_sampler",
    "departures",
    "evaluations",
    "make_table",
    "samplers_for",
    "skipped_steps",
    "update",
]
