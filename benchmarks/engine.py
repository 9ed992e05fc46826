"""Step-level batching against whole batches: the engine and the best server of whole batches over the same pipeline.

    python -m benchmarks.engine                        # both devices; exit status 1 where a bar is missed
    python -m benchmarks.engine --device paced --quick

Two devices: the demo model on this machine, and a clock paced like a TPU host (benchmarks/paced.py). Three workloads:
a lone request, equal requests, and requests that differ. Both systems meet the same requests at the same times, in
turns within one run, and each figure is the ratio of a run's two values. The baseline (benchmarks/whole_batch.py) is
tuned for every load on the very arrivals that it will meet: simulated with every batch size and wait, and the best few
really run.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from app.engine.engine import Engine, Verbs
from app.types import Generation
from benchmarks.figures import Figure, conclude
from benchmarks.load import (
    GUIDANCE_SCALE,
    Offered,
    Submit,
    equal_requests,
    mixed_requests,
    offer,
    offer_all,
    request,
)
from benchmarks.paced import SD1_DECODE_STEPS, Pace, PacedPipeline, Size
from benchmarks.report import machine
from benchmarks.whole_batch import PREDECESSOR, Picture, Setting, WholeBatch, batch_seconds, draw, ranked
from loadtest.arrivals import Seconds, poisson

ROOT = Path(__file__).resolve().parents[1]
MIXED_LOAD = 0.6  # of the tuned baseline's capacity
PACED_EQUAL = {0.3: 40, 0.6: 160, 0.9: 100}  # most where the bars are close: chance moves a p50 of 64 by a tenth
BATCHES = (1, 2, 4, 8, 16)
WAITS = (0.0, 0.1, 0.25, 0.5, 1.0)  # in the time that a picture takes alone, on average
CONFIRMED, CLOSE = 2, 1.25  # so many settings are really run, of those that simulate within this of the best
LONE_TRIES = 5  # of the engine and of the bare loop in each run; the median counts
ENGINE_QUEUE = 1_000_000

console = Console(stderr=True)


@dataclass(frozen=True)
class Device:
    """A pipeline, the one with the predecessor's only bucket, and what to ask of them."""

    name: str
    pipeline: Verbs
    predecessor: Callable[[], Verbs]
    steps: int  # of the lone and the equal requests
    guidance_scale: float
    equal: Mapping[float, int]  # equal requests in a run, by load
    rush: int  # equal requests in a run, all at once
    mixed: int  # mixed requests in a run

    @property
    def size(self) -> Size:
        return self.pipeline.sizes[0]

    @property
    def batches(self) -> list[int]:
        return [batch for batch in BATCHES if 2 * batch <= self.pipeline.row_buckets[-1]]


@dataclass(frozen=True)
class Load:
    """The same requests at the same times for both, once for each run."""

    offers: list[tuple[list[Generation], Seconds]]
    setting: Setting  # the baseline's best for it


Score = Callable[[Sequence[Generation], Seconds], float]


@contextmanager
def ours(pipeline: Verbs) -> Iterator[Submit]:
    engine = Engine(pipeline, max_waiting=ENGINE_QUEUE)
    engine.start()
    try:
        yield engine.submit
    finally:
        engine.close()


@contextmanager
def whole_batches(pipeline: Verbs, setting: Setting) -> Iterator[Submit]:
    server = WholeBatch(pipeline, setting)
    try:
        yield server.submit
    finally:
        server.close()


def measured(device: Device, workload: str, runs: int) -> list[Figure]:
    figures: list[Figure] = []
    for name, measure in (("lone", lone), ("equal", equal), ("mixed", mixed)):
        if workload in (name, "all"):
            figures += measure(device, runs)
    return figures


def lone(device: Device, runs: int) -> list[Figure]:
    """One request and nobody else: against the predecessor, and against the verbs without any server."""
    predecessor = Figure(
        device.name, "lone, predecessor", "latency", 0.1, against=f"{PREDECESSOR}, a full batch of steps"
    )
    bare = Figure(device.name, "lone, bare verbs", "latency", 1.1, against="encode, insert, steps, decode")
    pipeline, state = device.pipeline, device.pipeline.empty_state(device.size)
    full = device.predecessor()
    for run in range(runs):
        tries: dict[str, list[float]] = {"ours": [], "bare": []}
        with ours(pipeline) as submit:
            for number in range(LONE_TRIES):
                one = request(device.size, 100 * run + number, steps=device.steps, guidance_scale=device.guidance_scale)
                for system in ("ours", "bare") if number % 2 else ("bare", "ours"):
                    began = time.monotonic()
                    if system == "ours":
                        submit(one).result()
                    else:
                        state, _ = draw(pipeline, state, [Picture(one, 0)])
                    tries[system].append(time.monotonic() - began)
        bare.add(np.median(tries["ours"]), np.median(tries["bare"]))
        with whole_batches(full, PREDECESSOR) as submit:
            began = time.monotonic()
            submit(one).result()
            predecessor.add(np.median(tries["ours"]), time.monotonic() - began)
        tell(f"{device.name}: lone, run {run + 1} of {runs}")
    return [predecessor, bare]


def equal(device: Device, runs: int, *, barred: bool = True) -> list[Figure]:
    """Requests that are all alike: latency at each load, and throughput when there is always one more."""

    def drawn(count: int) -> list[Generation]:
        return equal_requests(count, device.size, steps=device.steps, guidance_scale=device.guidance_scale)

    def score(requests: Sequence[Generation], latencies: Seconds) -> float:
        return quantile(latencies, 0.5) + quantile(latencies, 0.95)

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
        for mine, other in in_turns(device, chosen):
            p50.add(quantile(mine.latencies, 0.5), quantile(other.latencies, 0.5))
            p95.add(quantile(mine.latencies, 0.95), quantile(other.latencies, 0.95))
        figures += [p50, p95]
    if not barred:
        return figures
    throughput = Figure(device.name, "equal, saturated", "requests/s", 1.0, at_most=False, against=str(setting))
    for mine, other in in_turns(device, Load([(rush, np.zeros(len(rush)))] * runs, setting)):
        throughput.add(len(rush) / mine.makespan_s, len(rush) / other.makespan_s)
    return [*figures, throughput]


def mixed(device: Device, runs: int) -> list[Figure]:
    """4, 8, 20 or 50 steps, guided or not, 1 to 4 pictures. Slowdown: latency over what the request takes alone."""

    def solo(one: Generation) -> float:
        return batch_seconds(device.pipeline, [Picture(one, number) for number in range(one.n)])

    def slowdown(requests: Sequence[Generation], latencies: Seconds) -> float:
        return float(np.mean(latencies / [solo(one) for one in requests]))

    drawn = [mixed_requests(device.mixed, device.size, np.random.default_rng([run, 2])) for run in range(runs)]
    _, capacity = saturated(device, drawn[0])
    rate = MIXED_LOAD * capacity
    offers = [(one, poisson(len(one), np.random.default_rng([run, 3])) / rate) for run, one in enumerate(drawn)]
    chosen = tuned(device, offers, slowdown, f"mixed at {MIXED_LOAD:.0%}")
    mean, p99 = (
        Figure(device.name, f"mixed, {MIXED_LOAD:.0%}", name, bar, against=str(chosen.setting))
        for name, bar in (("mean slowdown", 0.4), ("p99", 1.0))
    )
    for (requests, _), (mine, other) in zip(chosen.offers, in_turns(device, chosen), strict=True):
        mean.add(slowdown(requests, mine.latencies), slowdown(requests, other.latencies))
        p99.add(quantile(mine.latencies, 0.99), quantile(other.latencies, 0.99))
    return [mean, p99]


def in_turns(device: Device, load: Load) -> Iterator[tuple[Offered, Offered]]:
    """Each run's outcome, ours and theirs; who goes first changes from run to run."""
    for run, offered in enumerate(load.offers):
        outcome: dict[str, Offered] = {}
        for system in ("ours", "theirs") if run % 2 else ("theirs", "ours"):
            server = ours(device.pipeline) if system == "ours" else whole_batches(device.pipeline, load.setting)
            with server as submit:
                outcome[system] = offer(submit, *offered)
        late_ms = 1000 * max(one.send_lag_s for one in outcome.values())  # much of it: this machine is busy
        tell(f"{device.name}: run {run + 1} of {len(load.offers)}, {len(offered[0])} requests, {late_ms:.1f} ms late")
        yield outcome["ours"], outcome["theirs"]


def saturated(device: Device, requests: Sequence[Generation]) -> tuple[Setting, float]:
    """The batch size that makes most requests a second when all come at once, and how many that is."""
    at_once = np.zeros(len(requests))
    found = ranked(device.pipeline, device.batches, [0.0], [(requests, at_once)], lambda _, latencies: latencies.max())
    rates = {}
    for setting in worth_a_run(found):
        with whole_batches(device.pipeline, setting) as submit:
            rates[setting] = len(requests) / offer_all(submit, requests).makespan_s
    best = max(rates, key=lambda setting: rates[setting])
    tell(f"{device.name}: the baseline's capacity is {rates[best]:.3g} requests/s, {best}")
    return best, rates[best]


def tuned(device: Device, offers: list[tuple[list[Generation], Seconds]], score: Score, what: str) -> Load:
    """The baseline's best setting for these arrivals."""
    alone_s = np.mean([batch_seconds(device.pipeline, [Picture(one, 0)]) for one in offers[0][0]])
    waits = [float(share * alone_s) for share in WAITS]
    found = ranked(device.pipeline, device.batches, waits, offers, score)
    scores = {}
    for setting in worth_a_run(found):
        with whole_batches(device.pipeline, setting) as submit:
            scores[setting] = score(offers[0][0], offer(submit, *offers[0]).latencies)
    best = min(scores, key=lambda setting: scores[setting])
    tell(f"{device.name}: for {what} the baseline takes {best}")
    return Load(offers, best)


def worth_a_run(found: Sequence[tuple[float, Setting]]) -> list[Setting]:
    """The few best by simulation, without those that it cannot tell apart from a better one."""
    distinct: dict[float, Setting] = {}
    for score, setting in found:
        distinct.setdefault(round(score, 9), setting)
    return [setting for score, setting in list(distinct.items())[:CONFIRMED] if score <= CLOSE * found[0][0]]


def quantile(values: Seconds, share: float) -> float:
    return float(np.quantile(values, share))


def demo_pipeline(batch_buckets: Sequence[int] = (1, 2, 4), max_steps: int = 100) -> Verbs:
    """The bundled model, by default as serve_config.yaml has it, on whatever JAX finds here."""
    from app.diffusion.pipeline import Pipeline

    tell(f"demo model: loading, buckets {', '.join(map(str, batch_buckets))}")
    pipeline = Pipeline.load(
        str(ROOT / "assets" / "demo-model"),
        sizes=[(128, 128)],
        batch_buckets=batch_buckets,
        max_steps=max_steps,
        programs=ROOT / ".cache" / "programs",
    )
    pipeline.warmup()
    return pipeline


def demo_device() -> Device:
    return Device(
        "demo model",
        demo_pipeline(),
        lambda: demo_pipeline([PREDECESSOR.batch]),
        steps=10,
        guidance_scale=GUIDANCE_SCALE,
        equal={0.3: 24, 0.6: 48, 0.9: 72},
        rush=64,
        mixed=64,
    )


def paced_device(pace: Pace, name: str = "paced as a TPU host") -> Device:
    """Unguided equal requests, so that eight of them are what eight chips can do in the time of one."""
    return Device(
        name,
        PacedPipeline(pace, batch_buckets=BATCHES),
        lambda: PacedPipeline(pace, batch_buckets=[PREDECESSOR.batch]),
        steps=20,
        guidance_scale=1.0,
        equal=PACED_EQUAL,
        rush=64,
        mixed=48,
    )


def tell(what: str) -> None:
    console.print(f"[dim]{time.strftime('%H:%M:%S')}[/dim] {what}", highlight=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("demo", "paced", "both"), default="both", help="(%(default)s)")
    parser.add_argument("--workload", choices=("lone", "equal", "mixed", "all"), default="all", help="(%(default)s)")
    parser.add_argument("--runs", type=int, default=5, help="of both systems (%(default)s)")
    parser.add_argument("--requests", type=float, default=1.0, help="factor to the number of requests (%(default)s)")
    parser.add_argument("--steps", type=int, help="of the lone and the equal requests (10 demo, 20 paced)")
    parser.add_argument("--quick", action="store_true", help="one run of half the requests, to see that it works")
    parser.add_argument("--pace-ms", type=float, default=10.0, help="of a step on the paced device (%(default)s)")
    args = parser.parse_args()
    here = machine()  # before it is busy with this
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

    complete = not args.quick and (args.device, args.workload) == ("both", "all")
    title = "Step-level batching against whole batches: ours over theirs"
    return conclude("engine", title, figures, here, vars(args), complete)


if __name__ == "__main__":
    sys.exit(main())
