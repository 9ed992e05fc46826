"""FLUX.2-klein and Z-Image as families: whole pictures against diffusers' pipelines, and what they refuse."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from app.aot.compile import compiled
from app.diffusion.calibration import times_with_references
from app.diffusion.declared_programs import step_name
from app.diffusion.families import flux2_klein, z_image
from app.diffusion.families.registry import recognise
from app.diffusion.limits import capabilities_of, checked
from app.diffusion.models.loading import load_checkpoint
from app.diffusion.pipeline import Pipeline
from app.diffusion.timing import Timed
from app.types import ActiveSlot, Capabilities, DispatchCost, Edit, Generation, InvalidField, PipelineSpec
from tests import edit_cases, tiny_flow
from tests.diffusion.edits import assert_edits_are_those_of_diffusers, recorded_noise
from tests.diffusion.test_flow_models import golden

GENERATION = Generation("a house", "", 24, 16, 4, 1.0, 0, None, 1)


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
    steps = [step_name(label, 2, looks=looks) for looks in (False, True)]
    needed = ("encode", f"insert {label}", *steps, f"decode {label}", "place reference")
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


klein_alone = pytest.mark.parametrize("drawn", ["tiny-klein"], indirect=True)


def looking(pipeline: Pipeline, *pictures: tuple[int, Edit | None], together: bool) -> np.ndarray:
    """Pictures by slot and the images that they come with, all in steps that read reference images."""
    size = pipeline.sizes[0]
    (prompt,), table = pipeline.encode(["a boat"]), pipeline.table(None, 3, size)
    state = pipeline.empty_state(size)
    for slot, edit in pictures:
        encoded = pipeline.encode_image(edit, size) if edit else None
        state = pipeline.insert(state, slot, prompt, prompt, table, 1.0, slot, edit=encoded)
    slots = [ActiveSlot(slot, False, looks=True) for slot, _ in pictures]
    for active in [slots] if together else [[slot] for slot in slots]:
        state, _ = pipeline.step(state, active, len(table))
    return np.concatenate([pipeline.decode(state, [slot]) for slot, _ in pictures]).astype(int)


@pytest.mark.slow
@klein_alone
def test_a_picture_that_looks_at_images_is_the_same_beside_any_other(drawn: tuple[str, Pipeline]) -> None:
    model, pipeline = drawn
    small, large = edit_cases.references(model)
    pictures = (0, Edit(references=(large, small))), (1, Edit(references=(small,)))
    apart, beside = (looking(pipeline, *pictures, together=together) for together in (False, True))
    assert np.array_equal(apart, beside)
    assert not np.array_equal(apart[0], looking(pipeline, (0, Edit(references=(large,))), together=False)[0])


@pytest.mark.slow
@klein_alone
def test_a_picture_that_looks_at_nothing_is_the_same_in_steps_that_read_reference_images(
    drawn: tuple[str, Pipeline],
) -> None:
    model, pipeline = drawn
    size = pipeline.sizes[0]
    (prompt,), table = pipeline.encode(["a boat"]), pipeline.table(None, 3, size)
    state = pipeline.insert(pipeline.empty_state(size), 0, prompt, prompt, table, 1.0, 0)
    state, _ = pipeline.step(state, [ActiveSlot(0, False)], len(table))
    (beside, _) = looking(pipeline, (0, None), (1, Edit(references=(edit_cases.references(model)[0],))), together=True)
    assert np.abs(np.asarray(pipeline.decode(state, [0]))[0] - beside).max() <= 1


@pytest.mark.slow
@klein_alone
def test_warm_up_times_steps_that_look_at_images(drawn: tuple[str, Pipeline]) -> None:
    _, pipeline = drawn
    (text,) = pipeline.encode(["warm-up"])
    for least_s in (1e-9, 100.0):
        times = Timed({2: least_s}, {2: 0.0}, {}, DispatchCost())
        step_s = times_with_references(pipeline, pipeline.sizes[0], text, times)
        assert step_s.keys() == {2} and step_s[2] >= least_s
    assert step_s[2] == 100.0  # never less than a step that looks at nothing


@pytest.mark.parametrize(
    ("references", "served", "problem"),
    [(None, 1, ""), (4, 4, ""), (5, 0, "references must be at most 4 for a Flux2Klein, got 5.")],
)
def test_a_config_declares_how_many_images_klein_looks_at(references: int | None, served: int, problem: str) -> None:
    family = family_of("tiny-klein")
    spec = PipelineSpec("klein", ((24, 16),), (1,), 4, edits=True, references=references)
    if problem:
        with pytest.raises(ValueError, match=problem):
            capabilities_of(family, spec)
    else:
        able = capabilities_of(family, spec)
        assert (able.edits, able.masks, able.references) == (True, True, served)
        assert capabilities_of(family, replace(spec, edits=False, references=None)) == Capabilities()
    with pytest.raises(ValueError, match="references must be left out for a ZImage, got 1"):
        capabilities_of(family_of("tiny-z-image"), replace(spec, references=1))


def test_the_image_that_klein_begins_from_counts_among_those_that_it_looks_at() -> None:
    family, image = family_of("tiny-klein"), np.zeros((16, 24, 3), np.uint8)
    able = Capabilities(edits=True, masks=True, references=2)
    for edit, count in ((Edit(image, references=(image,)), 2), (Edit(references=(image, image)), 2), (Edit(image), 1)):
        assert checked(replace(GENERATION, edit=edit), family, able, [(24, 16)]).references == count
    with pytest.raises(InvalidField, match="references must be at most 2, the image to begin from among them, got 3"):
        checked(replace(GENERATION, edit=Edit(image, references=(image, image))), family, able, [(24, 16)])
    assert checked(GENERATION, family, able, [(24, 16)]).references == 0


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
        (
            "tiny-z-image",
            "text_encoder",
            {"max_sequence_length": 40},
            "max_sequence_length must be a multiple of 32",
        ),
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


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"text_encoder_out_layers": "3"}, "text_encoder_out_layers must be a list of layers' numbers, got '3'."),
        ({"text_encoder_out_layers": []}, "text_encoder_out_layers must be a list of layers' numbers, got []."),
        ({"text_encoder_out_layers": [-6]}, "text_encoder_out_layers must be a list of layers' numbers, got [-6]."),
        ({"text_encoder_out_layers": [9, 18, 27]}, "num_hidden_layers must be at least 28, got 5."),
        ({"max_sequence_length": 0}, "max_sequence_length must be a positive integer, got 0."),
        ({"max_sequence_length": "32"}, "max_sequence_length must be a positive integer, got '32'."),
    ],
)
def test_a_small_text_encoder_names_its_hidden_states_and_its_length(change: dict[str, Any], problem: str) -> None:
    read, config = (
        flux2_klein.Flux2Klein.COMPONENTS["text_encoder"].read,
        tiny_flow.MODELS["tiny-klein"]["text_encoder"],
    )
    problems: list[str] = []
    tiny = read(config, problems, "text_encoder")
    assert (tiny.hidden_states, tiny.text_length, problems) == ((1, 2, 4), tiny_flow.TEXT_LENGTH, [])
    own = ("text_encoder_out_layers", "max_sequence_length")
    published = read(
        {name: value for name, value in config.items() if name not in own} | {"num_hidden_layers": 36},
        problems,
        "published",
    )
    assert (published.hidden_states, published.text_length, problems) == ((9, 18, 27), 512, [])
    read(config | change, problems, "text_encoder")
    assert problems == [f"text_encoder: {problem}"]


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
