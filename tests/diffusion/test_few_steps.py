"""Models distilled to few steps: the defaults that their files speak for, and a latent consistency model's pictures."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from app.diffusion import device_programs
from app.diffusion.families.components import few_step_defaults
from app.diffusion.families.flux2_klein import Flux2Klein
from app.diffusion.families.stable_diffusion import StableDiffusion
from app.diffusion.families.stable_diffusion_xl import StableDiffusionXL
from app.diffusion.families.z_image import ZImage
from app.diffusion.models.checkpoint_files import architecture
from app.diffusion.models.config import UNetConfig
from app.diffusion.models.loading import load_checkpoint
from app.diffusion.pipeline import Pipeline
from app.diffusion.samplers import FlowSchedule, Schedule
from app.types import ActiveSlot, PipelineSpec
from tests import tiny, tiny_flow
from tests.diffusion.some_programs import compile_some
from tests.diffusion.test_models import golden
from tests.published import CHECKPOINTS, XL_CHECKPOINTS

EULER = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}


def unet(**changes: Any) -> UNetConfig:
    return UNetConfig.from_json(tiny.MODELS["tiny-sd1"]["unet"] | changes, [])


@pytest.mark.parametrize(
    ("scheduler", "defaults"),
    [
        (EULER, (4, 1.0)),
        (EULER | {"_class_name": "EulerAncestralDiscreteScheduler"}, (4, 1.0)),
        (EULER | {"timestep_spacing": "leading"}, None),
        (EULER | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, None),
        (EULER | {"_class_name": "DDIMScheduler"}, None),
        ({"_class_name": "LCMScheduler"}, (4, 1.0)),
        ({"_class_name": "TCDScheduler"}, (4, 1.0)),
    ],
)
def test_a_scheduler_file_says_whether_a_unet_was_distilled(scheduler: dict[str, Any], defaults: Any) -> None:
    schedule = Schedule.from_config(scheduler)
    assert few_step_defaults(unet(), schedule) == defaults
    assert few_step_defaults(unet(time_cond_proj_dim=10), schedule) == (4, 8.5)


def test_published_checkpoints_have_the_defaults_of_diffusers_or_of_their_cards() -> None:
    def defaults(kind: Any, configs: Any) -> Any:
        problems: list[str] = []
        family = architecture(kind, configs, {}, problems)
        assert not problems
        return family.defaults(kind.schedule(configs["scheduler"])[0])

    assert {defaults(StableDiffusion, configs) for configs in CHECKPOINTS.values()} == {(20, 7.5)}
    assert defaults(StableDiffusionXL, XL_CHECKPOINTS["stable-diffusion-xl-base-1.0"]) == (20, 5.0)
    assert defaults(StableDiffusionXL, XL_CHECKPOINTS["sdxl-turbo"]) == (4, 1.0)


def test_klein_says_itself_whether_it_was_distilled_and_z_image_does_not() -> None:
    def family(kind: Any, model: str, index: dict[str, Any]) -> Any:
        configs = tiny_flow.MODELS[model]
        parts = {part: component.read(configs[part], [], part) for part, component in kind.COMPONENTS.items()}
        return kind.of(parts, index)

    schedule = FlowSchedule()
    assert family(Flux2Klein, "tiny-klein", {"is_distilled": True}).defaults(schedule) == (4, 1.0)
    assert family(Flux2Klein, "tiny-klein", {}).defaults(schedule) == (50, 4.0)
    assert family(ZImage, "tiny-z-image", {}).defaults(schedule) == (50, 6.0)


@pytest.mark.slow
def test_whole_pictures_of_a_consistency_model_are_within_a_grey_level_of_diffusers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The seeds are the pictures' numbers in the recorded noise."""
    noises = tiny.lcm_noises()
    monkeypatch.setattr(device_programs, "slot_noise", lambda seed, number, shape: jnp.asarray(noises)[number, seed])
    height, width = tiny.IMAGE_SIZES["tiny-sd2"]
    folder = tiny.write_lcm_checkpoint(tmp_path / "lcm", tiny.tensor_shapes()["tiny-sd2"])
    spec = PipelineSpec(str(folder), sizes=((width, height),), batch_buckets=(2,), max_steps=4)
    pipeline = Pipeline(load_checkpoint(folder), spec)
    compile_some(pipeline, "encode", "insert", "rows 2", "decode")
    steps, guidance_scale = pipeline.request_defaults
    assert (steps, guidance_scale) == tiny.LCM_RUN and pipeline.default_sampler == "lcm"
    table, state = pipeline.table(None, steps), pipeline.empty_state((width, height))
    *prompts, empty = pipeline.encode([*tiny.PROMPTS, ""])
    for slot, prompt in enumerate(prompts):
        state = pipeline.insert(state, slot, prompt, empty, table, guidance_scale, seed=slot)
    state, _ = pipeline.step(state, [ActiveSlot(slot, guided=False) for slot in (0, 1)], len(table))
    ours = np.asarray(pipeline.decode(state, [0, 1])).astype(int)
    apart = np.abs(ours - golden("tiny-lcm")["picture"])
    assert (apart <= 1).all(axis=-1).mean() >= 0.999, f"{apart.max()} grey levels apart"
