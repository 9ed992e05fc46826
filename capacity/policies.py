"""Autoscaling policies over a simulated cluster, side by side: goodput, waits and what the replicas cost.

    python -m capacity.policies                       # three traces: a step, a day's wave with noise, bursts
    python -m capacity.policies --trace load/requests.jsonl

The figures are means over several runs.

A trace is the requests.jsonl of a load test (loadtest/records.py); each request is replayed when it was sent. The
policies are ours (app/serving/autoscaling.py) and Serve's default one, which compares requests with a target. All is
simulated; the devices take as long as the paced stand-in of benchmarks/paced.py.
"""

import json
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from app.engine.virtual import VirtualClock
from app.serving.autoscaling import Load, Memory, Rule, decide
from app.types import Generation
from benchmarks.load import MIXED_KINDS, request
from benchmarks.paced import Pace, PacedPipeline
from capacity.check_report import wide_console
from capacity.cluster_simulation import Arrival, Cluster, Outcome, Routing
from cluster.cli import Parser, UsageError, run_command
from loadtest.arrivals import Span, poisson, through, with_bursts
from loadtest.records import entries

SIZE = (2, 2)  # pixels take no time
BUCKETS = (1, 2, 4, 8)
TICK_S = 1.0  # between two decisions
LOOK_BACK_S = 10.0  # over which Serve averages what replicas report
ARRIVALS_S = 20.0


class Policy(Protocol):
    def __call__(self, cluster: Cluster, now: float) -> int: ...


class Ours:
    """The rule of app/serving/autoscaling.py."""

    def __init__(self, rule: Rule, most: int) -> None:
        self.rule, self.most, self.memory = rule, most, Memory()

    def __call__(self, cluster: Cluster, now: float) -> int:
        backlog_s = sum(replica.engine.stats()["backlog_s"] for replica in cluster.replicas.values())
        backlog_s += cluster.router.queue.total_s()
        arrived_s = sum(device_s for at, device_s in cluster.arrived if at > now - ARRIVALS_S)
        load = Load(backlog_s, arrived_s / ARRIVALS_S, len(cluster.running()), cluster.start_s)
        return decide(self.rule, load, self.memory, now, 1, self.most)[0]


class Default:
    """Serve's default: as many replicas as requests over the target, after the load has called for it for a while."""

    def __init__(self, target: float, up_s: float, down_s: float, most: int) -> None:
        self.target, self.up_s, self.down_s, self.most = target, up_s, down_s, most
        self.seen: deque[tuple[float, int]] = deque()
        self.above_since = self.below_since = math.inf

    def __call__(self, cluster: Cluster, now: float) -> int:
        requests = sum(replica.requests for replica in cluster.replicas.values()) + len(cluster.router.queue)
        self.seen.append((now, requests))
        while self.seen[0][0] < now - LOOK_BACK_S:
            self.seen.popleft()
        mean = sum(count for _, count in self.seen) / len(self.seen)
        wanted = min(max(1, math.ceil(mean / self.target)), self.most)
        current = cluster.wanted
        self.above_since = min(self.above_since, now) if wanted > current else math.inf
        self.below_since = min(self.below_since, now) if wanted < current else math.inf
        if now - self.above_since >= self.up_s or now - self.below_since >= self.down_s:
            self.above_since = self.below_since = math.inf
            return wanted
        return current


@dataclass(frozen=True)
class Result:
    over: float  # share of the requests over the objective
    wait_s: float  # mean, in the ingress
    p95_s: float  # of the latencies
    replica_hours: float
    most: int  # replicas at a time


def simulate(
    arrivals: Sequence[Arrival],
    policy: Policy,
    *,
    pace: Pace,
    start_s: float,
    objective_s: float,
    routing: Routing = "book",
) -> Result:
    """Replays the arrivals. `objective_s`: the longest latency beyond what a request takes alone."""

    def device(clock: VirtualClock) -> PacedPipeline:
        return PacedPipeline(pace, batch_buckets=BUCKETS, size=SIZE, clock=clock)

    cluster = Cluster(device, 1, routing=routing, start_s=start_s)
    most = 1

    def tick() -> None:
        nonlocal most
        cluster.scale(policy(cluster, cluster.now))
        most = max(most, len(cluster.replicas))
        if cluster.unfinished:
            cluster.at(cluster.now + TICK_S, tick)

    cluster.at(0.0, tick)
    outcome: Outcome = cluster.run(arrivals)
    alone = np.array([alone_s(arrival.generation, pace) for arrival in arrivals])
    waits = outcome.latencies - alone
    return Result(
        float(np.mean(waits > objective_s)),
        float(outcome.waits.mean()),
        float(np.quantile(outcome.latencies, 0.95)),
        outcome.replica_s / 3600,
        most,
    )


def mean_of(results: Sequence[Result]) -> Result:
    over, wait_s, p95_s, replica_hours = (
        float(np.mean([getattr(result, name) for result in results]))
        for name in ("over", "wait_s", "p95_s", "replica_hours")
    )
    return Result(over, wait_s, p95_s, replica_hours, max(result.most for result in results))


def alone_s(generation: Generation, pace: Pace) -> float:
    rows = generation.n * generation.rows
    return generation.num_inference_steps * pace.step(rows) + pace.decode(generation.n)


def device_s(generation: Generation, pace: Pace) -> float:
    return generation.n * generation.rows * generation.num_inference_steps * pace.step_s / pace.chips


def traces(pace: Pace, run: int = 0, scale: float = 1.0) -> dict[str, list[Arrival]]:
    """A step up, a day's wave with noise in half an hour, and bursts. Rates are in replicas' worth of work.

    Each `run` draws other arrivals. One alone says little: what chance has left running decides how a step begins.
    """
    mean_s = float(
        np.mean([device_s(request(SIZE, 0, steps=s, guidance_scale=g, n=n), pace) for s, g, n in MIXED_KINDS])
    )
    rate = scale / mean_s  # requests a second that keep a replica busy
    step = [Span(0.6 * rate, 0.6 * rate, 300), Span(3 * rate, 3 * rate, 600), Span(0.6 * rate, 0.6 * rate, 300)]
    noise = np.random.default_rng(5)
    levels = [2 - 1.5 * math.cos(2 * math.pi * i / 30) for i in range(31)]
    levels = [max(0.2, level * float(noise.uniform(0.8, 1.2))) for level in levels]
    wave = [Span(first * rate, last * rate, 60) for first, last in zip(levels, levels[1:], strict=False)]
    calm = [Span(0.8 * rate, 0.8 * rate, 1200)]
    bursts = [(float(at), round(60 * rate)) for at in (200, 500, 800)]

    def drawn(spans: Sequence[Span], seed: int, extra: Sequence[tuple[float, int]] = ()) -> list[Arrival]:
        rng = np.random.default_rng([run, seed])
        count = round(sum(span.count for span in spans))
        times = through(spans, poisson(count, rng))
        times = with_bursts(times[times > 0], extra)
        kinds = [MIXED_KINDS[i] for i in rng.integers(len(MIXED_KINDS), size=len(times))]
        return [
            Arrival(float(at), request(SIZE, seed, steps=steps, guidance_scale=scale, n=n))
            for seed, (at, (steps, scale, n)) in enumerate(zip(times, kinds, strict=True))
        ]

    return {"step up": drawn(step, 1), "wave": drawn(wave, 2), "bursts": drawn(calm, 3, bursts)}


def recorded(path: Path) -> list[Arrival]:
    """The requests of a load test, as they were to be sent."""
    arrivals = []
    for number, entry in enumerate(entries(path)):
        fields: dict[str, Any] = entry.get("request", {})
        arrivals.append(
            Arrival(
                float(entry["intended"]),
                request(
                    SIZE,
                    number,
                    steps=int(fields.get("num_inference_steps", 20)),
                    guidance_scale=float(fields.get("guidance_scale", 4.0)),
                    n=int(fields.get("n", 1)),
                ),
            )
        )
    if not arrivals:
        raise UsageError(f"TRACE must be the requests.jsonl of a load test, and {path} has no requests.")
    return sorted(arrivals, key=lambda arrival: arrival.at)


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--trace", type=Path, help="requests.jsonl of a load test, in place of the three traces")
    parser.add_argument("--step-ms", type=float, default=100.0, help="of a step of one row (%(default)s)")
    parser.add_argument("--chips", type=int, default=4, help="rows that take no longer than one (%(default)s)")
    parser.add_argument("--start", type=float, default=90.0, help="seconds of a node and a replica (%(default)s)")
    parser.add_argument("--objective", type=float, default=10.0, help="seconds that a request may wait (%(default)s)")
    parser.add_argument("--most", type=int, default=8, help="replicas (%(default)s)")
    parser.add_argument("--hold", type=float, default=180.0, help="hold_s of our policy (%(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="of each trace, with other arrivals (%(default)s)")
    parser.add_argument("--policy", action="append", help="of the table; only this one, may be repeated")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    args = parser.parse_args()
    pace = Pace(chips=args.chips, step_s=args.step_ms / 1000)
    loads = [{str(args.trace): recorded(args.trace)}] if args.trace else [traces(pace, i) for i in range(args.runs)]
    policies: dict[str, Callable[[], tuple[Policy, Routing]]] = {
        "predicted wait": lambda: (Ours(Rule(args.objective, args.hold, args.start), args.most), "book"),
        "Serve's defaults": lambda: (Default(2, 30.0, 600.0, args.most), "serve"),
        **{
            f"Serve, target {target}": lambda target=target: (Default(target, 10.0, 300.0, args.most), "serve")  # type: ignore[misc]
            for target in (2, 4, 8)
        },
    }
    if unknown := {*(args.policy or ())} - policies.keys():
        raise UsageError(f"--policy must be one of {', '.join(policies)}, got {', '.join(unknown)}.")
    policies = {name: policy for name, policy in policies.items() if name in (args.policy or policies)}
    table = Table(title="Simulated", title_justify="left", box=SIMPLE_HEAD)
    for column in ("trace", "policy", "over objective", "mean wait s", "p95 s", "replica-hours", "chip-hours", "most"):
        table.add_column(column, justify="left" if column in ("trace", "policy") else "right")
    figures = []
    for name in loads[0]:
        for title, make in policies.items():
            results = []
            for arrivals in (load[name] for load in loads):
                policy, routing = make()
                results.append(
                    simulate(
                        arrivals, policy, pace=pace, start_s=args.start, objective_s=args.objective, routing=routing
                    )
                )
            result = mean_of(results)
            chips = result.replica_hours * args.chips
            row = (f"{result.over:.1%}", f"{result.wait_s:.2f}", f"{result.p95_s:.1f}", f"{result.replica_hours:.2f}")
            table.add_row(name, title, *row, f"{chips:.2f}", str(result.most))
            figures.append({"trace": name, "policy": title, **vars(result)})
    wide_console().print(table)
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    run_command(main)
