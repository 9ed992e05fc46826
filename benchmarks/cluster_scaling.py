"""What a backlog takes when replicas start beside the one that has it, and a trace with the number of replicas free.

Both over HTTP, with paced replicas, ours and Serve's own rules in turn; `benchmarks/cluster.py` has the two systems.
Backlog: 200 mixed requests come at once to one replica, and three more start. What counts is the time from when they
run until the last answer.

Trace: the day's wave of `python -m capacity.policies` with all its times a fifth and 0.7 of its rates, and at most four
replicas, each up after 18 s. Ours is the policy of predicted waits, Serve's own has a target of requests. Over the
objective is what waits longer than 2 s beyond what it takes alone.
"""

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cluster_load import SYSTEMS, LocalServe, in_turn, local_serve, offer, replicas_of
from benchmarks.figures import Figure
from benchmarks.load import mixed_requests
from benchmarks.paced import Pace
from benchmarks.paced_cluster import SIZE
from benchmarks.report import log
from capacity.policies import alone_s, traces
from loadtest.arrivals import Seconds

REQUESTS = 200
REPLICAS = 4
FASTER = 5  # than the simulated trace
SCALE = 0.7  # of the simulated rates, so that four replicas suffice at its height
OBJECTIVE_S, START_S, HOLD_S = 10 / FASTER, 90 / FASTER, 180 / FASTER
TARGET = 4  # of the requests of a replica: with the simulated wave it costs what ours does
POLL_S = 0.25
BOUNDS = {"min_replicas": 1, "max_replicas": REPLICAS, "metrics_interval_s": 1, "look_back_period_s": 10 / FASTER}
NO_DELAYS = {"upscale_delay_s": 0, "downscale_delay_s": 0}  # the policy decides when
SCALING: dict[str, dict[str, Any]] = {
    "ours": BOUNDS
    | NO_DELAYS
    | {
        "policy": {
            "policy_function": "app.serving.autoscaling:PredictedWait",
            "policy_kwargs": {"objective_s": OBJECTIVE_S, "hold_s": HOLD_S, "start_s": START_S},
        },
    },
    "serve": BOUNDS
    | {"target_ongoing_requests": TARGET, "upscale_delay_s": 10 / FASTER, "downscale_delay_s": 300 / FASTER},
}


class AllAtASignal:
    """An autoscaling policy: one replica, and all of them once a file is there."""

    def __init__(self, signal: str) -> None:
        self.signal = Path(signal)

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        return REPLICAS if self.signal.exists() else 1, {}


def backlog(pace: Pace, runs: int) -> Figure:
    figure = Figure("paced hosts of four chips", "backlog of 200, 1 to 4 replicas", "s to drain", 0.35)
    for run in range(runs):
        seconds = {}
        for system in in_turn(run):
            with local_serve() as place:
                left, seconds[system] = drained(place, system, pace, run)
            log(f"backlog, {system}, run {run + 1} of {runs}: {seconds[system]:.1f} s for the last {left}")
        figure.add(seconds["ours"], seconds["serve"])
    return figure


def drained(place: LocalServe, system: str, pace: Pace, run: int) -> tuple[int, float]:
    """Requests that are left when all replicas run, and seconds from then to the last answer."""
    signal = place.folder / "start-the-others"
    policy = {"policy_function": "benchmarks.cluster_scaling:AllAtASignal", "policy_kwargs": {"signal": str(signal)}}
    url = place.deploy(system, pace, BOUNDS | NO_DELAYS | {"policy": policy})
    requests = mixed_requests(REQUESTS, SIZE, np.random.default_rng([run, 4]))

    def start_others() -> None:
        signal.touch()
        while replicas_of(system)[1] < REPLICAS:
            time.sleep(POLL_S)

    async def load() -> tuple[Seconds, float]:
        began = time.monotonic()
        answers = asyncio.ensure_future(offer(url, requests, np.zeros(REQUESTS)))
        await asyncio.sleep(1.0)
        await asyncio.to_thread(start_others)
        ready = time.monotonic() - began
        return await answers, ready

    latencies, ready = asyncio.run(load())
    return int(np.sum(latencies > ready)), float(latencies.max() - ready)


def wave(pace: Pace, runs: int) -> list[Figure]:
    """The figures without a bar say what both cost."""
    figures = [
        Figure("paced hosts of four chips", "a day's wave", name, bar)
        for name, bar in (("share over the objective", 0.5), ("replica-hours", None), ("mean latency s", None))
    ]
    for run in range(runs):
        arrivals = traces(replace(pace, step_s=pace.step_s * FASTER), run, SCALE)["wave"]
        at = np.array([arrival.at for arrival in arrivals]) / FASTER
        requests = [arrival.generation for arrival in arrivals]
        alone = np.array([alone_s(generation, pace) for generation in requests])
        outcomes = {}
        for system in in_turn(run):
            with local_serve() as place:
                url = place.deploy(system, pace, SCALING[system], START_S)
                with counted(system) as replica_s:
                    latencies = asyncio.run(offer(url, requests, at))
            over = float(np.mean(latencies - alone > OBJECTIVE_S))
            outcomes[system] = over, sum(replica_s) / 3600, float(latencies.mean())
            log(f"wave, {system}, run {run + 1} of {runs}: {over:.1%} over, {sum(replica_s):.0f} replica-seconds")
        for figure, ours, baseline in zip(figures, *(outcomes[system] for system in SYSTEMS), strict=True):
            figure.add(ours, baseline)
    return figures


@contextmanager
def counted(system: str) -> Iterator[list[float]]:
    """Adds up the seconds of all replicas, from when their start begins, as a node costs from then on."""
    seconds: list[float] = []
    over = threading.Event()

    def count() -> None:
        before = time.monotonic()
        while not over.wait(POLL_S):
            now = time.monotonic()
            seconds.append(replicas_of(system)[0] * (now - before))
            before = now

    thread = threading.Thread(target=count)
    thread.start()
    try:
        yield seconds
    finally:
        over.set()
        thread.join()
