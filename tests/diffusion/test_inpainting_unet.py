"""UNets that were trained to fill masks: they take the mask and what is outside of it as further channels."""

from dataclasses import replace

import numpy as np
import pytest

from app.diffusion.families.registry import recognise
from app.diffusion.models.checkpoint_files import architecture
from app.diffusion.models.loading import load_checkpoint
from app.diffusion.pipeline import Pipeline
from app.types import Edit, Generation, InvalidField, PipelineSpec
from tests import edit_cases, tiny
from tests.diffusion.edits import assert_edits_are_those_of_diffusers, recorded_noise
from tests.published import CHECKPOINTS, XL_CHECKPOINTS

PROMPTS = {"tiny-sd2": tiny.PROMPTS, "tiny-sdxl": tiny.XL_PROMPTS}
RECORDED = {"tiny-sd2": "tiny-inpainting", "tiny-sdxl": "tiny-sdxl-inpainting"}


@pytest.fixture(scope="module", params=RECORDED)
def model(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory, model: str) -> Pipeline:
    """Only the programs that the tests run are compiled."""
    folder = tiny.write_inpainting_checkpoint(tmp_path_factory.mktemp(model), model, tiny.tensor_shapes()[model])
    height, width = tiny.IMAGE_SIZES[model]
    spec = PipelineSpec("tiny", sizes=((width, height),), batch_buckets=(1,), max_steps=4, edits=True)
    return Pipeline(load_checkpoint(folder), spec)


@pytest.mark.slow
def test_whole_pictures_are_within_a_grey_level_of_diffusers(
    pipeline: Pipeline, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.blank = {size: pipeline.blank_edit(size) for size in pipeline.sizes}
    pipeline.row_buckets = (2,)
    recorded_noise(monkeypatch, model)
    wanted = ("encode", "insert", "rows 2", "decode")
    pipeline.run = {
        program.name: program.lower().compile()
        for program in pipeline.programs
        if any(name in program.name for name in wanted)
    }
    prompts, negatives = pipeline.encode(PROMPTS[model]), pipeline.encode(tiny.NEGATIVE_PROMPTS)
    # Only a negative prompt that is left out is zeros. diffusers was given an empty one.
    negatives = [replace(text, empty=False) for text in negatives]
    recorded = RECORDED[model], edit_cases.INPAINTING[model]
    assert_edits_are_those_of_diffusers(pipeline, model, prompts, negatives, recorded)


@pytest.mark.slow
def test_they_draw_nothing_without_a_mask_and_need_a_server_that_takes_images(pipeline: Pipeline) -> None:
    ((width, height),) = pipeline.sizes
    image = np.zeros((height, width, 3), np.uint8)
    plain = Generation("a", "", width, height, 4, 5.0, 7, None, 1)
    assert not pipeline.capabilities.generations and pipeline.capabilities.masks
    with pytest.raises(InvalidField, match="image must be there, with a mask: this model only fills masks"):
        pipeline.check(plain)
    with pytest.raises(InvalidField, match="mask must be there: this model only fills masks"):
        pipeline.check(replace(plain, edit=Edit(image)))


@pytest.mark.parametrize("name", ["stable-diffusion-v1-4", "stable-diffusion-2-1", "stable-diffusion-xl-base-1.0"])
def test_nine_channels_are_a_variant_of_every_family_with_a_unet(name: str) -> None:
    configs = {**CHECKPOINTS, **XL_CHECKPOINTS}[name]
    xl = "XL" if "text_encoder_2" in configs else ""
    kind = recognise({"_class_name": f"StableDiffusion{xl}InpaintPipeline"} | dict.fromkeys(configs), [])
    assert kind is not None
    for channels, wrong in ((9, 0), (4, 0), (5, 1)):
        problems: list[str] = []
        family = architecture(kind, {**configs, "unet": configs["unet"] | {"in_channels": channels}}, {}, problems)
        assert len(problems) == wrong
        assert family.capabilities.generations == (channels == 4)
    assert "in_channels must be the VAE's latent_channels 4 (text to image) or 9 (inpainting), got 5" in problems[0]
