"""Every sampler as a table of coefficients. Needs numpy only; knows nothing of devices, requests or networks.

One step of any of them, with latents x, model output o and fresh noise z:

    m_i     = p_i x_i + q_i o_i
    x_{i+1} = a_i x_i + sum_j b_ij m_{i-j} + n_i z_i

The latents stay variance-preserving, x = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise, under every sampler, because
the UNet takes such latents. Samplers that the literature writes in sigma space (y = x_0 + sigma noise) are rescaled by
y = sqrt(sigma^2 + 1) x, so the device has no input scaling to do. diffusers' schedulers are the oracle:
tests/make_golden.py records them, and tests/diffusion/test_samplers.py compares every step with them.

CONTRIBUTING.md says how to add a sampler.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from app.types import InvalidField

Array: TypeAlias = Any  # a numpy or a JAX array; `update` uses only what both have
Float64: TypeAlias = npt.NDArray[np.float64]
Float32: TypeAlias = npt.NDArray[np.float32]

# PLMS is a fourth-order method, but its redone second step drops out of the history that the later steps read, so the
# fifth evaluation needs the first one: m_{i-4}.
HISTORY = 5

_SAMPLER_OF_CLASS = {
    "DDIMScheduler": "ddim",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "EulerDiscreteScheduler": "euler",
    "LCMScheduler": "lcm",
    "PNDMScheduler": "pndm",
}


class Coefficients(NamedTuple):
    """One row per sample: p, q, a, n are [B]; b is [B, HISTORY], newest model output first."""

    p: Array
    q: Array
    a: Array
    n: Array
    b: Array


def update(latents: Array, noise_pred: Array, history: Array, noise: Array, row: Coefficients) -> tuple[Array, Array]:
    """One step for a batch in which every sample may have its own sampler and step. All is float32.

    `latents`, `noise_pred` and `noise` are [B, H, W, C]; `history` is [B, HISTORY - 1, H, W, C], newest first. A new
    request starts from a history of zeros. Its coefficients there are zero, but zero times inf would not be zero.
    """
    xp = latents.__array_namespace__()

    def column(coefficient: Array) -> Array:
        return coefficient.astype("float32").reshape(-1, 1, 1, 1)

    latents = latents.astype("float32")
    m = column(row.p) * latents + column(row.q) * noise_pred.astype("float32")
    history = xp.concatenate([m[:, None], history.astype("float32")], axis=1)  # [B, HISTORY, H, W, C]
    x = column(row.a) * latents + column(row.n) * noise.astype("float32")
    for j in range(HISTORY):
        x = x + column(row.b[:, j]) * history[:, j]
    return x, history[:, :-1]


@dataclass(frozen=True)
class SamplerTable:
    """A sampler as the device needs it: a row for each UNet evaluation."""

    timesteps: Float32  # [N], the UNet's timestep
    p: Float32  # [N]
    q: Float32  # [N]
    a: Float32  # [N]
    n: Float32  # [N]
    b: Float32  # [N, HISTORY]
    preview: Float32  # [N, 2], the denoised image after each step: x_0 ~ preview[i, 0] x_{i+1} + preview[i, 1] m_i
    initial_scale: float  # initial latents = initial_scale * noise

    def __len__(self) -> int:
        return len(self.timesteps)


@dataclass(frozen=True)
class Schedule:
    """A checkpoint's scheduler/scheduler_config.json.

    `timestep_spacing` and `set_alpha_to_one` are None where the file is silent: diffusers then takes the default of
    the class that samples, not of the class that the file names, and so do we.
    """

    class_name: str
    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    prediction_type: str = "epsilon"
    timestep_spacing: str | None = None
    steps_offset: int = 0
    set_alpha_to_one: bool | None = None
    rescale_betas_zero_snr: bool = False
    use_karras_sigmas: bool = False
    original_inference_steps: int = 50
    timestep_scaling: float = 10.0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Schedule":
        """Check every option of a parsed scheduler_config.json; all problems are raised as one ValueError."""
        class_name = config.get("_class_name")
        options = {name: value for name, value in config.items() if not name.startswith("_")}
        problems = []
        if class_name not in _SAMPLER_OF_CLASS:
            problems.append(f"_class_name must be one of {', '.join(_SAMPLER_OF_CLASS)}, got {class_name!r}")
        for name, value in options.items():
            if name in _CHOICES:
                if not any(type(value) is type(choice) and value == choice for choice in _CHOICES[name]):
                    problems.append(f"{name} must be {' or '.join(map(repr, _CHOICES[name]))}, got {value!r}")
            elif name in _NUMBERS:
                kind, low, high = _NUMBERS[name]
                is_number = isinstance(value, (int, kind)) and not isinstance(value, bool)
                if not is_number or not low <= value <= high:
                    problems.append(f"{name} must be {_ranged(kind, low, high)}, got {value!r}")
            elif name not in _INERT:
                problems.append(f"{name} is not an option that is known here, got {value!r}")
        problems += _contradictions(class_name, options)
        if problems:
            raise ValueError(f"The scheduler config cannot be followed: {'; '.join(problems)}.")
        kept = {
            name: value for name, value in options.items() if name in cls.__dataclass_fields__ and value is not None
        }
        betas = _LCM_BETAS if class_name == "LCMScheduler" else {}
        return cls(**{"class_name": class_name, **betas, **kept})


# What each option may be; an option that is missing has diffusers' default, which is among these but for two:
# `clip_sample` (StableDiffusionPipeline turns it off for latents) and `skip_prk_steps` (see _contradictions).
_CHOICES: dict[str, tuple[object, ...]] = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "v_prediction"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "set_alpha_to_one": (True, False),
    "rescale_betas_zero_snr": (True, False),
    "use_karras_sigmas": (True, False, None),
    "skip_prk_steps": (True, False),
    # The last step is first order in any case where the final sigma is zero, so these two change nothing.
    "lower_order_final": (True, False),
    "euler_at_final": (True, False),
    "algorithm_type": ("dpmsolver++",),
    "clip_sample": (False,),
    "final_sigmas_type": ("zero",),
    "interpolation_type": ("linear",),
    "lambda_min_clipped": (-math.inf,),
    "sigma_max": (None,),
    "sigma_min": (None,),
    "solver_order": (2,),
    "solver_type": ("midpoint",),
    "thresholding": (False,),
    "timestep_type": ("discrete",),
    "trained_betas": (None,),
    "use_beta_sigmas": (False, None),
    "use_dynamic_shifting": (False,),
    "use_exponential_sigmas": (False, None),
    "use_flow_sigmas": (False,),
    "use_lu_lambdas": (False,),
    "variance_type": (None,),
}

_NUMBERS: dict[str, tuple[type, float, float]] = {
    "num_train_timesteps": (int, 2, math.inf),
    "beta_start": (float, 1e-9, 0.999),
    "beta_end": (float, 1e-9, 0.999),
    "steps_offset": (int, 0, math.inf),
    "original_inference_steps": (int, 1, math.inf),
    "timestep_scaling": (float, 1e-9, math.inf),
}

# These qualify a switch that is off wherever it is accepted at all.
_INERT = {"clip_sample_range", "dynamic_thresholding_ratio", "flow_shift", "sample_max_value", "time_shift_type"}

_LCM_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def _ranged(kind: type, low: float, high: float) -> str:
    noun = "a whole number" if kind is int else "a number"
    return f"{noun} of {low:g} or more" if math.isinf(high) else f"{noun} from {low:g} to {high:g}"


def _contradictions(class_name: str | None, options: Mapping[str, Any]) -> list[str]:
    problems = []
    if class_name == "PNDMScheduler" and options.get("skip_prk_steps") is not True:
        problems.append("skip_prk_steps must be True for PNDMScheduler, whose Runge-Kutta start is not supported")
    zero_snr = options.get("rescale_betas_zero_snr") is True
    if zero_snr and class_name == "PNDMScheduler":
        problems.append("rescale_betas_zero_snr must be False for PNDMScheduler, got True")
    if zero_snr and options.get("prediction_type", "epsilon") == "epsilon":
        # Where nothing of the image is left in the latents, the noise says nothing about it either.
        problems.append("rescale_betas_zero_snr must be False with prediction_type 'epsilon', got True")
    if options.get("use_karras_sigmas") is True and class_name != "DPMSolverMultistepScheduler":
        problems.append(f"use_karras_sigmas must be False for {class_name}, got True")
    elif options.get("use_karras_sigmas") is True and options.get("beta_schedule") == "squaredcos_cap_v2":
        problems.append("use_karras_sigmas must be False with beta_schedule 'squaredcos_cap_v2', got True")
    original, train = options.get("original_inference_steps", 50), options.get("num_train_timesteps", 1000)
    if class_name == "LCMScheduler" and isinstance(original, int) and isinstance(train, int) and original > train:
        problems.append(f"original_inference_steps must be at most num_train_timesteps ({train}), got {original}")
    return problems


def default_sampler(schedule: Schedule) -> str:
    """The sampler that the checkpoint's scheduler folder names."""
    return "dpmpp_2m_karras" if schedule.use_karras_sigmas else _SAMPLER_OF_CLASS[schedule.class_name]


def samplers_for(schedule: Schedule) -> tuple[str, ...]:
    """The samplers that can follow this schedule."""
    unable = set()
    if schedule.rescale_betas_zero_snr:
        unable.add("pndm")  # divides by alpha_bar, which is zero at the first timestep of such a schedule
    if schedule.beta_schedule == "squaredcos_cap_v2":
        # diffusers truncates the timesteps here, and those that are whole come out a hair below: noise decides.
        unable.add("dpmpp_2m_karras")
    return tuple(name for name in SAMPLERS if name not in unable)


@lru_cache(maxsize=256)
def make_table(name: str, num_inference_steps: int, schedule: Schedule) -> SamplerTable:
    """The table of sampler `name`; N rows for N steps, but N + 1 for pndm with more than one step."""
    if name not in samplers_for(schedule):
        message = f"sampler must be one of {', '.join(samplers_for(schedule))}, got {name}."
        raise InvalidField("sampler", message)
    most = schedule.num_train_timesteps
    if name == "lcm":
        most = min(most, schedule.original_inference_steps)
    if not 1 <= num_inference_steps <= most:
        message = f"num_inference_steps must be between 1 and {most} for sampler {name}, got {num_inference_steps}."
        raise InvalidField("num_inference_steps", message)
    return _BUILDERS[name](num_inference_steps, schedule)


def ddim(steps: int, schedule: Schedule) -> SamplerTable:
    """DDIM with eta 0 (Song et al. 2020, arXiv:2010.02502, equation 12).

    x' = sqrt(abar') x_0 + sqrt(1 - abar') eps, with eps = (x - sqrt(abar) x_0) / sqrt(1 - abar) and m = x_0.
    """
    t = _timesteps(steps, schedule, schedule.timestep_spacing or "leading").round()
    alphas_bar = alphas_bar_of(schedule)
    # As in diffusers: a fixed stride back from t. Unless the spacing is leading, that is not exactly the next t.
    target = t.astype(int) - schedule.num_train_timesteps // steps
    end = 1.0 if schedule.set_alpha_to_one in (True, None) else alphas_bar[0]
    target_bar = np.where(target >= 0, alphas_bar[target], end)
    return _first_order(t, alphas_bar[t.astype(int)], target_bar, schedule)


def euler(steps: int, schedule: Schedule) -> SamplerTable:
    """Euler's method on the probability-flow ODE (Karras et al. 2022, arXiv:2206.00364, algorithm 1 without churn).

    y' = y + (sigma' - sigma) (y - x_0) / sigma. In variance-preserving latents that is DDIM's update, with
    abar = 1 / (sigma^2 + 1); the two differ in their timesteps, which here need not be whole, and in their last step.
    """
    t, sigmas, initial_scale = _euler_grid(steps, schedule)
    alphas_bar = 1 / (sigmas**2 + 1)
    return _first_order(t, alphas_bar[:-1], alphas_bar[1:], schedule, initial_scale)


def euler_ancestral(steps: int, schedule: Schedule) -> SamplerTable:
    """Euler down to sigma_down, then fresh noise of sigma_up (Song et al. 2021, arXiv:2011.13456, appendix F).

    sigma_up^2 = sigma'^2 (sigma^2 - sigma'^2) / sigma^2, sigma_down^2 = sigma'^2 - sigma_up^2;
    y' = x_0 + (sigma_down / sigma) (y - x_0) + sigma_up z.
    """
    t, sigmas, initial_scale = _euler_grid(steps, schedule)
    sigma, target = sigmas[:-1], sigmas[1:]
    up = target * np.sqrt(1 - (target / sigma) ** 2)
    down = target**2 / sigma
    scale, target_scale = np.sqrt(sigma**2 + 1), np.sqrt(target**2 + 1)
    p, q = _to_denoised(1 / scale**2, schedule)
    b = (1 - down / sigma) / target_scale
    return _table(t, p, q, down / sigma * scale / target_scale, up / target_scale, [b], initial_scale)


def dpmpp_2m(steps: int, schedule: Schedule) -> SamplerTable:
    """DPM-Solver++(2M), midpoint (Lu et al. 2022, arXiv:2211.01095, algorithm 2).

    x' = (s'/s) x - alpha' (exp(-h) - 1) D, with alpha and s the latents' shares of image and noise,
    lambda = log(alpha / s), h = lambda' - lambda, r = h_previous / h and D = (1 + 1/2r) m_i - (1/2r) m_{i-1}, m = x_0.
    The first and the last step have D = m_i.
    """
    train = schedule.num_train_timesteps
    spacing = schedule.timestep_spacing or "linspace"
    if spacing == "linspace":
        t = np.linspace(0, train - 1, steps + 1).round()[:0:-1]
    elif spacing == "leading":
        t = np.arange(steps, 0, -1.0) * (train // (steps + 1)) + schedule.steps_offset
    else:
        t = _timesteps(steps, schedule, spacing)
    _check_clock(t, schedule, spacing)
    return _multistep(t, np.interp(t, np.arange(train), _sigmas(schedule)), schedule)


def dpmpp_2m_karras(steps: int, schedule: Schedule) -> SamplerTable:
    """DPM-Solver++(2M) over Karras et al.'s noise levels (arXiv:2206.00364, equation 5, rho = 7).

    sigma_i^(1/rho) falls linearly from the largest to the smallest noise level of training; the clock shows the whole
    timestep next to it, found by interpolating log sigma.
    """
    trained = _sigmas(schedule)
    ramp = np.linspace(0, 1, steps)
    high, low = trained[-1] ** (1 / 7), trained[0] ** (1 / 7)
    sigmas = (high + ramp * (low - high)) ** 7
    t = np.interp(np.log(sigmas), np.log(trained), np.arange(len(trained))).round()
    return _multistep(t, sigmas, schedule)


def pndm(steps: int, schedule: Schedule) -> SamplerTable:
    """PNDM without its Runge-Kutta start, that is PLMS (Liu et al. 2022, arXiv:2202.09778, equations 9 and 12).

    x' = sqrt(abar'/abar) x - (abar' - abar) e / (abar sqrt(1 - abar') + sqrt(abar (1 - abar) abar')), with e the
    Adams-Bashforth combination of the last outputs. The first step is taken twice, the second time from the same x_0
    with the mean of two outputs: x_0 = (x_1 - b_0 m_0) / a_0, so this is linear in what is at hand, too. Under
    v-prediction diffusers combines the v's and only then turns the result to epsilon; hence m is the raw output.
    """
    train = schedule.num_train_timesteps
    t = _timesteps(steps, schedule, schedule.timestep_spacing or "leading").round().astype(int)
    if steps > 1:
        t = np.insert(t, 1, t[1])
    stride = train // steps
    source, target = t.copy(), t - stride
    if steps > 1:
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
    if steps > 1:
        b[1, 1] -= a[1] * e[0] / a[0]
        a[1] /= a[0]
    to_preview = _to_denoised(target_bar, schedule)  # m_i is an output, and belongs to a timestep just before
    return _table(t.astype(float), np.zeros(len(t)), np.ones(len(t)), a, np.zeros(len(t)), b.T, preview=to_preview)


def lcm(steps: int, schedule: Schedule) -> SamplerTable:
    """Multistep consistency sampling (Luo et al. 2023, arXiv:2310.04378, algorithm 3).

    m = c_skip x + c_out x_0, with the boundary conditions c_skip = s^2 / (T^2 + s^2) and c_out = T / sqrt(T^2 + s^2)
    for s = 0.5 and T = timestep_scaling t; x' = sqrt(abar') m + sqrt(1 - abar') z, and the last step returns m. The
    timesteps are spread over the `original_inference_steps` that the model was distilled on, whatever the spacing.
    """
    original = schedule.original_inference_steps
    distilled = np.arange(original, 0, -1.0) * (schedule.num_train_timesteps // original) - 1
    t = distilled[np.floor(np.linspace(0, original, steps, endpoint=False)).astype(int)]
    bar = alphas_bar_of(schedule)[t.astype(int)]
    target_bar = np.append(bar[1:], 1.0)
    clock = schedule.timestep_scaling * t
    skip, out = 0.25 / (clock**2 + 0.25), clock / np.sqrt(clock**2 + 0.25)
    p, q = _to_denoised(bar, schedule)
    return _table(t, out * p + skip, out * q, np.zeros(steps), np.sqrt(1 - target_bar), [np.sqrt(target_bar)])


_BUILDERS: dict[str, Callable[[int, Schedule], SamplerTable]] = {
    "ddim": ddim,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_karras": dpmpp_2m_karras,
    "pndm": pndm,
    "lcm": lcm,
}
SAMPLERS = tuple(_BUILDERS)

_ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


@lru_cache(maxsize=16)
def alphas_bar_of(schedule: Schedule) -> Float64:
    """alphas_cumprod of training, [num_train_timesteps]; the last is 0 if rescaled to zero terminal SNR."""
    steps = schedule.num_train_timesteps
    if schedule.beta_schedule == "squaredcos_cap_v2":
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


def _sigmas(schedule: Schedule) -> Float64:
    alphas_bar = alphas_bar_of(schedule).copy()
    if schedule.rescale_betas_zero_snr:
        alphas_bar[-1] = 2.0**-24  # diffusers' stand-in for an infinite first sigma
    return np.asarray(np.sqrt((1 - alphas_bar) / alphas_bar))


def _timesteps(steps: int, schedule: Schedule, spacing: str) -> Float64:
    """Falling timesteps [steps]; the spacings are table 2 of Lin et al. 2023, arXiv:2305.08891."""
    train = schedule.num_train_timesteps
    if spacing == "linspace":
        t = np.linspace(0, train - 1, steps)[::-1]
    elif spacing == "leading":
        t = np.arange(steps - 1, -1, -1.0) * (train // steps) + schedule.steps_offset
    else:
        # arange with a fractional stride can yield one value too many (61 steps of 1000 end at -1 in diffusers).
        t = np.arange(train, 0, -train / steps)[:steps].round() - 1
    _check_clock(t, schedule, spacing)
    return t


def _check_clock(t: Float64, schedule: Schedule, spacing: str) -> None:
    last = schedule.num_train_timesteps - 1
    if t.max() > last or not (np.diff(t) < 0).all():
        raise ValueError(
            f"num_inference_steps must leave distinct timesteps between 0 and {last}, but {len(t)} with "
            f"timestep_spacing {spacing} and steps_offset {schedule.steps_offset} do not; ask for fewer."
        )


def _euler_grid(steps: int, schedule: Schedule) -> tuple[Float64, Float64, float]:
    """Timesteps, sigmas with a trailing 0, and the scale of the initial noise in variance-preserving latents."""
    spacing = schedule.timestep_spacing or "linspace"
    t = _timesteps(steps, schedule, spacing)
    sigmas = np.interp(t, np.arange(schedule.num_train_timesteps), _sigmas(schedule))
    # diffusers starts from y = sigma z, or from sqrt(sigma^2 + 1) z where the first timestep is short of the last
    # trained one and pure noise of sigma alone would be too little.
    initial_scale = 1.0 if spacing == "leading" else float(sigmas[0] / math.sqrt(sigmas[0] ** 2 + 1))
    return t, np.append(sigmas, 0.0), initial_scale


def _to_denoised(alphas_bar: Float64, schedule: Schedule) -> tuple[Float64, Float64]:
    """p and q for m = x_0; v is Salimans and Ho 2022, arXiv:2202.00512, appendix D."""
    signal, noise = np.sqrt(alphas_bar), np.sqrt(1 - alphas_bar)
    if schedule.prediction_type == "v_prediction":
        return signal, -noise
    return 1 / signal, -noise / signal


def _first_order(
    t: Float64, alphas_bar: Float64, target_bar: Float64, schedule: Schedule, initial_scale: float = 1.0
) -> SamplerTable:
    p, q = _to_denoised(alphas_bar, schedule)
    a = np.sqrt((1 - target_bar) / (1 - alphas_bar))
    return _table(t, p, q, a, np.zeros(len(t)), [np.sqrt(target_bar) - a * np.sqrt(alphas_bar)], initial_scale)


def _multistep(t: Float64, sigmas: Float64, schedule: Schedule) -> SamplerTable:
    alphas_bar = 1 / (sigmas**2 + 1)
    p, q = _to_denoised(alphas_bar, schedule)
    target, target_bar = np.append(sigmas[1:], 0.0), np.append(alphas_bar[1:], 1.0)
    a = np.sqrt((1 - target_bar) / (1 - alphas_bar))
    gain = np.sqrt(target_bar) * (1 - target / sigmas)
    # 1/2r = h / (2 h_previous) where both neighbours exist; h = log(sigma / sigma') as alpha / s = 1 / sigma.
    h = np.log(sigmas[:-1] / sigmas[1:])
    lean = np.zeros(len(t))
    lean[1:-1] = h[1:] / (2 * h[:-1])
    return _table(t, p, q, a, np.zeros(len(t)), [gain * (1 + lean), -gain * lean])


def _table(
    t: Float64,
    p: Float64,
    q: Float64,
    a: Float64,
    n: Float64,
    b: list[Float64] | Float64,
    initial_scale: float = 1.0,
    preview: tuple[Float64, Float64] | None = None,
) -> SamplerTable:
    columns = np.zeros((len(t), HISTORY))
    for j, column in enumerate(b):
        columns[:, j] = column
    if preview is None:  # m is x_0
        preview = np.zeros(len(t)), np.ones(len(t))

    def frozen(array: Float64) -> Float32:
        assert np.isfinite(array).all()
        single = array.astype(np.float32)
        single.setflags(write=False)  # cached and handed to every caller
        return single

    previews = np.stack(preview, axis=-1)
    return SamplerTable(
        frozen(t), frozen(p), frozen(q), frozen(a), frozen(n), frozen(columns), frozen(previews), initial_scale
    )
