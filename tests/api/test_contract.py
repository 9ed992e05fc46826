"""The real engine with a tiny real model: the same request gives the same image, whatever runs beside it."""

import random
from collections.abc import Iterator, Sequence
from concurrent.futures import Future

import numpy as np
import pytest

from app.aot.compile import CompileWatch
from app.diffusion.pipeline import Pipeline
from app.engine.engine import Engine
from app.engine.request import Generated
from app.types import SEEDS, Generation, PipelineSpec
from tests.diffusion.some_programs import timed_in_a_moment
from tests.tiny import tensor_shapes, write_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fully_optimized")]

SIZES = ((16, 24), (16, 16))
WAIT_S = 300
SAMPLERS = ("ddim", "euler", "euler_ancestral", "heun", "dpmpp_2m_karras", "dpmpp_sde", "unipc", "pndm", "lcm", None)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = write_checkpoint(tmp_path_factory.mktemp("model"), "tiny-sd2", tensor_shapes()["tiny-sd2"])
    pipeline = Pipeline.load(PipelineSpec(str(folder), sizes=SIZES, batch_buckets=(1, 4), max_steps=12))
    with timed_in_a_moment():
        pipeline.warmup()
    return pipeline


@pytest.fixture(autouse=True)
def nothing_is_compiled(pipeline: Pipeline) -> Iterator[None]:
    watch = CompileWatch()
    watch.ready()
    yield
    watch.close()
    assert watch.count == 0


def requests(count: int) -> list[Generation]:
    rng = random.Random(0)
    words = ["a red house", "the sea at night", "two suns", "", "a boat in the snow"]
    return [
        Generation(
            prompt=rng.choice(words[:3] + words[4:]),
            negative_prompt=rng.choice(words[2:]),
            width=size[0],
            height=size[1],
            num_inference_steps=rng.randint(1, 12),
            guidance_scale=rng.choice([1.0, 1.5, 4.0, 9.0]),
            seed=rng.choice([0, 7, SEEDS - 1, rng.randrange(SEEDS)]),
            sampler=rng.choice(SAMPLERS),
            n=rng.choice([1, 1, 2, 4]),
        )
        for size in rng.choices(SIZES, k=count)
    ]


def drawn(pipeline: Pipeline, generations: Sequence[Generation], images_at_once: int | None) -> list[Generated]:
    engine = Engine(pipeline, max_waiting=len(generations), images_at_once=images_at_once)
    engine.start()
    try:
        futures: list[Future[Generated]] = [engine.submit(generation) for generation in generations]
        return [future.result(WAIT_S) for future in futures]
    finally:
        engine.close()


def test_64_random_requests_get_the_same_images_together_and_alone(pipeline: Pipeline) -> None:
    generations = requests(64)
    alone = drawn(pipeline, generations, images_at_once=1)
    together = drawn(pipeline, generations, images_at_once=4)
    backwards = drawn(pipeline, generations[::-1], images_at_once=1)[::-1]
    for generation, single, other, again in zip(generations, alone, together, backwards, strict=True):
        assert single.seeds == other.seeds == tuple((generation.seed + i) % SEEDS for i in range(generation.n))
        assert single.pixels.shape == (generation.n, generation.height, generation.width, 3)
        assert np.array_equal(single.pixels, again.pixels), f"{generation} differs in one bucket"
        apart = np.abs(single.pixels.astype(int) - other.pixels.astype(int)).max()
        assert apart <= 1, f"{generation} is {apart} grey levels off beside others"


def test_image_i_of_a_request_is_the_image_of_seed_plus_i(pipeline: Pipeline) -> None:
    (four,) = [request for request in requests(64) if request.n == 4][:1]
    single = [Generation(**{**vars(four), "n": 1, "seed": (four.seed + number) % SEEDS}) for number in range(four.n)]
    (together,) = drawn(pipeline, [four], images_at_once=1)
    alone = drawn(pipeline, single, images_at_once=1)
    assert np.array_equal(together.pixels, np.concatenate([generated.pixels for generated in alone]))


def test_a_cancelled_neighbour_changes_no_bit(pipeline: Pipeline) -> None:
    generations = requests(24)
    alone = drawn(pipeline, generations, images_at_once=1)
    engine = Engine(pipeline, max_waiting=len(generations), images_at_once=1)
    engine.start()
    futures = [engine.submit(generation) for generation in generations]
    cancelled = [future.cancel() for future in futures[::3]]
    try:
        for number, (future, generated) in enumerate(zip(futures, alone, strict=True)):
            if number % 3 or not cancelled[number // 3]:
                assert np.array_equal(future.result(WAIT_S).pixels, generated.pixels)
    finally:
        engine.close()
    assert sum(cancelled) >= 6  # of 8: the first may be done already
