"""Every sampler against diffusers' own schedulers, as recorded by tests/make_golden.py."""

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from app.diffusion.samplers import (
    HISTORY,
    SAMPLERS,
    Coefficients,
    FlowSchedule,
    SamplerTable,
    Schedule,
    default_sampler,
    departures,
    make_table,
    samplers_for,
    skipped_steps,
    update,
)
from app.types import InvalidField
from tests import sampler_cases
from tests.sampler_cases import CONFIGS, FLOWS, KLEIN, Z_IMAGE, EditCase

SD14 = Schedule.from_config(CONFIGS["sd14"])
ZERO_SNR = Schedule.from_config(CONFIGS["zero-snr"])


@lru_cache
def golden(name: str = "samplers") -> dict[str, Any]:
    with np.load(Path(__file__).parents[1] / "golden" / f"{name}.npz") as archive:
        return dict(archive)


def recorded_rows(case: str, name: str = "samplers") -> Any:
    """Which rows of the golden arrays are a run's, as a mask."""
    recorded = golden(name)["cases"].tolist()
    assert case in recorded, f"{case} is not recorded: run make golden"
    return golden(name)["case"] == recorded.index(case)


def table_of(config: str, sampler: str, steps: int, begin: int = 0) -> SamplerTable:
    if config in FLOWS:
        flow = FLOWS[config]
        schedule = FlowSchedule.from_config(flow.config, dynamic=flow.dynamic)
        return make_table(sampler, steps, schedule, flow.image_tokens, begin)
    return make_table(sampler, steps, Schedule.from_config(CONFIGS[config]), None, begin)


def row(table: SamplerTable, i: int) -> Coefficients:
    return Coefficients(*(getattr(table, name)[i : i + 1] for name in Coefficients._fields))


def trajectory(table: SamplerTable, step: Any = update) -> list[Any]:
    """The latents before every evaluation, and the result."""
    noises = golden()["noises"]
    x = table.initial_scale * noises[0]
    history = np.zeros((x.shape[0], HISTORY - 1, *x.shape[1:]), np.float32)
    path = [x]
    for i in range(len(table)):
        noise_pred = sampler_cases.fake_unet(np.asarray(x), float(table.timesteps[i]))
        x, history = step(x, noise_pred, history, noises[i + 1], row(table, i))
        path.append(x)
    return path


def error(table: SamplerTable, case: str) -> float:
    """The largest error of any step, relative to the largest value of that step, in diffusers' scaling."""
    rows = recorded_rows(case)
    ours = np.stack(trajectory(table)) * golden()["scale"][rows].reshape(-1, 1, 1, 1, 1)
    expected = golden()["latents"][rows]
    axes = tuple(range(1, expected.ndim))
    return float((np.abs(ours - expected).max(axes) / np.abs(expected).max(axes)).max())


@pytest.mark.parametrize("config, sampler, steps", sampler_cases.cases())
def test_every_step_is_that_of_diffusers(config: str, sampler: str, steps: int) -> None:
    case = f"{config} {sampler} {steps}"
    rows = recorded_rows(case)
    table = table_of(config, sampler, steps)
    # diffusers interpolates timesteps between float32 logarithms, good for 2e-2; a wrong one is off by more.
    np.testing.assert_allclose(table.timesteps, golden()["timestep"][rows][:-1], rtol=1e-6, atol=2e-2)
    # diffusers keeps Euler's latents in sigma space in float32, where one rounding at a first sigma of 4096 (zero
    # terminal SNR) is 5e-4 of the result; everywhere else this term is below 2e-6.
    assert error(table, case) <= 1e-4 + 2**-23 * golden()["scale"][rows].max()


def edited(table: SamplerTable, case: EditCase) -> list[Any]:
    """As `trajectory`, from an image instead of from noise."""
    noises, original, mask = golden()["noises"], sampler_cases.original(), sampler_cases.redrawn()
    levels = [*table.levels, (1.0, 0.0)]
    originals = [signal * original + share * noises[0] for signal, share in levels]
    x, history = originals[0], np.zeros((1, HISTORY - 1, *original.shape[1:]), np.float32)
    path = [x]
    for i in range(len(table)):
        noise_pred = sampler_cases.fake_unet(x, float(table.timesteps[i]))
        x, history = update(x, noise_pred, history, noises[i + 1], row(table, i))
        x = (1 - mask) * originals[i + 1] + mask * x if case.masked else x
        path.append(x)
    return path


@pytest.mark.parametrize("case", sampler_cases.edit_cases(), ids=str)
def test_every_step_of_an_edit_is_that_of_diffusers(case: EditCase) -> None:
    recorded, rows = golden("sampler-edits"), recorded_rows(str(case), "sampler-edits")
    table = table_of(case.config, case.sampler, case.steps, case.begin)
    np.testing.assert_allclose(table.timesteps, recorded["timestep"][rows][:-1], rtol=1e-6, atol=2e-2)
    ours = np.stack(edited(table, case)) * recorded["scale"][rows].reshape(-1, 1, 1, 1, 1)
    expected = recorded["latents"][rows]
    axes = tuple(range(1, expected.ndim))
    assert (np.abs(ours - expected).max(axes) / np.abs(expected).max(axes)).max() <= 1e-4


def test_strength_leaves_out_steps_as_the_pipelines_of_diffusers_do() -> None:
    flow = FlowSchedule.from_config(KLEIN)
    assert [skipped_steps(strength, 20, SD14) for strength in (1.0, 0.999, 0.5, 0.05)] == [0, 1, 10, 19]
    assert [skipped_steps(strength, 20, flow) for strength in (1.0, 0.999, 0.5, 0.01)] == [0, 0, 10, 19]
    assert (skipped_steps(0.85, 10, SD14), skipped_steps(0.85, 10, flow)) == (2, 1)
    with pytest.raises(InvalidField, match=r"strength must be at least 0\.05, .*20 steps, got 0\.04"):
        skipped_steps(0.04, 20, SD14)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_wrong_coefficient_anywhere_would_show(sampler: str) -> None:
    table = make_table(sampler, 5, SD14)
    for name in Coefficients._fields:
        for index in np.ndindex(getattr(table, name).shape):
            if name == "b" and index[1] > index[0]:
                continue  # weighs a history that does not exist yet
            wrong = getattr(table, name).copy()
            wrong[index] += 0.1 * max(1, abs(wrong[index]))
            assert error(replace(table, **{name: wrong}), f"sd14 {sampler} 5") > 1e-4, f"{name}{index}"


def test_one_jitted_batch_mixes_samplers_steps_and_histories() -> None:
    tables = [make_table(name, steps, SD14) for name in SAMPLERS for steps in (3, 4)]
    alone = [trajectory(table) for table in tables]
    steps = min(len(table) for table in tables)
    rows = [
        jax.tree.map(lambda *parts: np.concatenate(parts), *(row(table, i) for table in tables)) for i in range(steps)
    ]
    noises = golden()["noises"]
    x = np.concatenate([path[0] for path in alone])
    history = np.zeros((len(x), HISTORY - 1, *x.shape[1:]), np.float32)
    step = jax.jit(update)
    with jax.numpy_rank_promotion("raise"):
        for i in range(steps):
            clock = [float(table.timesteps[i]) for table in tables]
            outs = np.concatenate([sampler_cases.fake_unet(np.asarray(x[k : k + 1]), t) for k, t in enumerate(clock)])
            noise = np.repeat(noises[i + 1], len(x), axis=0)
            x, history = step(x, outs, history, noise, rows[i])
            expected = np.concatenate([path[i + 1] for path in alone])
            np.testing.assert_allclose(x, expected, rtol=1e-4, atol=1e-5)


def test_the_update_is_float32_whatever_the_network_computes_in() -> None:
    half = np.ones((1, 2, 2, 2), np.float16)
    history = np.zeros((1, HISTORY - 1, 2, 2, 2), np.float16)
    x, history = update(half, half, history, half, row(make_table("euler", 4, SD14), 0))
    assert x.dtype == history.dtype == np.float32


def test_tables_are_shared_and_cannot_be_written() -> None:
    table = make_table("ddim", 5, SD14)
    assert make_table("ddim", 5, SD14) is table
    with pytest.raises(ValueError, match="read-only"):
        table.a[0] = 0


def test_only_ancestral_and_stochastic_samplers_draw_noise() -> None:
    stochastic = ("ddpm", "euler_ancestral", "dpmpp_2m_sde", "dpmpp_sde", "lcm")
    drawing = {name for name in SAMPLERS if make_table(name, 5, SD14).n.any()}
    assert drawing == {name for name in SAMPLERS if name.startswith(stochastic)}


@pytest.mark.parametrize(
    "sampler, evaluations",
    [("ddim", (1, 2, 50)), ("pndm", (1, 3, 51)), ("heun", (1, 3, 99)), ("dpmpp_sde", (1, 3, 99))],
)
def test_some_samplers_evaluate_more_often_than_they_step(sampler: str, evaluations: tuple[int, ...]) -> None:
    assert tuple(len(make_table(sampler, steps, SD14)) for steps in (1, 2, 50)) == evaluations


@pytest.mark.parametrize(
    "config, sampler",
    [
        ("sd14", "pndm"),
        ("sd21", "ddim"),
        ("silent", "euler"),
        ("linear", "euler_ancestral"),
        ("dpm", "dpmpp_2m_karras"),
        ("lcm", "lcm"),
    ],
)
def test_the_default_sampler_is_the_one_that_the_checkpoint_names(config: str, sampler: str) -> None:
    assert default_sampler(Schedule.from_config(CONFIGS[config])) == sampler


USUAL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


@pytest.mark.parametrize(
    "options, sampler",
    [
        ({"_class_name": "DDPMScheduler", "variance_type": "fixed_small"}, "ddpm"),
        ({"_class_name": "DEISMultistepScheduler", "algorithm_type": "deis", "solver_type": "logrho"}, "deis"),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}, "dpmpp_2m_sde"),
        ({"_class_name": "DPMSolverSDEScheduler", "use_karras_sigmas": True}, "dpmpp_sde_karras"),
        ({"_class_name": "EulerDiscreteScheduler", "use_exponential_sigmas": True}, "euler_exponential"),
        ({"_class_name": "EulerDiscreteScheduler", "use_beta_sigmas": True}, "euler_beta"),
        # Left over from another class.
        ({"_class_name": "EulerAncestralDiscreteScheduler", "use_karras_sigmas": True}, "euler_ancestral"),
        ({"_class_name": "EulerDiscreteScheduler", "solver_order": 3, "algorithm_type": "dpmsolver"}, "euler"),
        ({"_class_name": "HeunDiscreteScheduler"}, "heun"),
        ({"_class_name": "LMSDiscreteScheduler", "use_karras_sigmas": True}, "lms_karras"),
        ({"_class_name": "UniPCMultistepScheduler", "solver_type": "bh2", "disable_corrector": []}, "unipc"),
    ],
)
def test_options_of_a_class_choose_its_sampler(options: dict[str, Any], sampler: str) -> None:
    schedule = Schedule.from_config(USUAL | options)
    assert (default_sampler(schedule), departures(schedule)) == (sampler, ())


@pytest.mark.parametrize(
    "name, sampler",
    [
        ("DPMSolverSinglestepScheduler", "dpmpp_2m"),
        ("KDPM2AncestralDiscreteScheduler", "dpmpp_sde"),
        ("KDPM2DiscreteScheduler", "heun"),
        ("SASolverScheduler", "dpmpp_2m_sde"),
        ("TCDScheduler", "lcm"),
    ],
)
def test_a_class_that_is_not_sampled_with_loads_and_the_nearest_is_said(name: str, sampler: str) -> None:
    schedule = Schedule.from_config(USUAL | {"_class_name": name, "timestep_spacing": "leading", "steps_offset": 1})
    assert departures(schedule) == (f"The checkpoint names {name}; the default sampler is the nearest, {sampler}.",)
    assert default_sampler(schedule) == sampler
    assert make_table("euler", 5, schedule).timesteps.tolist() == [801, 601, 401, 201, 1]


@pytest.mark.parametrize(
    "name, betas", [("LMSDiscreteScheduler", (1e-4, 0.02)), ("HeunDiscreteScheduler", (85e-5, 0.012))]
)
def test_a_silent_file_has_the_betas_of_its_class(name: str, betas: tuple[float, float]) -> None:
    schedule = Schedule.from_config({"_class_name": name})
    assert (schedule.beta_start, schedule.beta_end, schedule.beta_schedule) == (*betas, "linear")


FEW_STEPS = {
    # As published with stabilityai/sdxl-turbo and sd-turbo, and made by ByteDance/SDXL-Lightning's example.
    "turbo": ("EulerAncestralDiscreteScheduler", [999, 749, 499, 249]),
    "sd-turbo": ("EulerDiscreteScheduler", [999, 749, 499, 249]),
}


@pytest.mark.parametrize("name", FEW_STEPS)
def test_few_step_models_begin_at_the_last_timestep(name: str) -> None:
    class_name, timesteps = FEW_STEPS[name]
    turbo = Schedule.from_config(USUAL | {"_class_name": class_name, "timestep_spacing": "trailing", "steps_offset": 1})
    assert make_table(default_sampler(turbo), 4, turbo).timesteps.tolist() == timesteps
    for sampler in ("euler_trailing", "euler_ancestral_trailing", "ddim_trailing"):
        assert make_table(sampler, 4, SD14).timesteps.tolist() == timesteps


def test_karras_sigmas_are_a_choice_of_sampler_not_of_the_checkpoint() -> None:
    karras = Schedule.from_config(CONFIGS["dpm"])
    plain = Schedule.from_config(CONFIGS["dpm"] | {"use_karras_sigmas": False})
    assert default_sampler(plain) == "dpmpp_2m"
    for name in ("dpmpp_2m", "dpmpp_2m_karras"):
        assert np.array_equal(make_table(name, 5, karras).b, make_table(name, 5, plain).b)


def test_all_problems_of_a_scheduler_config_are_named_at_once() -> None:
    config = CONFIGS["sd14"] | {
        "_class_name": "EDMEulerScheduler",
        "beta_schedule": "sigmoid",
        "thresholding": True,
        "num_train_timesteps": 0,
        "sigma_data": 0.5,
    }
    with pytest.raises(ValueError) as caught:
        Schedule.from_config(config)
    message = str(caught.value)
    assert "_class_name must be one of DDIMScheduler, " in message and "got 'EDMEulerScheduler'" in message
    assert "beta_schedule must be 'linear' or 'scaled_linear' or 'squaredcos_cap_v2', got 'sigmoid'" in message
    assert "thresholding must be False, got True" in message
    assert "num_train_timesteps must be a whole number of 2 or more, got 0" in message
    assert "sigma_data is not an option that is known here, got 0.5" in message


@pytest.mark.parametrize(
    "config, change",
    [
        ("cosine", {"clip_sample": True}),
        ("sd14", {"skip_prk_steps": False}),
        ("sd14", {"set_alpha_to_one": 1}),
        ("sd14", {"trained_betas": [0.1, 0.2]}),
        ("sd21", {"prediction_type": "flow_prediction"}),
        ("sd21", {"thresholding": True}),
        ("sd21", {"timestep_spacing": "log"}),
        ("sd21", {"steps_offset": 0.5}),
        ("zero-snr", {"prediction_type": "epsilon"}),
        ("silent", {"timestep_type": "continuous"}),
        ("dpm", {"use_flow_sigmas": True}),
        ("lcm", {"original_inference_steps": 2000}),
    ],
)
def test_an_unsupported_option_is_refused_by_name(config: str, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=list(change)[0]):
        Schedule.from_config(CONFIGS[config] | change)


@pytest.mark.parametrize(
    "config, change, sampler, sentence",
    [
        (
            "silent",
            {"interpolation_type": "log_linear"},
            "euler",
            "does not follow the checkpoint's interpolation_type",
        ),
        ("silent", {"sigma_max": 80.0}, "euler", "sigma_max 80.0"),
        ("dpm", {"algorithm_type": "dpmsolver"}, "dpmpp_2m_karras", "algorithm_type dpmsolver"),
        ("dpm", {"final_sigmas_type": "sigma_min"}, "dpmpp_2m_karras", "final_sigmas_type sigma_min"),
        ("dpm", {"lambda_min_clipped": -5.1}, "dpmpp_2m_karras", "lambda_min_clipped -5.1"),
        ("dpm", {"solver_order": 3, "solver_type": "heun"}, "dpmpp_2m_karras", "solver_order 3, solver_type heun"),
        ("dpm", {"use_lu_lambdas": True}, "dpmpp_2m_karras", "use_lu_lambdas True"),
        ("dpm", {"beta_schedule": "squaredcos_cap_v2"}, "dpmpp_2m", "karras sigmas"),
        (
            "sd14",
            {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
            "ddim",
            "The checkpoint names PNDMScheduler; the default sampler is the nearest, ddim.",
        ),
        ("sd14", {"prediction_type": "sample"}, "ddim", "the nearest, ddim"),
    ],
)
def test_what_only_the_default_sampler_could_follow_is_said_and_not_refused(
    config: str, change: dict[str, Any], sampler: str, sentence: str
) -> None:
    schedule = Schedule.from_config(CONFIGS[config] | change)
    assert default_sampler(schedule) == sampler
    assert sentence in " ".join(departures(schedule))


@pytest.mark.parametrize("config", CONFIGS)
def test_nothing_is_said_where_the_default_sampler_is_what_the_checkpoint_names(config: str) -> None:
    assert departures(Schedule.from_config(CONFIGS[config])) == ()


def test_what_the_class_of_the_file_ignores_is_ignored() -> None:
    schedule = Schedule.from_config(CONFIGS["silent"] | {"clip_sample": True})
    assert schedule == Schedule.from_config(CONFIGS["silent"])


def test_betas_may_stand_in_the_file() -> None:
    betas = np.linspace(SD14.beta_start**0.5, SD14.beta_end**0.5, 1000) ** 2
    listed = Schedule.from_config(CONFIGS["sd14"] | {"trained_betas": betas.tolist()})
    assert np.array_equal(make_table("ddim", 5, listed).b, make_table("ddim", 5, SD14).b)


def test_plms_needs_the_config_to_skip_the_runge_kutta_start() -> None:
    silent = {name: value for name, value in CONFIGS["sd14"].items() if name != "skip_prk_steps"}
    with pytest.raises(ValueError, match="skip_prk_steps must be True for PNDMScheduler"):
        Schedule.from_config(silent)


@pytest.mark.parametrize(
    "sampler, steps, message",
    [
        ("ddim", 0, "num_inference_steps must be between 1 and 1000 for sampler ddim, got 0."),
        ("euler", 1001, "num_inference_steps must be between 1 and 1000 for sampler euler, got 1001."),
        ("lcm", 51, "num_inference_steps must be between 1 and 50 for sampler lcm, got 51."),
        ("no_such_sampler", 20, "sampler must be one of ddim, .*, got no_such_sampler."),
        # With an offset of 1, the thousandth step back from 0 would start at timestep 1000.
        (
            "ddim",
            1000,
            "distinct timesteps between 0 and 999, but 1000 with timestep_spacing leading and steps_offset 1",
        ),
        ("dpmpp_2m", 1000, "distinct timesteps between 0 and 999"),
    ],
)
def test_impossible_steps_are_refused_with_the_range(sampler: str, steps: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_table(sampler, steps, SD14)


def test_a_schedule_offers_only_the_samplers_that_can_follow_it() -> None:
    assert samplers_for(SD14) == SAMPLERS
    assert set(SAMPLERS) - set(samplers_for(ZERO_SNR)) == {
        name for name in SAMPLERS if name.startswith(("pndm", "deis", "heun", "lms", "dpmpp_sde"))
    }
    with pytest.raises(ValueError, match="sampler must be one of ddim, .*, got pndm"):
        make_table("pndm", 5, ZERO_SNR)


@pytest.mark.parametrize(
    "options, problem",
    [
        ({"_class_name": "EulerDiscreteScheduler"}, "_class_name must be FlowMatchEulerDiscreteScheduler for a flow"),
        ({"shift": 0}, "shift must be a number above 0, got 0"),
        ({"shift_terminal": 0.1}, "shift_terminal must be None, got 0.1"),
        ({"stochastic_sampling": True}, "stochastic_sampling must be False, got True"),
        ({"beta_start": 0.1}, "beta_start is not an option that is known here, got 0.1"),
    ],
)
def test_a_flow_schedule_that_no_table_follows_is_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        FlowSchedule.from_config(Z_IMAGE | options)


def test_a_flow_model_is_sampled_with_euler_alone_and_says_why() -> None:
    schedule = FlowSchedule.from_config(Z_IMAGE)
    assert samplers_for(schedule) == ("euler",) and default_sampler(schedule) == "euler" and not departures(schedule)
    with pytest.raises(ValueError, match=r"sampler must be one of euler, got ddim. This model was trained by flow"):
        make_table("ddim", 4, schedule)


def test_the_size_counts_only_where_the_shift_is_dynamic() -> None:
    static, dynamic = FlowSchedule.from_config(Z_IMAGE), FlowSchedule.from_config(KLEIN, dynamic="flux2")
    small, large = (make_table("euler", 4, static, tokens) for tokens in (256, 4096))
    assert np.array_equal(small.b, large.b)
    small, large = (make_table("euler", 4, dynamic, tokens) for tokens in (256, 4096))
    assert (small.timesteps[1:] < large.timesteps[1:]).all()
    with pytest.raises(ValueError, match="needs the number of image tokens"):
        make_table("euler", 4, dynamic)


def test_the_preview_of_a_flow_model_is_what_its_velocity_points_at() -> None:
    """For a velocity of noise - x_0 the preview is x_0 after every step."""
    table = make_table("euler", 4, FlowSchedule.from_config(Z_IMAGE))
    image, noise = np.random.default_rng(1).standard_normal((2, *sampler_cases.LATENTS_SHAPE)).astype(np.float32)
    x, history = noise, np.zeros((1, HISTORY - 1, *image.shape[1:]), np.float32)
    for i in range(len(table)):
        x, history = update(x, noise - image, history, noise, row(table, i))
        np.testing.assert_allclose(table.preview[i, 0] * x + table.preview[i, 1] * history[:, 0], image, atol=1e-6)
    np.testing.assert_allclose(x, image, atol=1e-6)


@pytest.mark.slow
def test_every_step_count_that_is_not_refused_gives_a_finite_table() -> None:
    for config in ("sd14", "trailing-v_prediction", "linspace-epsilon", "zero-snr"):
        schedule = Schedule.from_config(CONFIGS[config])
        for sampler in samplers_for(schedule):
            for steps in (1, 2, 3, 61, 999):
                if sampler == "lcm" and steps > 50:
                    continue
                table = make_table(sampler, steps, schedule)
                assert steps <= len(table) <= 2 * steps
                assert 0 <= table.timesteps.min() and table.timesteps.max() <= 999
