"""The engine itself on a clock that nobody waits for: a pipeline whose verbs take as long as a table says, and a load
that arrives in virtual time. What app/engine/engine.py would do with each request, it does here, in a fraction of
the time.

Knows nothing of TPUs. What the host spends, on HTTP, on dispatches and on making files, is not in it.
"""

import heapq
import itertools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from app.diffusion.samplers import HISTORY, SamplerTable
from app.engine.engine import Engine
from app.engine.errors import QueueFull
from app.engine.request import Generated
from app.types import ActiveSlot, Generation

Size = tuple[int, int]
GUIDED = 4.0


@dataclass(frozen=True)
class Timings:
    """Seconds of each program of one size, by rows and by pictures; and how often a request asks the UNet."""

    size: Size
    step_s: Mapping[int, float]
    decode_s: Mapping[int, float]
    encode_s: float = 0.0  # of one text
    slots: int | None = None  # None: twice what the largest bucket holds, as app/diffusion/pipeline.py has them


@dataclass(frozen=True)
class Load:
    """Requests for one picture each, and when they come, in seconds."""

    arrivals: npt.NDArray[np.float64]
    evaluations: int  # of the UNet, for each picture
    guided: bool = True


@dataclass(frozen=True)
class Simulated:
    latencies: npt.NDArray[np.float64]  # of those that were answered, in the order of their arrival
    refused: int  # by a full queue
    makespan_s: float

    def percentile(self, share: float) -> float:
        return float(np.percentile(self.latencies, share)) if len(self.latencies) else float("nan")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def reach(self, moment: float) -> None:
        self.now = max(self.now, moment)


class TimedPipeline:
    """The verbs of app/engine/engine.py over one device's timeline."""

    def __init__(self, timings: Timings, clock: Clock):
        self.timings, self.clock = timings, clock
        self.sizes: tuple[Size, ...] = (timings.size,)
        self.row_buckets = tuple(sorted(timings.step_s))
        self.decode_buckets = tuple(sorted(timings.decode_s))
        self.default_sampler = "any"
        self.num_slots = timings.slots or self.row_buckets[-1]
        self.step_s: Mapping[tuple[Size, int], float] = {
            (timings.size, rows): seconds for rows, seconds in timings.step_s.items()
        }
        self.decode_s: Mapping[tuple[Size, int], float] = {
            (timings.size, images): seconds for images, seconds in timings.decode_s.items()
        }
        self.idle_at = 0.0

    def table(self, sampler: str | None, num_inference_steps: int) -> SamplerTable:
        return table_of(num_inference_steps)

    def empty_state(self, size: Size) -> None:
        return None

    def encode(self, texts: Sequence[str]) -> list["Text"]:
        self.occupy(len(texts) * self.timings.encode_s)
        return [Text() for _ in texts]

    def insert(
        self,
        state: None,
        slot: int,
        prompt: "Text",
        negative_prompt: "Text",
        table: SamplerTable,
        guidance_scale: float,
        seed: int,
    ) -> None:
        return None

    def step(self, state: None, active: Sequence[ActiveSlot], count: int) -> tuple[None, float]:
        rows = smallest(self.row_buckets, sum(lane.rows for lane in active))
        return None, self.occupy(count * self.timings.step_s[rows])

    def decode(self, state: None, slots: Sequence[int]) -> "Pixels":
        images = smallest(self.decode_buckets, len(slots))
        return Pixels(images, self.occupy(self.timings.decode_s[images]))

    def preview(self, state: None, slot: int) -> "Pixels":
        return Pixels(1, self.occupy(0.0))

    def wait(self, done: float) -> None:
        self.clock.reach(done)

    def occupy(self, seconds: float) -> float:
        """Queues so much work; returns when it will be done."""
        self.idle_at = max(self.idle_at, self.clock.now) + seconds
        return self.idle_at


@dataclass(frozen=True)
class Text:
    truncated: bool = False


@dataclass(frozen=True)
class Pixels:
    images: int
    ready_at: float

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[np.uint8]:
        return np.zeros((self.images, 1, 1, 3), np.uint8)


class Fetcher(Executor):
    """In place of the thread that fetches pixels: does what it is given once the clock has come so far."""

    def __init__(self, clock: Clock):
        self.clock = clock
        self.numbers = itertools.count()
        self.due: list[tuple[float, int, Callable[[], Any]]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        pixels = args[-1]
        heapq.heappush(self.due, (pixels.ready_at, next(self.numbers), lambda: fn(*args, **kwargs)))
        return Future()

    def run_until(self, moment: float) -> None:
        now = self.clock.now
        while self.due and self.due[0][0] <= moment:
            self.clock.now, _, fetch = heapq.heappop(self.due)
            fetch()
        self.clock.now = now

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        pass


def simulate(
    timings: Timings, load: Load, *, gain: float, max_waiting: int, images_at_once: int | None = None
) -> Simulated:
    """One replica under the load."""
    clock = Clock()
    fetcher, pipeline = Fetcher(clock), TimedPipeline(timings, clock)
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
                future = engine.submit(request(timings.size, index, load))
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


def request(size: Size, number: int, load: Load) -> Generation:
    return Generation(
        prompt=f"number {number}",  # nobody's prompt is known already
        negative_prompt="",
        width=size[0],
        height=size[1],
        num_inference_steps=load.evaluations,
        guidance_scale=GUIDED if load.guided else 1.0,
        seed=number,
        sampler=None,
        n=1,
    )


@lru_cache
def table_of(evaluations: int) -> SamplerTable:
    """Of the right length; nothing here reads what stands in it."""
    columns = {name: np.zeros(evaluations, np.float32) for name in ("timesteps", "p", "q", "a", "n")}
    b, preview = np.zeros((evaluations, HISTORY), np.float32), np.zeros((evaluations, 2), np.float32)
    return SamplerTable(**columns, b=b, preview=preview, initial_scale=1.0)


def smallest(buckets: Sequence[int], wanted: int) -> int:
    return next(bucket for bucket in buckets if bucket >= wanted)
