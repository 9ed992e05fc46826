"""FLUX.2-klein and Z-Image as families: whole pictures against diffusers' pipelines, and what they refuse."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from app.aot.compile import compiled
from app.diffusion.families import flux2_klein, z_image
from app.diffusion.families.registry import recognise
from app.diffusion.models.loading import load_checkpoint
from app.diffusion.pipeline import Pipeline
from app.types import ActiveSlot, Generation, InvalidField, PipelineSpec
from tests import edit_cases, tiny_flow
from tests.diffusion.edits import assert_edits_are_those_of_diffusers, recorded_noise
from tests.diffusion.test_flow_models import golden

FAMILIES: dict[str, Any] = {"tiny-klein": flux2_klein, "tiny-z-image": z_image}
GENERATION = Generation("a house", "", 24, 16, 4, 1.0, 0, None, 1)


@pytest.fixture(scope="module", autouse=True)
def tiny_families() -> Any:
    """Reads the hidden states that tiny text encoders have, of short texts."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for model, family in FAMILIES.items():
            monkeypatch.setattr(family, "HIDDEN_STATES", tiny_flow.HIDDEN_STATES[model])
            monkeypatch.setattr(family, "TEXT_LENGTH", tiny_flow.TEXT_LENGTH)
        yield


def write(folder: Path, model: str, **options: Any) -> Path:
    return tiny_flow.write_checkpoint(folder, model, tiny_flow.tensor_tables()[model], **options)


@pytest.fixture(scope="module", params=tiny_flow.MODELS)
def drawn(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Pipeline]:
    """A model's name and its pipeline. Only the programs that the tests run are compiled."""
    model: str = request.param
    height, width = tiny_flow.IMAGE_SIZES[model]
    size, label = (width, height), f"{width}x{height}"
    sizes, references = ((size, edit_cases.REFERENCE_SIZE[::-1]), 2) if model == "tiny-klein" else ((size,), None)
    spec = PipelineSpec(model, sizes=sizes, batch_buckets=(1,), max_steps=4, edits=True, references=references)
    pipeline = Pipeline(load_checkpoint(write(tmp_path_factory.mktemp(model), model)), spec)
    pipeline.blank = {size: pipeline.blank_edit(size)}
    needed = ("encode", f"insert {label}", f"step {label} rows 2", f"decode {label}", "place reference")
    programs = [program for program in pipeline.programs if program.name.startswith(needed)]
    with pytest.MonkeyPatch.context() as monkeypatch:
        recorded_noise(monkeypatch, model)
        pipeline.run = compiled(programs, folder=None, fingerprint={})
    pipeline.row_buckets = (2,)
    return model, pipeline


@pytest.mark.slow
def test_edits_are_within_a_grey_level_of_diffusers(drawn: tuple[str, Pipeline]) -> None:
    model, pipeline = drawn
    prompts, negatives = map(pipeline.encode, (tiny_flow.PROMPTS, tiny_flow.NEGATIVE_PROMPTS[model]))
    assert_edits_are_those_of_diffusers(pipeline, model, prompts, negatives)


@pytest.mark.slow
def test_whole_pictures_are_within_a_grey_level_of_diffusers(drawn: tuple[str, Pipeline]) -> None:
    model, pipeline = drawn
    size = pipeline.sizes[0]
    prompts, negative_prompts = map(pipeline.encode, (tiny_flow.PROMPTS, tiny_flow.NEGATIVE_PROMPTS[model]))
    for steps, guidance_scale in tiny_flow.RUNS[model]:
        table = pipeline.table(None, steps, size)
        state = pipeline.empty_state(size)
        for slot, texts in enumerate(zip(prompts, negative_prompts, strict=True)):
            state = pipeline.insert(state, slot, *texts, table, guidance_scale, seed=0)
        latents = np.array(state.latents)
        latents[:2] = tiny_flow.latents(model)
        state = state._replace(latents=jax.device_put(latents, pipeline.everywhere))
        active = [ActiveSlot(slot, guidance_scale > 1) for slot in (0, 1)]
        for together in [active[:1], active[1:]] if guidance_scale > 1 else [active]:
            state, _ = pipeline.step(state, together, len(table))
        ours = np.concatenate([pipeline.decode(state, [slot]) for slot in (0, 1)]).astype(int)
        apart = np.abs(ours - golden(model)[f"{steps} {guidance_scale}"])
        assert (apart <= 1).all(axis=-1).mean() >= 0.999, f"{steps} steps: {apart.max()} grey levels apart"


def family_of(model: str, index: Any = (), **changes: dict[str, Any]) -> Any:
    kind = flux2_klein.Flux2Klein if model == "tiny-klein" else z_image.ZImage
    problems: list[str] = []
    configs = {
        part: component.read(tiny_flow.MODELS[model][part] | changes.get(part, {}), problems, part)
        for part, component in kind.COMPONENTS.items()
    }
    assert not problems
    return kind.of(configs, dict(index))


GUIDED, UNWANTED = replace(GENERATION, guidance_scale=4.0), replace(GENERATION, negative_prompt="rain")


def test_a_distilled_model_refuses_guidance_and_says_why() -> None:
    distilled = family_of("tiny-klein", {"is_distilled": True})
    distilled.check(GENERATION)
    with pytest.raises(InvalidField, match="guidance_scale must be at most 1, got 4. This model is distilled"):
        distilled.check(GUIDED)
    with pytest.raises(InvalidField, match="negative_prompt must be empty. This model is distilled"):
        distilled.check(UNWANTED)


@pytest.mark.parametrize("model", tiny_flow.MODELS)
def test_models_that_are_not_distilled_take_guidance(model: str) -> None:
    for generation in (GENERATION, GUIDED, UNWANTED):
        family_of(model).check(generation)


@pytest.mark.parametrize(
    "model, part, change, problem",
    [
        ("tiny-klein", "transformer", {"joint_attention_dim": 48}, "joint_attention_dim must be 72, 3 times the text"),
        ("tiny-klein", "vae", {"latent_channels": 8}, "in_channels must be 32, 4 times the VAE's latent_channels"),
        ("tiny-z-image", "transformer", {"cap_feat_dim": 8}, "cap_feat_dim must be the text encoder's hidden_size 24"),
        ("tiny-z-image", "vae", {"latent_channels": 8}, "in_channels must be the VAE's latent_channels 8, got 4."),
    ],
)
def test_what_networks_do_not_agree_on_is_a_problem(
    model: str, part: str, change: dict[str, Any], problem: str
) -> None:
    assert not family_of(model).problems()
    (sentence,) = family_of(model, **{part: change}).problems()
    assert problem in sentence


def test_a_picture_has_as_many_tokens_as_patches_of_sixteen_pixels() -> None:
    for model in tiny_flow.MODELS:
        family = family_of(model, vae={"block_out_channels": [8] * 4} | BLOCKS)
        assert family.image_tokens((1024, 768)) == 64 * 48
        assert family.size_multiple == 16


BLOCKS = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}


def test_layers_behind_the_last_hidden_state_are_not_read_and_unknown_ones_are_problems() -> None:
    klein, z = (family_of(model).text_encoder for model in tiny_flow.MODELS)
    assert klein.layers_read == 4 and z.layers_read == 3
    names = ("layers.3.mlp.up_proj.weight", "layers.4.mlp.up_proj.weight", "layers.5.mlp.up_proj.weight")
    assert [klein.unread(name) for name in (*names, "norm.weight", "lm_head.weight", "head.weight")] == [
        *(False, True, False),
        *(True, True, False),
    ]


def test_a_pipeline_with_another_transformer_is_of_no_family() -> None:
    problems: list[str] = []
    parts = {part: None for part in ("transformer", "vae", "text_encoder", "tokenizer")}
    assert recognise({"_class_name": "Flux2KleinPipeline"}, problems) is flux2_klein.Flux2Klein
    assert recognise({"_class_name": "ZImagePipeline"}, problems) is z_image.ZImage
    turbo = parts | {"transformer": ["diffusers", "ZImageTransformer2DModel"]}
    assert recognise(turbo | {"_class_name": "ZImageImg2ImgPipeline"}, problems) is z_image.ZImage
    assert not problems
    other = parts | {"transformer": ["diffusers", "FluxTransformer2DModel"]}
    assert recognise(other | {"_class_name": "FluxPipeline"}, problems) is None
    assert "got FluxPipeline" in problems[0]
