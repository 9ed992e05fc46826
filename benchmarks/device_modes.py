"""Measures the engine on stand-in devices that dispatch in every way a real one may.

    python -m benchmarks.device_modes          # about 6 minutes; exit status 1 if a bar is missed
    python -m benchmarks.device_modes --quick  # the extremes only
    python -m benchmarks.device_modes --clock virtual  # seconds, and the same on any machine

A device is asynchronous, or a call returns only when the device is done. A call costs the host some time, a dispatch
adds a launch to its steps, clocks ramp up, or a dispatch takes longer now and then. The engine knows only what it
measures at warm-up and while serving. Against it stand the bare verbs: encode, insert, all steps in one dispatch,
decode. A lone request may take 1.05 of them and one dispatch more; a queue must be served at 0.97 of their rate.

On the virtual clock no time passes but the device's and that of the calls: the engine's own work takes none.
"""

import itertools
import time
from collections.abc import Sequence

import numpy as np

from app.engine.engine import Engine
from app.engine.virtual import VirtualClock
from benchmarks.devices import served_by_engine
from benchmarks.figures import Figure, conclude
from benchmarks.load import equal_requests, request
from benchmarks.paced import Pace, PacedPipeline
from benchmarks.report import log, machine
from benchmarks.whole_batch import Picture, draw
from capacity.simulate import SIZE as SIMULATED
from capacity.simulate import Load, simulate_on
from capacity.simulate import request as simulated
from cluster.cli import Parser, run_command

SIZE = (64, 64)  # small, as the pixels of the stand-in take time too
BATCHES, CHIPS = (1, 2, 4, 8), 16  # a step of the largest batch takes as long as that of a single picture
STEPS = {0.001: 20, 0.01: 20, 0.1: 6}  # of a picture, by the seconds of a step
ROUNDS = 4  # batches of a full queue
LONE, SATURATED = 1.05, 0.97
GAIN = 0.05


def modes(quick: bool) -> dict[str, Pace]:
    """By name: every combination, and devices that change."""
    steps = (0.001, 0.01) if quick else (0.001, 0.01, 0.1)
    hosts = (0.0001, 0.01) if quick else (0.0001, 0.002, 0.01)
    launches = (0.0, 0.004)
    paces = [
        Pace(CHIPS, step_s, 1.0, host_s, launch_s, blocks)
        for blocks, step_s, host_s, launch_s in itertools.product((False, True), steps, hosts, launches)
    ]
    paces += [Pace(CHIPS, 0.01, 1.0, 0.0001, 0.0, blocks, cold=1.5) for blocks in (False, True)]
    paces += [Pace(CHIPS, 0.01, 1.0, 0.0001, 0.0, blocks, hiccup_s=0.1) for blocks in (False, True)]
    return {name_of(pace): pace for pace in paces}


def name_of(pace: Pace) -> str:
    parts = ["blocking" if pace.blocks else "async", f"step {1e3 * pace.step_s:g}"]
    parts += [f"call {1e3 * pace.host_s:g}", f"launch {1e3 * pace.launch_s:g}"]
    return ", ".join(parts + ["ramping"] * (pace.cold > 1) + ["hiccups"] * (pace.hiccup_s > 0))


def started(pace: Pace, virtual: bool = False) -> PacedPipeline:
    """A device that has been warmed up, as a replica's is."""
    size, clock = (SIMULATED, VirtualClock()) if virtual else (SIZE, None)
    pipeline = PacedPipeline(pace, batch_buckets=BATCHES, size=size, clock=clock)
    pipeline.warm_up()
    return pipeline


def figures_of(name: str, pace: Pace, tries: int, virtual: bool) -> list[Figure]:
    pipeline = started(pace, virtual)
    lone = Figure(name, "lone, less a dispatch", "latency", LONE, against="bare verbs")
    saturated = Figure(name, "saturated", "requests/s", SATURATED, at_most=False, against="bare verbs, full batches")
    for number in range(tries):
        if virtual:
            engine_s, bare_s = (simulated_s(pipeline, batches=1, images=1, bare=bare) for bare in (False, True))
            lone.add(engine_s - pace.host_s - pace.launch_s, bare_s)
            count = ROUNDS * BATCHES[-1]
            saturated.add(*(count / simulated_s(pipeline, ROUNDS, BATCHES[-1], bare) for bare in (False, True)))
        else:
            lone.add(*lone_s(pipeline, number))
            saturated.add(*saturated_rates(pipeline, number))
    return [lone, saturated]


def simulated_s(pipeline: PacedPipeline, batches: int, images: int, bare: bool) -> float:
    """Seconds for full batches of equal requests that wait at the start, on a virtual clock."""
    began, count = pipeline.clock(), batches * images
    load = Load(np.full(count, began), STEPS[pipeline.device.step_s])
    if not bare:
        return float(simulate_on(pipeline, load, gain=GAIN, max_waiting=count).latencies.max())
    state, pictures = pipeline.empty_state(SIMULATED), [Picture(simulated(number, load), 0) for number in range(count)]
    for batch in range(0, count, images):
        state, _ = draw(pipeline, state, pictures[batch : batch + images])
    return pipeline.clock() - began


def lone_s(pipeline: PacedPipeline, number: int) -> tuple[float, float]:
    """Latency of a single request by the engine, less one dispatch, and by the bare verbs: medians of three."""
    pace, state = pipeline.device, pipeline.empty_state(SIZE)
    seconds: dict[str, list[float]] = {"engine": [], "bare": []}
    with served_by_engine(pipeline) as submit:
        for again in range(3):
            single = request(SIZE, 1000 * number + again, steps=STEPS[pace.step_s])
            for system in ("engine", "bare") if again % 2 else ("bare", "engine"):
                began = time.monotonic()
                if system == "engine":
                    submit(single).result()
                else:
                    state, _ = draw(pipeline, state, [Picture(single, 0)])
                seconds[system].append(time.monotonic() - began)
    return float(np.median(seconds["engine"])) - pace.host_s - pace.launch_s, float(np.median(seconds["bare"]))


def saturated_rates(pipeline: PacedPipeline, number: int) -> tuple[float, float]:
    """Requests per second of a full queue, by the engine and by the bare verbs in full batches."""
    count = ROUNDS * BATCHES[-1]
    requests = equal_requests(count, SIZE, steps=STEPS[pipeline.device.step_s], guidance_scale=4.0)
    rates = {}
    for system in ("engine", "bare") if number % 2 else ("bare", "engine"):
        state = pipeline.empty_state(SIZE)
        if system == "engine":
            engine = Engine(pipeline, max_waiting=count)
            futures = [engine.submit(generation) for generation in requests]
            began = time.monotonic()
            engine.start()
            for future in futures:
                future.result()
            rates[system] = count / (time.monotonic() - began)
            engine.close()
        else:
            began = time.monotonic()
            for batch in range(0, count, BATCHES[-1]):
                pictures = [Picture(generation, 0) for generation in requests[batch : batch + BATCHES[-1]]]
                state, _ = draw(pipeline, state, pictures)
            rates[system] = count / (time.monotonic() - began)
    return rates["engine"], rates["bare"]


def measured(paces: dict[str, Pace], tries: int, virtual: bool) -> list[Figure]:
    figures: list[Figure] = []
    for number, (name, pace) in enumerate(paces.items(), 1):
        figures += figures_of(name, pace, tries, virtual)
        ratios = ", ".join(f"{figure.workload} {np.median(figure.ratios):.3f}" for figure in figures[-2:])
        log(f"{number} of {len(paces)}: {name}: {ratios}")
    return figures


def worst(figures: Sequence[Figure]) -> str:
    return ", ".join(sorted({figure.device for figure in figures if figure.met is False})) or "none"


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="the extremes, once, as a check")
    parser.add_argument("--clock", choices=("real", "virtual"), default="real", help="(%(default)s)")
    parser.add_argument("--tries", type=int, default=3, help="of each figure (%(default)s)")
    args = parser.parse_args()
    before = machine()
    figures = measured(modes(args.quick), 1 if args.quick else args.tries, args.clock == "virtual")
    title = "The engine over the bare verbs, by device; milliseconds of a step, a call and a launch"
    return conclude(
        "devices", title, figures, before, vars(args), not args.quick and args.clock == "real", missed=worst(figures)
    )


if __name__ == "__main__":
    run_command(main)
