"""Stable Diffusion XL against diffusers, as recorded by tests/make_golden.py."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from app.diffusion.families.components import guidance_embedding
from app.diffusion.families.registry import recognise
from app.diffusion.families.stable_diffusion_xl import StableDiffusionXL
from app.diffusion.models.checkpoint_files import architecture
from app.diffusion.models.layers import TimestepEmbedding
from app.diffusion.models.loading import builders, load_checkpoint
from app.diffusion.models.strips import WHOLE
from app.diffusion.models.tensor_names import squeezed
from app.diffusion.models.tensors import from_tensor, tensor_name, tensor_shape
from app.diffusion.pipeline import Pipeline
from app.engine.engine import Engine
from app.types import ActiveSlot, Generation, PipelineSpec
from tests import tiny
from tests.diffusion.edits import assert_edits_are_those_of_diffusers, recorded_noise
from tests.diffusion.some_programs import compile_some
from tests.diffusion.test_models import golden, relative_error
from tests.published import XL_CHECKPOINTS

MODEL = "tiny-sdxl"
HEIGHT, WIDTH = tiny.IMAGE_SIZES[MODEL]
SIZE = (WIDTH, HEIGHT)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = tiny.write_checkpoint(tmp_path_factory.mktemp(MODEL), MODEL, tiny.tensor_shapes()[MODEL])
    spec = PipelineSpec(MODEL, sizes=(SIZE,), batch_buckets=(1,), max_steps=4, edits=True)
    pipeline = Pipeline(load_checkpoint(folder), spec)
    with pytest.MonkeyPatch.context() as monkeypatch:
        recorded_noise(monkeypatch, MODEL)
        compile_some(pipeline, "encode", "insert", "rows 2", "decode")
    return pipeline


@pytest.mark.slow
def test_texts_become_what_diffusers_conditions_on(pipeline: Pipeline) -> None:
    for name, tokenizer in pipeline.tokenizers.items():
        assert np.array_equal(tokenizer(tiny.PROMPTS).input_ids, golden(MODEL)[f"{name} input_ids"])
    texts = pipeline.encode(tiny.PROMPTS)
    assert [text.truncated for text in texts] == [False, True]
    for name in ("prompt_embeds", "text_embeds"):
        ours = np.stack([np.asarray(text.conditioning[name]) for text in texts])
        assert relative_error(ours, golden(MODEL)[name]) <= 5e-5


@pytest.mark.slow
def test_whole_pictures_are_within_a_grey_level_of_diffusers(pipeline: Pipeline) -> None:
    prompts = pipeline.encode(tiny.XL_PROMPTS)
    for number, (sampler, steps, guidance_scale, negative_prompts, fields) in enumerate(tiny.XL_RUNS):
        negatives = pipeline.encode(negative_prompts or ["", ""])
        table = pipeline.table(sampler, steps)
        state = pipeline.empty_state(SIZE)
        for slot, texts in enumerate(zip(prompts, negatives, strict=True)):
            state = pipeline.insert(state, slot, *texts, table, guidance_scale, 0, fields)
        latents = np.array(state.latents)
        latents[:2] = table.initial_scale * tiny.latents(MODEL)
        state = state._replace(latents=jax.device_put(latents, pipeline.everywhere))
        for slot in (0, 1):
            state, _ = pipeline.step(state, [ActiveSlot(slot, guided=True)], len(table))
        ours = np.concatenate([pipeline.decode(state, [slot]) for slot in (0, 1)]).astype(int)
        apart = np.abs(ours - golden(MODEL)[f"picture {number}"])
        assert (apart <= 1).all(axis=-1).mean() >= 0.999, f"{sampler}: {apart.max()} grey levels apart"


@pytest.mark.slow
def test_edits_are_within_a_grey_level_of_diffusers(pipeline: Pipeline) -> None:
    prompts, negatives = pipeline.encode(tiny.XL_PROMPTS), pipeline.encode(tiny.NEGATIVE_PROMPTS)
    # Only a negative prompt that is left out is zeros. diffusers was given an empty one.
    negatives = [replace(text, empty=False) for text in negatives]
    assert_edits_are_those_of_diffusers(pipeline, MODEL, prompts, negatives)


@pytest.mark.slow
def test_the_engine_hands_the_size_fields_of_a_request_to_the_model(pipeline: Pipeline) -> None:
    pipeline.step_s = {(SIZE, rows): 0.01 for rows in pipeline.row_buckets}
    pipeline.launch_s = dict.fromkeys(pipeline.step_s, 0.001)
    pipeline.decode_s = {(SIZE, 1): 0.01}
    plain = Generation("a red house", "", *SIZE, 3, 5.0, 7, "euler", 1)
    fields = {"original_size": (64, 48), "crops_coords_top_left": (2, 6)}
    engine = Engine(pipeline, max_waiting=4)
    engine.start()
    try:
        futures = [engine.submit(replace(plain, fields=tuple(chosen.items()))) for chosen in ({}, fields)]
        served = [future.result(timeout=120).pixels[0] for future in futures]
    finally:
        engine.close()
    (prompt, empty), table = pipeline.encode([plain.prompt, ""]), pipeline.table("euler", 3)
    for pixels, chosen in zip(served, ({}, fields), strict=True):
        state = pipeline.insert(pipeline.empty_state(SIZE), 0, prompt, empty, table, 5.0, 7, chosen)
        state, _ = pipeline.step(state, [ActiveSlot(0, guided=True)], len(table))
        assert np.array_equal(np.asarray(pipeline.decode(state, [0]))[0], pixels)
    assert not np.array_equal(*served)


@pytest.mark.slow
def test_the_unet_computes_what_diffusers_computes(pipeline: Pipeline) -> None:
    inputs = tiny.inputs(MODEL)
    conditioning = {
        "prompt_embeds": inputs["context"],
        "text_embeds": inputs["text_embeds"],
        "time_ids": inputs["time_ids"],
    }

    @jax.jit
    def denoise(params: Any) -> Any:
        networks = {"unet": unet(params)}
        return pipeline.shapes.family.denoise(networks, inputs["unet"], inputs["timesteps"], conditioning, strips=WHOLE)

    (unet,) = (program.function.args[1]["unet"] for program in pipeline.programs if program.name.endswith("rows 2"))  # type: ignore[attr-defined]
    assert relative_error(denoise(pipeline.params["unet"]), golden(MODEL)["unet"]) <= 5e-5


def family_of(name: str, **changes: Any) -> tuple[StableDiffusionXL, list[str]]:
    problems: list[str] = []
    configs = {part: config | changes.get(part, {}) for part, config in XL_CHECKPOINTS[name].items()}
    kind = recognise({"_class_name": "StableDiffusionXLPipeline"}, problems)
    assert kind is StableDiffusionXL
    family = architecture(kind, configs, {}, problems)
    assert isinstance(family, StableDiffusionXL)
    return family, problems


@pytest.mark.slow
@pytest.mark.parametrize("part", StableDiffusionXL.COMPONENTS)
def test_modules_hold_exactly_the_tensors_of_the_published_checkpoint(part: str) -> None:
    name = "stable-diffusion-xl-base-1.0"
    family, problems = family_of(name)
    assert not problems
    module = nnx.eval_shape(builders(family, np.float32)[part])
    parameters = nnx.to_flat_state(nnx.state(module, nnx.Param))
    ours = {tensor_name(path): squeezed(tensor_shape(path, parameter.shape)) for path, parameter in parameters}
    assert ours == published(name, part)
    declared = family.COMPONENTS[part].tensors(getattr(family, part))
    assert {tensor: squeezed(shape) for tensor, shape in declared.items()} == ours


def published(name: str, part: str) -> dict[str, tuple[int, ...]]:
    stored = tiny.tensor_shapes()[name][part]
    return {tensor.removeprefix("text_model."): squeezed(tuple(shape)) for tensor, shape in stored.items()}


@pytest.mark.parametrize("name", XL_CHECKPOINTS)
def test_the_schedule_of_a_published_checkpoint_is_understood(name: str) -> None:
    schedule, remarks = StableDiffusionXL.schedule(XL_CHECKPOINTS[name]["scheduler"])
    assert schedule.timestep_spacing == ("trailing" if "turbo" in name else "leading")
    assert schedule.steps_offset == 1 and not remarks


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"unet": {"addition_embed_type": None}}, "addition_embed_type must be 'text_time'"),
        ({"unet": {"addition_embed_type": "image"}}, "addition_embed_type must be None or 'text_time', got 'image'"),
        ({"unet": {"addition_time_embed_dim": 128}}, "6 times addition_time_embed_dim, 2048, got 2816"),
        ({"unet": {"transformer_layers_per_block": [1, 2]}}, "transformer_layers_per_block must have 3 entries"),
        ({"text_encoder": {"hidden_size": 1020}}, "the text encoders' hidden sizes together, 2300, got 2048"),
        ({"text_encoder_2": {"architectures": ["CLIPTextModel"]}}, "must name CLIPTextModelWithProjection"),
        ({"text_encoder_2": {"max_position_embeddings": 64}}, "must be the first text encoder's 77, got 64"),
    ],
)
def test_what_the_architecture_does_not_bear_is_named(changes: dict[str, Any], problem: str) -> None:
    _, problems = family_of("stable-diffusion-xl-base-1.0", **changes)
    assert any(problem in line for line in problems), problems


def test_a_unet_that_takes_the_guidance_scale_needs_no_second_row() -> None:
    family, problems = family_of("sdxl-turbo", unet={"time_cond_proj_dim": 256})
    assert not problems and family.embeds_guidance
    guidance = family.numbers((512, 512), 7.5, {})["guidance"]
    assert np.array_equal(guidance, np.stack([guidance_embedding(7.5, 256)] * 2))
    generation = Generation("a", "", 512, 512, 4, 7.5, 0, None, 1)
    assert (generation.rows, replace(generation, guidance_embedded=True).rows) == (2, 1)


@pytest.mark.slow
def test_the_guidance_scale_joins_the_timesteps_as_in_diffusers() -> None:
    module = TimestepEmbedding(8, 12, condition_features=10, dtype=np.float32, rngs=nnx.Rngs(0))
    for path, parameter in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        name, shape = tensor_name(path), tensor_shape(path, parameter.shape)
        parameter[...] = from_tensor(path, tiny.weight("time", name, [*shape]), parameter.shape)
    time, guidance = (jnp.asarray(tiny.noise(name, 2, size)) for name, size in (("time", 8), ("guidance", 10)))
    ours = module(time, guidance)
    assert relative_error(ours, golden(MODEL)["time_embedding"]) <= 1e-5


def test_the_guidance_scale_of_distilled_unets_is_embedded_as_in_diffusers() -> None:
    # diffusers rounds the frequencies of angles in the thousands to float32.
    assert relative_error(guidance_embedding(7.5, 10), golden(MODEL)["guidance"]) <= 1e-4
