"""The four verbs on a tiny real model: what a picture depends on, and what is compiled."""

import itertools
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

import app.diffusion.declared_programs
import app.diffusion.pipeline
from app.aot.compile import CompileWatch
from app.diffusion.device_programs import rows_of
from app.diffusion.pipeline import Pipeline
from app.diffusion.sharding import row_sharding
from app.diffusion.text_encoding import Encoded
from app.types import ActiveSlot, Edit, Generation, InvalidField, PipelineSpec
from cluster import ROOT
from tests.diffusion.some_programs import compile_some, timed_in_a_moment
from tests.tiny import tensor_shapes, write_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fully_optimized")]

SIZE = (16, 24)
SAMPLERS = ("ddim", "euler", "euler_ancestral", "heun", "dpmpp_2m_karras", "dpmpp_sde", "unipc", "pndm", "lcm")


class Request(NamedTuple):
    prompt: str = "a red house"
    negative_prompt: str = "rain"
    sampler: str = "ddim"
    steps: int = 4
    guidance_scale: float = 5.0
    seed: int = 7
    edit: Edit | None = None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), "tiny-sd2", tensor_shapes()["tiny-sd2"])


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Pipeline:
    pipeline = Pipeline.load(PipelineSpec(str(folder), sizes=(SIZE,), batch_buckets=(4, 1), max_steps=8, edits=True))
    with timed_in_a_moment():
        pipeline.warmup()
    return pipeline


def draw(
    pipeline: Pipeline, requests: Sequence[Request], stride: int = 1, slots: Sequence[int] = range(8)
) -> np.ndarray:
    """Pictures side by side, in as few dispatches of at most `stride` steps as their tables allow."""
    state = pipeline.empty_state(SIZE)
    left = {}
    for slot, request in zip(slots, requests, strict=False):
        prompt, negative_prompt = pipeline.encode([request.prompt, request.negative_prompt])
        strength = request.edit.strength if request.edit else None
        table = pipeline.table(request.sampler, request.steps, strength=strength)
        edit = pipeline.encode_image(request.edit, SIZE) if request.edit else None
        guidance_scale, seed = request.guidance_scale, request.seed
        state = pipeline.insert(state, slot, prompt, negative_prompt, table, guidance_scale, seed, edit=edit)
        left[slot] = len(table)
    while running := {slot: steps for slot, steps in left.items() if steps}:
        active = [
            ActiveSlot(slot, request.guidance_scale > 1)
            for slot, request in zip(slots, requests, strict=False)
            if left[slot]
        ]
        count = min(stride, *running.values())
        state, _ = pipeline.step(state, active, count)
        left |= {slot: steps - count for slot, steps in running.items()}
    return np.concatenate([np.asarray(pipeline.decode(state, [slot]))[:1] for slot in left])


def far(image: np.ndarray, other: np.ndarray) -> int:
    """Grey levels."""
    return int(np.abs(image.astype(int) - other.astype(int)).max())


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_picture_depends_on_its_seed_and_not_on_slot_or_neighbours(pipeline: Pipeline, sampler: str) -> None:
    seven, last, zero, five = (Request(seed=seed, sampler=sampler) for seed in (7, 2**32 - 1, 0, 5))
    together = draw(pipeline, [seven, last, zero, seven])
    elsewhere = draw(pipeline, [zero, seven, five], slots=[6, 2, 0])  # other slots and neighbours, the same bucket
    assert np.array_equal(together[0], together[3])
    assert np.array_equal(together[0], elsewhere[1])
    assert np.array_equal(together[2], elsewhere[0])
    assert not np.array_equal(together[0], together[1])


def test_buckets_agree_within_a_grey_level(pipeline: Pipeline) -> None:
    requests = [Request(seed=seed) for seed in (1, 3, 2)]
    assert far(draw(pipeline, requests[1:2])[0], draw(pipeline, requests)[1]) <= 1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_steps_in_one_dispatch_or_in_many_are_the_same_bit_for_bit(pipeline: Pipeline, sampler: str) -> None:
    requests = [Request(sampler=sampler, steps=6), Request(sampler=sampler, steps=8, seed=8)]
    assert np.array_equal(draw(pipeline, requests, stride=1), draw(pipeline, requests, stride=3))


@pytest.fixture(scope="module")
def other(pipeline: Pipeline, folder: Path) -> Pipeline:
    """Another pipeline of the same model, with the same compiled programs."""
    other = Pipeline.load(pipeline.spec)
    other.run, other.preview_maps = pipeline.run, pipeline.preview_maps
    return other


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_that_moves_between_two_steps_is_the_same_bit_for_bit(
    pipeline: Pipeline, other: Pipeline, sampler: str
) -> None:
    request = Request(sampler=sampler, steps=6, seed=11)
    table = pipeline.table(sampler, request.steps)
    for taken in (1, len(table) - 1):
        prompt, negative_prompt = pipeline.encode([request.prompt, request.negative_prompt])
        arguments = (prompt, negative_prompt, table, request.guidance_scale, request.seed)
        state = pipeline.insert(pipeline.empty_state(SIZE), 2, *arguments)
        state, _ = pipeline.step(state, [ActiveSlot(2, True)], taken)
        packed = bytes(pipeline.export_slot(state, 2))
        state = other.import_slot(other.empty_state(SIZE), 5, other.unpacked(SIZE, packed))
        assert bytes(other.export_slot(state, 5)) == packed
        state, _ = other.step(state, [ActiveSlot(5, True)], len(table) - taken)
        assert np.array_equal(np.asarray(other.decode(state, [5]))[0], draw(pipeline, [request])[0])
        assert np.asarray(other.preview(state, 5)).any()


def test_slots_at_different_steps_of_different_samplers_share_a_step(pipeline: Pipeline) -> None:
    """Each slot's picture is the one that it would have made alone."""
    requests = [
        Request("the sea", "", "pndm", 3, 1.0, 11),
        Request("a house", "rain", "euler_ancestral", 8, 7.5, 12),
        Request("a sun at night", "", "dpmpp_2m", 5, 3.0, 13),
    ]
    together = draw(pipeline, requests)
    for request, picture in zip(requests, together, strict=True):
        assert far(draw(pipeline, [request])[0], picture) <= 1


IMAGE = np.random.default_rng(3).integers(0, 256, (SIZE[1], SIZE[0], 3)).astype(np.uint8)
TOP = np.arange(SIZE[1])[:, None].repeat(SIZE[0], axis=1) < SIZE[1] // 2


def edited(mask: Any = None, strength: float = 0.5, **other: Any) -> Request:
    return Request(edit=Edit(IMAGE, mask, strength), steps=8, **other)


def test_an_edit_is_the_same_picture_beside_any_neighbours_and_so_are_they(pipeline: Pipeline) -> None:
    requests = [edited(sampler="dpmpp_2m_karras"), edited(TOP, 1.0), Request("a sun", steps=3), edited(TOP, 0.25)]
    alone = [draw(pipeline, [request, Request("the sea", seed=1)], slots=[5, 0])[0] for request in requests]
    together = draw(pipeline, requests, stride=2)
    for picture, beside in zip(alone, together, strict=True):
        assert far(picture, beside) <= 1
    assert np.array_equal(draw(pipeline, requests[::-1])[::-1], draw(pipeline, requests))
    assert np.array_equal(draw(pipeline, requests, stride=1), together)


def test_a_mask_over_everything_is_no_mask_and_an_image_is_nothing_to_its_neighbours_bit_for_bit(
    pipeline: Pipeline,
) -> None:
    everywhere = np.ones(TOP.shape, bool)
    assert np.array_equal(draw(pipeline, [edited(everywhere)]), draw(pipeline, [edited()]))
    # Of pure noise nothing is left to tell that there was an image.
    assert np.array_equal(draw(pipeline, [edited(everywhere, 1.0)]), draw(pipeline, [Request(steps=8)]))
    neighbours = [draw(pipeline, [other, Request(seed=2)])[1] for other in (edited(TOP), edited(), Request(steps=4))]
    assert np.array_equal(neighbours[0], neighbours[1]) and np.array_equal(neighbours[0], neighbours[2])


def test_what_the_mask_leaves_out_stays_the_original_in_the_latents(pipeline: Pipeline) -> None:
    prompt, empty = pipeline.encode(["a house", ""])
    edit = pipeline.encode_image(Edit(IMAGE, TOP, 0.5), SIZE)
    table = pipeline.table("euler_ancestral", 8, strength=0.5)
    state = pipeline.insert(pipeline.empty_state(SIZE), 2, prompt, empty, table, 5.0, 7, edit=edit)
    state, _ = pipeline.step(state, [ActiveSlot(2, True)], len(table))
    latents, original = np.asarray(state.latents)[2], np.asarray(state.edit.original)[2]  # type: ignore[union-attr]
    half = len(latents) // 2
    assert np.array_equal(latents[half:], original[half:])
    assert np.abs(latents[:half] - original[:half]).max() > 0.01


def test_an_edit_has_the_strength_of_its_model_where_it_names_none(pipeline: Pipeline) -> None:
    def strength(mask: Any) -> Any:
        checked = pipeline.check(Generation("a", "", *SIZE, 4, 5.0, 7, None, 1, edit=Edit(IMAGE, mask)))
        return checked.edit and checked.edit.strength

    assert (strength(None), strength(TOP)) == (0.8, 1.0)
    with pytest.raises(InvalidField, match="image must have the size 16x24, got 24x16"):
        pipeline.check(Generation("a", "", *SIZE, 4, 5.0, 7, None, 1, edit=Edit(np.swapaxes(IMAGE, 0, 1))))


def embeds(text: Encoded) -> np.ndarray:
    return np.asarray(text.conditioning["prompt_embeds"])


def test_a_text_is_encoded_to_the_same_bits_beside_any_other(pipeline: Pipeline) -> None:
    texts = ["the sea", "a house", "", "rain", "a sun at night"]
    alone = [embeds(pipeline.encode([text])[0]) for text in texts]
    for order in itertools.islice(itertools.permutations(range(5)), 0, 120, 17):
        together = pipeline.encode([texts[i] for i in order])
        assert all(np.array_equal(embeds(text), alone[i]) for i, text in zip(order, together, strict=True))


def test_without_guidance_the_negative_prompt_is_nothing(pipeline: Pipeline) -> None:
    def drawn(negative_prompt: str, guidance_scale: float) -> np.ndarray:
        return draw(pipeline, [Request(negative_prompt=negative_prompt, guidance_scale=guidance_scale)])

    assert np.array_equal(drawn("rain", 1.0), drawn("", 1.0))
    assert far(drawn("rain", 6.0), drawn("", 6.0)) > 1


def test_a_guided_slot_costs_two_rows_and_padding_reaches_no_slot() -> None:
    rows = rows_of([ActiveSlot(5, True), ActiveSlot(2, False), ActiveSlot(0, True)], buckets=(1, 2, 4, 8), padding=16)
    assert rows.slots.tolist() == [5, 2, 0, 16, 16, 16, 16, 16]
    assert rows.owner.tolist() == [0, 0, 1, 2, 2, 0, 0, 0]
    assert rows.conditional.tolist() == [0, 1, 1, 0, 1, 0, 0, 0]
    assert (rows.uncond[:3].tolist(), rows.cond[:3].tolist()) == ([0, 2, 3], [1, 2, 4])
    assert len(rows_of([ActiveSlot(0, False)], buckets=(1, 2), padding=4).slots) == 1


def test_a_step_leaves_all_other_slots_alone(pipeline: Pipeline) -> None:
    prompt, negative_prompt = pipeline.encode(["a house", ""])
    state = pipeline.empty_state(SIZE)
    for slot in range(3):
        table = pipeline.table("ddim", 4)
        state = pipeline.insert(state, slot, prompt, negative_prompt, table, 5.0, slot)
    before = [np.array(x) for x in (state.latents, state.step)]
    state, done = pipeline.step(state, [ActiveSlot(1, True)], 2)
    pipeline.wait(done)
    latents, step = np.asarray(state.latents), np.asarray(state.step)
    assert step.tolist() == [0, 2, 0, 0, 0, 0, 0, 0]
    assert [np.array_equal(latents[slot], before[0][slot]) for slot in range(3)] == [True, False, True]


def test_nothing_is_compiled_after_warmup(pipeline: Pipeline) -> None:
    watch = CompileWatch()
    watch.ready()
    try:
        for sampler in SAMPLERS:
            draw(pipeline, [Request(sampler=sampler, guidance_scale=1.0), Request(seed=8, steps=8)], stride=2)
            draw(pipeline, [edited(sampler=sampler), edited(TOP, 1.0)])
        for count in range(1, 9):
            pipeline.encode(["a", "", "b", "c", "d", "e", "f", "g"][:count])
        pipeline.preview(pipeline.empty_state(SIZE), 3)
        assert watch.count == 0
    finally:
        watch.close()


def test_every_declared_program_has_run_and_been_timed(pipeline: Pipeline) -> None:
    assert pipeline.row_buckets == (1, 2, 4, 8)
    assert pipeline.decode_buckets == (1, 4)
    assert set(pipeline.step_s) == {(SIZE, rows) for rows in pipeline.row_buckets}
    assert set(pipeline.decode_s) == {(SIZE, images) for images in pipeline.decode_buckets}
    assert min(*pipeline.step_s.values(), *pipeline.decode_s.values()) > 0
    assert set(pipeline.run) == {program.name for program in pipeline.programs}


def test_a_loaded_program_that_fails_at_its_first_run_is_compiled_instead(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In place of what is loaded or compiled stand the programs of another pipeline."""
    folders = []

    def spoilt(programs: Any, *, folder: Path | None, fingerprint: Any) -> Any:
        def fail(*arguments: Any) -> None:
            raise jax.errors.JaxRuntimeError("INTERNAL: no such symbol")

        folders.append(folder)
        names = [program.name for program in programs]
        return {name: fail if folder and name.startswith("decode") else pipeline.run[name] for name in names}

    monkeypatch.setattr(app.diffusion.pipeline, "compiled", spoilt)
    again = Pipeline.load(replace(pipeline.spec, programs=tmp_path))
    with timed_in_a_moment():
        again.warmup()
    assert folders == [tmp_path, None]
    assert np.array_equal(draw(again, [Request()]), draw(pipeline, [Request()]))
    assert "A program failed at its first run, so all are compiled anew: INTERNAL: no such symbol" in caplog.text


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_preview_after_the_last_step_is_the_picture_in_the_rough(pipeline: Pipeline, sampler: str) -> None:
    """Random weights make pictures that no linear map can follow closely; what counts is what the map is applied to."""
    prompt, negative_prompt = pipeline.encode(["a house", ""])
    table = pipeline.table(sampler, 8)
    state = pipeline.insert(pipeline.empty_state(SIZE), 0, prompt, negative_prompt, table, 2.0, 5)
    state, _ = pipeline.step(state, [ActiveSlot(0, True)], len(table))
    weights = table.preview[-1]
    denoised = weights[0] * np.asarray(state.latents)[0] + weights[1] * np.asarray(state.history)[0, 0]
    # After the last step nothing is left to denoise, but for the share that some schedules keep at timestep 0.
    assert np.abs(denoised - np.asarray(state.latents)[0]).max() < 0.15 * np.abs(denoised).max()
    preview = np.asarray(pipeline.preview(state, 0))
    assert preview.shape == (1, SIZE[1], SIZE[0], 3)
    assert preview.dtype == np.uint8


def test_rows_are_divided_among_as_many_devices_as_divide_them(pipeline: Pipeline) -> None:
    assert [row_sharding(pipeline.mesh, rows).shard_shape((rows,)) for rows in (1, 2, 6)] == [(1,), (2,), (6,)]


def test_truncation_is_told_of_each_text(pipeline: Pipeline) -> None:
    assert [text.truncated for text in pipeline.encode(["a house", "the sea " * 60])] == [False, True]


def test_no_cpu_computes_in_place_of_a_missing_gpu(folder: Path) -> None:
    load = f"from app.diffusion.pipeline import *; Pipeline.load(PipelineSpec({str(folder)!r}, ((16, 24),), (1,), 4))"
    environment = os.environ | {"JAX_PLATFORMS": "cuda,cpu", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", load], env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "JAX_PLATFORMS is cuda,cpu, and JAX sees no NVIDIA GPU here" in done.stderr


def test_a_size_that_the_checkpoint_cannot_draw_is_refused_at_load(folder: Path) -> None:
    with pytest.raises(ValueError, match="sizes must have a width and a height that are multiples of 4.*got 16x18"):
        Pipeline.load(PipelineSpec(str(folder), sizes=((16, 18),), batch_buckets=(1,), max_steps=4))


def test_more_steps_than_declared_or_an_unknown_sampler_is_refused(pipeline: Pipeline) -> None:
    with pytest.raises(ValueError, match="num_inference_steps must be between 1 and 8, got 9"):
        pipeline.table("ddim", 9)
    with pytest.raises(ValueError, match="sampler must be one of ddim, .*, got plms"):
        pipeline.table("plms", 4)


@pytest.mark.usefixtures("compiled_quickly")
def test_float32_sampler_arithmetic_over_bfloat16_networks(folder: Path) -> None:
    spec = PipelineSpec(str(folder), dtype="bfloat16", sizes=(SIZE,), batch_buckets=(1,), max_steps=4)
    pipeline = Pipeline.load(spec)
    compile_some(pipeline, "encode", "insert", "rows 2")
    (text,) = pipeline.encode(["a house"])
    state = pipeline.insert(pipeline.empty_state(SIZE), 0, text, text, pipeline.table("dpmpp_2m", 2), 5.0, 3)
    state, _ = pipeline.step(state, [ActiveSlot(0, True)], 2)
    dtypes = [str(x.dtype) for x in (state.latents, state.history, state.conditioning["prompt_embeds"])]
    assert dtypes == ["float32", "float32", "bfloat16"]
    assert np.isfinite(np.asarray(state.latents)).all()


@pytest.mark.usefixtures("compiled_quickly")
def test_a_server_without_edits_loads_no_encoder_and_draws_the_same(pipeline: Pipeline, folder: Path) -> None:
    """Its decode bucket is larger than every batch bucket."""
    spec = PipelineSpec(str(folder), sizes=(SIZE,), batch_buckets=(1,), decode_buckets=(2,), max_steps=8)
    plain = Pipeline.load(spec)
    plain.warmup()
    picture = draw(plain, [Request()])
    assert picture.shape == (1, SIZE[1], SIZE[0], 3)
    assert far(picture, draw(pipeline, [Request()])) <= 1
    assert len(plain.params["vae"]) < len(pipeline.params["vae"])
    assert not plain.capabilities.edits
    with pytest.raises(InvalidField, match="image is not something this server takes"):
        plain.check(Generation("a", "", *SIZE, 4, 5.0, 7, None, 1, edit=Edit(IMAGE)))


@pytest.mark.usefixtures("compiled_quickly")
def test_without_loops_on_the_device_the_pictures_are_the_same_and_no_gpu_program_has_a_loop(
    pipeline: Pipeline, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app.diffusion.declared_programs, "HOST_LOOPS", {"cpu"})
    stepwise = Pipeline.load(PipelineSpec(str(folder), sizes=(SIZE,), batch_buckets=(1,), max_steps=8))
    lowered = {program.name: program.trace().lower(lowering_platforms=("cuda",)) for program in stepwise.programs}
    assert not [name for name, program in lowered.items() if "stablehlo.while" in program.as_text()]
    compile_some(stepwise, "encode", "insert", "rows", "decode")
    for request in (Request(), Request(sampler="dpmpp_2m", steps=6), Request(guidance_scale=1.0)):
        assert far(draw(stepwise, [request], stride=4), draw(pipeline, [request], stride=4)) <= 1
