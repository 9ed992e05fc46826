"""The engine itself on a virtual clock, with a device that takes as long as a table says, under a simulated load.

What app/engine/engine.py would do with each request, it does here, but no real time passes. Knows nothing of TPUs. The
work of the host is not included: HTTP, dispatches, making files.
"""

import heapq
import itertools
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from app.engine.engine import Engine
from app.engine.errors import QueueFull
from app.engine.request import Generated
from app.engine.virtual import VirtualClock, VirtualPipeline
from app.types import Generation, Size

GUIDED = 4.0
SIZE: Size = (2, 2)  # of the simulated images, whatever size the timings are of: their pixels take no time


@dataclass(frozen=True)
class Timings:
    """Seconds of each program of one size, by rows and by images."""

    step_s: Mapping[int, float]
    decode_s: Mapping[int, float]
    encode_s: float = 0.0  # of one text
    launch_s: Mapping[int, float] | None = None  # what a dispatch of so many rows adds to its steps; None: nothing
    slots: int | None = None  # None: as many as the largest bucket has rows, as app/diffusion/pipeline.py has them


@dataclass(frozen=True)
class Load:
    """Requests for one image each, and when they arrive, in seconds."""

    arrivals: npt.NDArray[np.float64]
    evaluations: int  # of the denoiser, for each image
    guided: bool = True


@dataclass(frozen=True)
class Simulated:
    latencies: npt.NDArray[np.float64]  # of the requests that were answered, in the order of their arrival
    refused: int  # by a full queue
    makespan_s: float

    def percentile(self, share: float) -> float:
        return float(np.percentile(self.latencies, share)) if len(self.latencies) else float("nan")


class Fetcher(Executor):
    """In place of the thread that fetches pixels: runs each job once the clock has come to its pixels."""

    def __init__(self, clock: VirtualClock):
        self.clock = clock
        self.numbers = itertools.count()
        self.due: list[tuple[float, int, Callable[[], Any]]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        last = args[-1]  # pixels, or the images that are exported
        parts = [*last.values()] if isinstance(last, dict) else [last]
        ready_at = max((part.ready_at for part in parts), default=self.clock.now)
        heapq.heappush(self.due, (ready_at, next(self.numbers), lambda: fn(*args, **kwargs)))
        return Future()

    def run_until(self, moment: float) -> None:
        now = self.clock.now
        while self.due and self.due[0][0] <= moment:
            self.clock.now, _, fetch = heapq.heappop(self.due)
            fetch()
        self.clock.now = now

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        pass


def pipeline_of(timings: Timings, clock: VirtualClock) -> VirtualPipeline:
    return VirtualPipeline(
        {(SIZE, rows): seconds for rows, seconds in timings.step_s.items()},
        {(SIZE, images): seconds for images, seconds in timings.decode_s.items()},
        num_slots=timings.slots or max(timings.step_s),
        encode_s=timings.encode_s,
        launch_s={(SIZE, rows): seconds for rows, seconds in timings.launch_s.items()} if timings.launch_s else 0.0,
        clock=clock,
    )


def simulate(
    timings: Timings, load: Load, *, gain: float, max_waiting: int, images_at_once: int | None = None
) -> Simulated:
    """Runs one replica under the load."""
    pipeline = pipeline_of(timings, VirtualClock())
    return simulate_on(pipeline, load, gain=gain, max_waiting=max_waiting, images_at_once=images_at_once)


def simulate_on(
    pipeline: VirtualPipeline, load: Load, *, gain: float, max_waiting: int, images_at_once: int | None = None
) -> Simulated:
    """Likewise on a pipeline with a virtual clock, whose arrivals count from now."""
    clock = pipeline.clock
    assert isinstance(clock, VirtualClock)
    fetcher = Fetcher(clock)
    engine = Engine(
        pipeline, max_waiting=max_waiting, images_at_once=images_at_once, gain=gain, clock=clock, fetcher=fetcher
    )
    latencies = np.full(len(load.arrivals), np.nan)
    refused = 0

    def arrive_until(moment: float, index: int) -> int:
        nonlocal refused
        now = clock.now
        while index < len(load.arrivals) and load.arrivals[index] <= moment:
            clock.now = float(load.arrivals[index])
            fetcher.run_until(clock.now)
            try:
                future = engine.submit(request(index, load))
                future.add_done_callback(lambda future, index=index: answered(future, index))  # type: ignore[misc]
            except QueueFull:
                refused += 1
            index += 1
        clock.now = now
        return index

    def answered(future: "Future[Generated]", index: int) -> None:
        future.result()
        latencies[index] = clock.now - load.arrivals[index]

    arrived = 0
    while True:
        fetcher.run_until(clock.now)
        arrived = arrive_until(clock.now, arrived)
        if engine.tick():
            clock.now += max(0.0, engine.pause_s())
        elif arrived < len(load.arrivals):
            clock.reach(float(load.arrivals[arrived]))
        else:
            break
    fetcher.run_until(float("inf"))
    return Simulated(latencies[~np.isnan(latencies)], refused, pipeline.idle_at)


def request(number: int, load: Load) -> Generation:
    return Generation(
        prompt=f"number {number}",  # none is in the prompt cache
        negative_prompt="",
        width=SIZE[0],
        height=SIZE[1],
        num_inference_steps=load.evaluations,
        guidance_scale=GUIDED if load.guided else 1.0,
        seed=number,
        sampler=None,
        n=1,
    )
