"""The four verbs on a tiny real model: what a picture depends on, and what is compiled."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.pipeline import DenoiseState, Pipeline
from tests.tiny import tensor_shapes, write_checkpoint

SIZE = (16, 24)
SAMPLERS = ("ddim", "euler", "euler_ancestral", "dpmpp_2m", "dpmpp_2m_karras", "pndm", "lcm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), "tiny-sd2", tensor_shapes()["tiny-sd2"])


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Pipeline:
    pipeline = Pipeline.load(str(folder), sizes=[SIZE], batch_buckets=[4, 1], max_steps=8)
    pipeline.warmup()
    return pipeline


def picture(pipeline: Pipeline, seeds: list[int], *, sampler: str = "ddim", guidance_scale: float = 5.0) -> np.ndarray:
    """Pictures of one prompt, one for each seed, side by side in the smallest bucket."""
    table = pipeline.table(sampler, 4)
    embeddings = pipeline.encode("a red house", "rain")
    state, slots = pipeline.empty_state(SIZE), range(len(seeds))
    for slot, seed in enumerate(seeds):
        state = pipeline.insert(state, slot, embeddings, table, guidance_scale, seed)
    for _ in range(len(table)):
        state = pipeline.step(state, slots)
    return np.asarray(pipeline.decode(state, slots))[: len(seeds)]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_picture_depends_on_its_seed_and_not_on_slot_or_neighbours(pipeline: Pipeline, sampler: str) -> None:
    together = picture(pipeline, [7, 2**32 - 1, 0, 7], sampler=sampler)
    elsewhere = picture(pipeline, [0, 7, 5], sampler=sampler)  # another slot, other neighbours, the same bucket
    assert np.array_equal(together[0], together[3])
    assert np.array_equal(together[0], elsewhere[1])
    assert np.array_equal(together[2], elsewhere[0])
    assert not np.array_equal(together[0], together[1])


def test_buckets_agree_within_a_grey_level(pipeline: Pipeline) -> None:
    alone, beside = picture(pipeline, [3])[0], picture(pipeline, [1, 3, 2])[1]
    assert np.abs(alone.astype(int) - beside.astype(int)).max() <= 1


def test_slots_at_different_steps_of_different_samplers_share_a_step(pipeline: Pipeline) -> None:
    """Each slot's picture is the one that it would have made alone."""
    requests = [("pndm", 3, 1.0, 11), ("euler_ancestral", 8, 7.5, 12), ("dpmpp_2m", 5, 3.0, 13)]
    tables = [pipeline.table(sampler, steps) for sampler, steps, _, _ in requests]
    embeddings = [pipeline.encode(prompt) for prompt in ("the sea", "a house", "a sun at night")]

    def insert(state: DenoiseState, slot: int, which: int) -> DenoiseState:
        _, _, guidance_scale, seed = requests[which]
        return pipeline.insert(state, slot, embeddings[which], tables[which], guidance_scale, seed)

    alone = []
    for which, table in enumerate(tables):
        state = insert(pipeline.empty_state(SIZE), 0, which)
        for _ in range(len(table)):
            state = pipeline.step(state, [0])
        alone.append(np.asarray(pipeline.decode(state, [0]))[0])

    state, finished = pipeline.empty_state(SIZE), {}
    running: dict[int, int] = {}  # slot -> steps to go; one joins at each step
    for tick in range(12):
        if tick < len(requests):
            slot = 3 - tick
            state = insert(state, slot, tick)
            running[slot] = len(tables[tick])
        if running:
            state = pipeline.step(state, list(running))
        running = {slot: left - 1 for slot, left in running.items()}
        for slot in [slot for slot, left in running.items() if left == 0]:
            del running[slot]
            finished[3 - slot] = np.asarray(pipeline.decode(state, [slot]))[0]
    assert sorted(finished) == [0, 1, 2]
    for which, expected in enumerate(alone):
        assert np.abs(finished[which].astype(int) - expected.astype(int)).max() <= 1


def test_guidance_of_one_ignores_the_negative_prompt(pipeline: Pipeline) -> None:
    def drawn(negative_prompt: str, guidance_scale: float) -> np.ndarray:
        table = pipeline.table("ddim", 3)
        embeddings = pipeline.encode("a red house", negative_prompt)
        state = pipeline.insert(pipeline.empty_state(SIZE), 0, embeddings, table, guidance_scale, 1)
        for _ in range(3):
            state = pipeline.step(state, [0])
        return np.asarray(pipeline.decode(state, [0]))[0].astype(int)

    assert np.abs(drawn("rain", 1.0) - drawn("", 1.0)).max() <= 1
    assert np.abs(drawn("rain", 6.0) - drawn("", 6.0)).max() > 1


def test_nothing_is_compiled_after_warmup(pipeline: Pipeline) -> None:
    programs: tuple[Any, ...] = (pipeline._encode, pipeline._insert, pipeline._step, pipeline._decode)
    before = [program._cache_size() for program in programs]
    for sampler in SAMPLERS:
        picture(pipeline, [1, 2], sampler=sampler, guidance_scale=1.0)
        picture(pipeline, [3], sampler=sampler)
    assert [program._cache_size() for program in programs] == before


def test_truncation_is_told_of_each_prompt(pipeline: Pipeline) -> None:
    embeddings = pipeline.encode("a house", "the sea " * 60)
    assert (embeddings.prompt_truncated, embeddings.negative_prompt_truncated) == (False, True)


def test_a_size_that_the_checkpoint_cannot_draw_is_refused_at_load(folder: Path) -> None:
    with pytest.raises(ValueError, match="sizes must have a width and a height that are multiples of 4.*got 16x18"):
        Pipeline.load(str(folder), sizes=[(16, 18)], batch_buckets=[1], max_steps=4)


def test_more_steps_than_declared_or_an_unknown_sampler_is_refused(pipeline: Pipeline) -> None:
    with pytest.raises(ValueError, match="num_inference_steps must be between 1 and 8, got 9"):
        pipeline.table("ddim", 9)
    with pytest.raises(ValueError, match="sampler must be one of ddim, .*, got ddpm"):
        pipeline.table("ddpm", 4)


def test_float32_sampler_arithmetic_over_bfloat16_networks(folder: Path) -> None:
    pipeline = Pipeline.load(str(folder), dtype="bfloat16", sizes=[SIZE], batch_buckets=[1], max_steps=4)
    table = pipeline.table("dpmpp_2m", 2)
    state = pipeline.insert(pipeline.empty_state(SIZE), 0, pipeline.encode("a house"), table, 5.0, 3)
    state = pipeline.step(state, [0])
    dtypes = [str(x.dtype) for x in (state.latents, state.history, state.prompt_embeds)]
    assert dtypes == ["float32", "float32", "bfloat16"]
    assert np.isfinite(np.asarray(state.latents)).all()
