"""What the engine makes of images that the chips of a host divide: on a paced device, against rows that stay whole.

    python -m benchmarks.layouts          # part of `make bench-engine`; exit status 1 if a bar is missed
    python -m benchmarks.layouts --quick

Both devices have four chips, which draw four images in the time of one. On one of them a step of fewer rows is quicker,
as the chips divide each image. The same engine serves both: it is to choose one image at a time while the queue is
short, and four while it is long. Requests are those of a distilled model: four steps, one row each.
"""

import dataclasses
import time

import numpy as np

from app.types import Size
from benchmarks.devices import served_by_engine
from benchmarks.figures import Figure, conclude
from benchmarks.load import equal_requests, offer, offer_all, request
from benchmarks.paced import Pace, PacedPipeline
from benchmarks.report import log, machine
from cluster.cli import Parser, run_command
from loadtest.arrivals import poisson

NAME = "paced, images divided over 4 chips"
SIZE: Size = (64, 64)  # small, as the pixels of the stand-in take time too
BATCHES = (1, 2, 4)
STEPS = 4
# FLUX.2-klein on a v5litepod-4, modelled (docs/measured.md), at a fifth of its time: steps of 198 ms for four rows and
# 56 ms for one, to which the exchange of keys and values adds 11; decodes of 24 ms an image.
WHOLE = Pace(chips=4, step_s=0.04, decode_steps=0.49)
DIVIDED = dataclasses.replace(WHOLE, divided=0.75)
LOADS = {0.1: 30, 0.5: 60, 0.9: 100}  # requests of a run, by share of the capacity with whole rows
BARS = {0.1: 0.6, 0.5: 1.0, 0.9: 1.0}  # of the mean latency
RUSH = 256  # requests that arrive at once; the last four are drawn one after the other, which costs 0.3 %


def capacity() -> float:
    """Requests a second of a full queue with whole rows: steps, and the decode."""
    return WHOLE.chips / (STEPS * WHOLE.step_s + WHOLE.decode(WHOLE.chips))


def measured(runs: int) -> list[Figure]:
    """Latencies from a lone request to nine tenths of the capacity, and throughput beyond it; over whole rows."""
    divided, whole = (PacedPipeline(pace, batch_buckets=BATCHES, size=SIZE) for pace in (DIVIDED, WHOLE))
    against = "rows that stay whole"
    lone = Figure(NAME, "lone", "latency", 0.6, against=against)
    loads = {
        load: Figure(NAME, f"equal, {load:.0%}", "mean latency", bar, against=against) for load, bar in BARS.items()
    }
    saturated = Figure(NAME, "equal, saturated", "requests/s", 0.99, at_most=False, against=against)
    for run in range(runs):
        lone.add(lone_s(divided, run), lone_s(whole, run))
        for load, count in LOADS.items():
            arrivals = poisson(count, np.random.default_rng([run, 4])) / (load * capacity())
            loads[load].add(*(mean_s(pipeline, count, arrivals) for pipeline in (divided, whole)))
        saturated.add(*(rate(pipeline) for pipeline in (divided, whole)))
        log(f"{NAME}: run {run + 1} of {runs}")
    return [lone, *loads.values(), saturated]


def lone_s(pipeline: PacedPipeline, run: int) -> float:
    with served_by_engine(pipeline) as submit:
        began = time.monotonic()
        submit(request(SIZE, run, steps=STEPS, guidance_scale=1.0)).result()
        return time.monotonic() - began


def mean_s(pipeline: PacedPipeline, count: int, arrivals: np.ndarray) -> float:
    requests = equal_requests(count, SIZE, steps=STEPS, guidance_scale=1.0)
    with served_by_engine(pipeline) as submit:
        return float(offer(submit, requests, arrivals).latencies.mean())


def rate(pipeline: PacedPipeline) -> float:
    with served_by_engine(pipeline) as submit:
        offered = offer_all(submit, equal_requests(RUSH, SIZE, steps=STEPS, guidance_scale=1.0))
    return RUSH / offered.makespan_s


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--runs", type=int, default=5, help="of each device (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a single run, as a check")
    args = parser.parse_args()
    before = machine()
    title = "Images divided over chips: over rows that stay whole"
    figures = measured(1 if args.quick else args.runs)
    return conclude("layouts", title, figures, before, vars(args), complete=not args.quick)


if __name__ == "__main__":
    run_command(main)
