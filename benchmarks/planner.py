"""Compares the planner's simulation (capacity/simulate.py) with the real engine.

    python -m benchmarks.planner           # about 3 minutes; exit 1 if a bar is missed

The engine draws with the demo model on this machine's CPU, under three loads of random arrivals. The simulation gets
the same arrivals, and the step times that the engine measured in that run. Warm-up's times are the quickest of several
and so too short for a busy machine; the decode times are scaled alike. The latencies must agree within 20 %.
"""

import dataclasses
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import jax
import numpy as np

from app.diffusion.pipeline import Pipeline
from app.engine.engine import Engine
from app.types import Generation, Size
from benchmarks.devices import demo_pipeline
from benchmarks.figures import Figure, conclude
from benchmarks.load import equal_requests, offer
from benchmarks.report import log, machine
from capacity.simulate import Load, Timings, simulate
from cluster.cli import Parser, run_command
from loadtest.arrivals import poisson

SHARES = (0.3, 0.6, 0.8)  # loads, as shares of the engine's highest throughput
STEPS, GUIDANCE_SCALE, GAIN, MAX_WAITING = 20, 4.0, 0.05, 10_000
BUCKETS = (1, 2, 4)
WITHIN = 1.2


def timings_of(pipeline: Pipeline) -> Timings:
    size = pipeline.sizes[0]
    pipeline.encode(["a text"])
    began = time.perf_counter()
    for number in range(10):
        jax.block_until_ready(pipeline.encode([f"text {number}"])[0].conditioning)
    return Timings(
        {rows: pipeline.step_s[size, rows] for rows in pipeline.row_buckets},
        {images: pipeline.decode_s[size, images] for images in pipeline.decode_buckets},
        (time.perf_counter() - began) / 10,
        launch_s={rows: pipeline.launch_s[size, rows] for rows in pipeline.row_buckets},
    )


@contextmanager
def watched(engine: Engine) -> Iterator[list[float]]:
    """Samples the engine's estimate of its cheapest step, in seconds, ten times a second while the block runs."""
    step_times: list[float] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.1):
            (size,) = engine.stats()["sizes"].values()
            step_times.append(min(size["step_s"].values()))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield step_times
    finally:
        over.set()
        thread.join()


def paced(timings: Timings, step_times: Sequence[float]) -> Timings:
    """The timings scaled to the mean of the sampled step times."""
    pace = float(np.mean(step_times)) / min(timings.step_s.values())
    log(f"  steps took {pace:.2f} times as long as at warm-up")
    return Timings(
        {rows: pace * seconds for rows, seconds in timings.step_s.items()},
        {images: pace * seconds for images, seconds in timings.decode_s.items()},
        pace * timings.encode_s,
        launch_s={rows: pace * seconds for rows, seconds in (timings.launch_s or {}).items()},
    )


def prompts(run: int, share: float, count: int, size: Size) -> list[Generation]:
    """Equal requests with prompts that no other load uses, so that none is in the prompt cache."""
    requests = equal_requests(count, size, steps=STEPS, guidance_scale=GUIDANCE_SCALE)
    return [dataclasses.replace(request, prompt=f"run {run} {share} {request.prompt}") for request in requests]


def compare(runs: int, count: int) -> list[Figure]:
    figures = {
        (share, percentile): Figure("demo model, CPU", f"{share:.0%} load", f"p{percentile}", bar=WITHIN)
        for share in SHARES
        for percentile in (50, 95)
    }
    pipeline = demo_pipeline(BUCKETS, STEPS)
    assert isinstance(pipeline, Pipeline)
    size = pipeline.sizes[0]
    evaluations = len(pipeline.table(None, STEPS))
    for run in range(runs):
        pipeline.calibrate()  # again in each run, as the machine's pace changes
        timings = timings_of(pipeline)
        image_s = evaluations * min(timings.step_s[2 * images] / images for images in BUCKETS)
        image_s += min(seconds / images for images, seconds in timings.decode_s.items())
        for share in SHARES:
            log(f"run {run + 1} of {runs}, {share:.0%} of {1 / image_s:.1f} pictures a second")
            arrivals = poisson(count, np.random.default_rng([run, round(100 * share)])) * image_s / share
            engine = Engine(pipeline, max_waiting=MAX_WAITING, gain=GAIN)
            engine.start()
            try:
                with watched(engine) as step_times:
                    measured = offer(engine.submit, prompts(run, share, count, size), arrivals)
            finally:
                engine.close()
            simulated = simulate(
                paced(timings, step_times), Load(arrivals, evaluations), gain=GAIN, max_waiting=MAX_WAITING
            )
            for percentile in (50, 95):
                pair = simulated.percentile(percentile), float(np.percentile(measured.latencies, percentile))
                figures[share, percentile].add(max(pair), min(pair))
                log(f"  p{percentile}: simulated {pair[0]:.3f} s, measured {pair[1]:.3f} s")
    return list(figures.values())


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--count", type=int, default=100, help="requests of each load")
    arguments = parser.parse_args()
    before = machine()
    figures = compare(arguments.runs, arguments.count)
    title = "Simulated against measured latency: the larger over the smaller"
    whole = arguments.runs >= 3 and arguments.count >= 100
    return conclude("planner", title, figures, before, vars(arguments), whole)


if __name__ == "__main__":
    run_command(main)
