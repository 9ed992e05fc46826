"""Measures how fast an engine lets its requests go, and what an image weighs that moves.

    python -m benchmarks.moves          # two minutes

On a device that only takes time, 50-step images run, guided and not. The engine hands them over at random moments, and
a second engine finishes them. From the wish until the engine is empty, the bar is 3 steps' time in the median.
With the demo model on this machine: the bytes of an image, and how long it takes out of one pipeline and into another.
"""

import random
import time

import jax
import numpy as np

from app.diffusion.pipeline import Pipeline
from app.engine.engine import Engine
from app.engine.errors import HandedOver
from app.engine.virtual import number_of
from app.types import ActiveSlot, PipelineSpec
from benchmarks.load import request
from benchmarks.paced import Pace, PacedPipeline
from benchmarks.report import log, spread
from cluster import ROOT
from cluster.cli import Parser, run_command

SIZE, MODEL_SIZE = (64, 64), (128, 128)
STEPS, IMAGES, BAR = 50, 8, 3.0
DRAINS = 10
WAIT_S = 60.0


def drained(pace: Pace, draw: random.Random) -> float:
    """Seconds from the wish until the first engine is empty. Raises RuntimeError if a picture is another one."""
    first, second = (
        Engine(PacedPipeline(pace, batch_buckets=(1, 2, 4, 8), size=SIZE), max_waiting=IMAGES) for _ in range(2)
    )
    for engine in (first, second):
        engine.start()
    try:
        generations = [
            request(SIZE, 1000 * seed, steps=STEPS, guidance_scale=draw.choice([1.0, 4.0])) for seed in range(IMAGES)
        ]
        futures = [first.submit(generation) for generation in generations]
        time.sleep(draw.uniform(5, 15) * pace.step_s)
        began = time.perf_counter()
        first.hand_over()
        errors = [future.exception(WAIT_S) for future in futures]
        seconds = time.perf_counter() - began
        pictures = []
        for generation, error in zip(generations, errors, strict=True):
            if not isinstance(error, HandedOver):
                raise RuntimeError(f"the picture of seed {generation.seed} was not handed over: {error!r}")
            pictures.append(second.submit(generation, resumed=error.resumed, beyond_limits=True))
        for generation, picture in zip(generations, pictures, strict=True):
            if number_of(picture.result(WAIT_S).pixels[0]) != generation.seed + STEPS:
                raise RuntimeError(f"the picture of seed {generation.seed} is another one after its move")
        return seconds
    finally:
        for engine in (first, second):
            engine.close()


def weighed() -> tuple[int, float, float]:
    """Bytes of an image of the demo model; seconds out of a slot, and into another one."""
    pipeline = Pipeline.load(PipelineSpec(str(ROOT / "assets/demo-model"), (MODEL_SIZE,), (1,), STEPS))
    pipeline.warmup()
    (text,) = pipeline.encode(["a red boat"])
    state = pipeline.empty_state(MODEL_SIZE)
    state = pipeline.insert(state, 0, text, text, pipeline.table(None, STEPS, MODEL_SIZE), 4.0, 7)
    state, done = pipeline.step(state, [ActiveSlot(0, True)], 3)
    pipeline.wait(done)
    out, into = [], []
    for _ in range(DRAINS):
        began = time.perf_counter()
        packed = bytes(pipeline.export_slot(state, 0))
        out.append(time.perf_counter() - began)
        began = time.perf_counter()
        state = pipeline.import_slot(state, 1, pipeline.unpacked(MODEL_SIZE, packed))
        jax.block_until_ready(state)
        into.append(time.perf_counter() - began)
    return len(packed), float(np.median(out)), float(np.median(into))


def main() -> int:
    Parser(__doc__).parse_args()
    draw, missed = random.Random(0), []
    for step_s in (0.02, 0.05):
        steps = spread([drained(Pace(step_s=step_s), draw) / step_s for _ in range(DRAINS)])
        log(
            f"{IMAGES} images of {STEPS} steps, {1000 * step_s:g} ms a step: empty after {steps['median']:.2f} steps' "
            f"time ({steps['min']:.2f} to {steps['max']:.2f} in {DRAINS} drains; the bar is {BAR:g})"
        )
        missed += [step_s] if steps["median"] > BAR else []
    size, out_s, into_s = weighed()
    log(f"an image of the demo model: {size / 1024:.0f} KiB, {1000 * out_s:.1f} ms out, {1000 * into_s:.1f} ms in")
    return 1 if missed else 0


if __name__ == "__main__":
    run_command(main)
