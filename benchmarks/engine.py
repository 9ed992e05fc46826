"""Measures step-level batching against whole batches: our engine and the best whole-batch server on one pipeline.

    python -m benchmarks.engine                        # both devices; exit status 1 if a bar is missed
    python -m benchmarks.engine --device paced --quick

There are two devices (benchmarks/devices.py): the demo model on this machine, and a clock paced like a TPU host. There
are three workloads: a single request, equal requests, and mixed requests. Both systems get the same requests at the
same times and take turns within a run. Each figure is the ratio of the two values of a run.

The baseline (benchmarks/whole_batch.py) is tuned for each load on the very arrivals that it will meet
(benchmarks/tuning.py).
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence

import numpy as np

from app.types import Generation
from benchmarks import layouts
from benchmarks.devices import Device, demo_device, paced_device, served_by_engine
from benchmarks.figures import Figure, conclude
from benchmarks.load import Offered, equal_requests, mixed_requests, offer, request
from benchmarks.paced import SD1_DECODE_STEPS, Pace, PacedPipeline
from benchmarks.report import log, machine
from benchmarks.tuning import Load, saturated, served_in_batches, tuned
from benchmarks.whole_batch import PREDECESSOR, Picture, batch_seconds, draw
from cluster.cli import Parser, run_command
from loadtest.arrivals import Seconds, poisson

MIXED_LOAD = 0.6  # of the tuned baseline's capacity
SINGLE_TRIES = 5  # of the engine and of the bare verbs in each run; the median counts


def measured(device: Device, workload: str, runs: int) -> list[Figure]:
    figures: list[Figure] = []
    for name, measure in (("lone", lone), ("equal", equal), ("mixed", mixed)):
        if workload in (name, "all"):
            figures += measure(device, runs)
    return figures


def lone(device: Device, runs: int) -> list[Figure]:
    """A single request without other load, against the predecessor and against the verbs without any server."""
    predecessor = Figure(
        device.name, "lone, predecessor", "latency", 0.1, against=f"{PREDECESSOR}, a full batch of steps"
    )
    bare = Figure(device.name, "lone, bare verbs", "latency", 1.1, against="encode, insert, steps, decode")
    pipeline, state = device.pipeline, device.pipeline.empty_state(device.size)
    full = device.predecessor()
    for run in range(runs):
        tries: dict[str, list[float]] = {"engine": [], "bare": []}
        with served_by_engine(pipeline) as submit:
            for number in range(SINGLE_TRIES):
                seed = 100 * run + number
                single = request(device.size, seed, steps=device.steps, guidance_scale=device.guidance_scale)
                for system in ("engine", "bare") if number % 2 else ("bare", "engine"):
                    began = time.monotonic()
                    if system == "engine":
                        submit(single).result()
                    else:
                        state, _ = draw(pipeline, state, [Picture(single, 0)])
                    tries[system].append(time.monotonic() - began)
        bare.add(np.median(tries["engine"]), np.median(tries["bare"]))
        with served_in_batches(full, PREDECESSOR) as submit:
            began = time.monotonic()
            submit(single).result()
            predecessor.add(np.median(tries["engine"]), time.monotonic() - began)
        log(f"{device.name}: lone, run {run + 1} of {runs}")
    return [predecessor, bare]


def equal(device: Device, runs: int, *, barred: bool = True) -> list[Figure]:
    """Equal requests: latency at each load, and throughput at saturation."""

    def drawn(count: int) -> list[Generation]:
        return equal_requests(count, device.size, steps=device.steps, guidance_scale=device.guidance_scale)

    def score(requests: Sequence[Generation], latencies: Seconds) -> float:
        return float(np.quantile(latencies, 0.5) + np.quantile(latencies, 0.95))

    paced = isinstance(device.pipeline, PacedPipeline)
    rush = drawn(device.rush)
    setting, capacity = saturated(device, rush)
    figures = []
    for load, count in device.equal.items():
        unit = [poisson(count, np.random.default_rng([run, 1])) for run in range(runs)]
        chosen = tuned(device, [(drawn(count), at / (load * capacity)) for at in unit], score, f"equal at {load:.0%}")
        bars = {"p50": 0.7, "p95": 0.65} if paced and load == 0.6 else {"p50": 1.0, "p95": 1.0}
        p50, p95 = (
            Figure(device.name, f"equal, {load:.0%}", name, bar if barred else None, against=str(chosen.setting))
            for name, bar in bars.items()
        )
        for engine, baseline in in_turns(device, chosen):
            p50.add(*(np.quantile(offered.latencies, 0.5) for offered in (engine, baseline)))
            p95.add(*(np.quantile(offered.latencies, 0.95) for offered in (engine, baseline)))
        figures += [p50, p95]
    if not barred:
        return figures
    throughput = Figure(device.name, "equal, saturated", "requests/s", 1.0, at_most=False, against=str(setting))
    for engine, baseline in in_turns(device, Load([(rush, np.zeros(len(rush)))] * runs, setting)):
        throughput.add(len(rush) / engine.makespan_s, len(rush) / baseline.makespan_s)
    return [*figures, throughput]


def mixed(device: Device, runs: int) -> list[Figure]:
    """Requests with 4, 8, 20 or 50 steps, guided or not, for 1 to 4 pictures.

    The slowdown of a request is its latency over what it takes alone.
    """

    def alone_s(request: Generation) -> float:
        return batch_seconds(device.pipeline, [Picture(request, number) for number in range(request.n)])

    def slowdown(requests: Sequence[Generation], latencies: Seconds) -> float:
        return float(np.mean(latencies / [alone_s(request) for request in requests]))

    drawn = [mixed_requests(device.mixed, device.size, np.random.default_rng([run, 2])) for run in range(runs)]
    _, capacity = saturated(device, drawn[0])
    rate = MIXED_LOAD * capacity
    offers = [
        (requests, poisson(len(requests), np.random.default_rng([run, 3])) / rate) for run, requests in enumerate(drawn)
    ]
    chosen = tuned(device, offers, slowdown, f"mixed at {MIXED_LOAD:.0%}")
    mean, p99 = (
        Figure(device.name, f"mixed, {MIXED_LOAD:.0%}", name, bar, against=str(chosen.setting))
        for name, bar in (("mean slowdown", 0.4), ("p99", 1.0))
    )
    for (requests, _), (engine, baseline) in zip(chosen.offers, in_turns(device, chosen), strict=True):
        mean.add(slowdown(requests, engine.latencies), slowdown(requests, baseline.latencies))
        p99.add(np.quantile(engine.latencies, 0.99), np.quantile(baseline.latencies, 0.99))
    return [mean, p99]


def in_turns(device: Device, load: Load) -> Iterator[tuple[Offered, Offered]]:
    """The outcome of each run with the engine and with the baseline. Which of them goes first alternates."""
    for run, (requests, arrivals) in enumerate(load.offers):
        outcome: dict[str, Offered] = {}
        for system in ("engine", "baseline") if run % 2 else ("baseline", "engine"):
            engine = system == "engine"
            server = served_by_engine(device.pipeline) if engine else served_in_batches(device.pipeline, load.setting)
            with server as submit:
                outcome[system] = offer(submit, requests, arrivals)
        late_ms = 1000 * max(offered.send_lag_s for offered in outcome.values())  # large if this machine is busy
        log(f"{device.name}: run {run + 1} of {len(load.offers)}, {len(requests)} requests, {late_ms:.1f} ms late")
        yield outcome["engine"], outcome["baseline"]


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--device", choices=("demo", "paced", "both"), default="both", help="(%(default)s)")
    parser.add_argument("--workload", choices=("lone", "equal", "mixed", "all"), default="all", help="(%(default)s)")
    parser.add_argument("--runs", type=int, default=5, help="of each system (%(default)s)")
    parser.add_argument("--requests", type=float, default=1.0, help="factor for the number of requests (%(default)s)")
    parser.add_argument("--steps", type=int, help="of the lone and the equal requests (10 demo, 20 paced)")
    parser.add_argument("--quick", action="store_true", help="a single run of half the requests, as a check")
    parser.add_argument("--pace-ms", type=float, default=10.0, help="of a step on the paced device (%(default)s)")
    args = parser.parse_args()
    before = machine()
    runs, factor = (1, 0.5 * args.requests) if args.quick else (args.runs, args.requests)
    pace = Pace(step_s=args.pace_ms / 1000)

    def scaled(device: Device) -> Device:
        return dataclasses.replace(
            device,
            equal={load: max(2, round(count * factor)) for load, count in device.equal.items()},
            rush=max(2, round(device.rush * factor)),
            mixed=max(2, round(device.mixed * factor)),
            steps=args.steps or device.steps,
        )

    figures: list[Figure] = []
    if args.device != "paced":
        figures += measured(scaled(demo_device()), args.workload, runs)
    if args.device != "demo":
        figures += measured(scaled(paced_device(pace)), args.workload, runs)
    if args.device != "demo" and args.workload in ("equal", "all"):
        decoding = paced_device(dataclasses.replace(pace, decode_steps=SD1_DECODE_STEPS), "paced, with decoding")
        figures += equal(scaled(dataclasses.replace(decoding, equal={0.6: 64})), runs, barred=False)
        figures += layouts.measured(runs)

    complete = not args.quick and (args.device, args.workload) == ("both", "all")
    title = "Step-level batching against whole batches: ours over baseline"
    return conclude("engine", title, figures, before, vars(args), complete)


if __name__ == "__main__":
    run_command(main)
