"""Drives an engine without threads, tick by tick on a virtual clock."""

import json
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

from app.engine.engine import Engine
from app.engine.request import Generated
from app.engine.virtual import Pixels
from app.types import Generation
from tests.fake_pipeline import FakePipeline, Seconds, flat


def wide(step_time: Seconds = flat, **options: Any) -> FakePipeline:
    """A pipeline in which up to four guided images share a step, and eight have slots."""
    return FakePipeline(step_time=step_time, row_buckets=(1, 2, 4, 8), num_slots=8, **options)


class Fetcher(Executor):
    """In place of the fetching thread: jobs wait, in order, until a test runs them."""

    def __init__(self) -> None:
        self.pending: deque[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]] = deque()

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.pending.append((future, function, arguments))
        return future

    def next_at(self) -> float:
        """When the pixels of the first job are ready, or the images that it exports."""
        for argument in self.pending[0][2]:
            if isinstance(argument, Pixels):
                return argument.ready_at
            if isinstance(argument, dict):
                return max((exported.ready_at for exported in argument.values()), default=0.0)
        raise AssertionError(f"nothing to wait for in {self.pending[0]}")

    def run(self) -> None:
        """Runs the first job."""
        future, function, arguments = self.pending.popleft()
        future.set_result(function(*arguments))  # the engine must handle whatever its jobs raise


class Driver:
    """An engine, its pipeline, their clock, and the fetching thread's jobs."""

    def __init__(self, fake: FakePipeline | None = None, *, max_waiting: int = 100, **options: Any):
        self.fake = fake or FakePipeline()
        self.clock = self.fake.clock
        self.fetcher = Fetcher()
        self.accepted = 0
        self.owners: dict[int, Future[Generated]] = {}  # by seed
        self.fake.abandoned = lambda seed: self.owners[seed].done()
        self.engine = Engine(self.fake, max_waiting=max_waiting, clock=self.clock, fetcher=self.fetcher, **options)

    def submit(self, generation: Generation, **options: Any) -> "Future[Generated]":
        future = self.engine.submit(generation, **options)
        self.accepted += 1
        self.owners.update(dict.fromkeys(range(generation.seed, generation.seed + generation.n), future))
        return future

    def tick(self) -> bool:
        """One tick of the engine, and the jobs of the fetching thread as far as the device has come."""
        busy = self.engine.tick()
        if not busy and self.fetcher.pending:
            self.clock.reach(self.fetcher.next_at())
        self.fetch()
        assert not self.fake.broken, self.fake.broken
        return busy or bool(self.fetcher.pending)

    def fetch(self) -> None:
        while self.fetcher.pending and self.fetcher.next_at() <= self.clock():
            self.fetcher.run()

    def finish(self, *futures: "Future[Generated]") -> list[Generated]:
        """Ticks until all are done; returns their results."""
        for _ in range(100_000):
            if all(future.done() for future in futures):
                return [future.result(0) for future in futures]
            self.tick()
        raise AssertionError("the engine never gets there")

    def idle(self) -> None:
        """Ticks until there is nothing left to do."""
        for _ in range(100_000):
            if not self.tick():
                return
        raise AssertionError("the engine never gets there")

    def check(self) -> None:
        """Checks what must hold of the statistics at every moment."""
        stats = self.engine.stats()
        sizes = stats["sizes"].values()
        unfinished = sum(not future.done() for future in set(self.owners.values()))
        assert stats["unfinished"] == unfinished, stats
        assert 0 <= stats["waiting"] <= unfinished, stats
        assert stats["active_slots"] == sum(size["active"] for size in sizes), stats
        assert all(0 <= size["active"] <= self.fake.num_slots for size in sizes), stats
        assert stats["num_slots"] == len(sizes) * self.fake.num_slots, stats
        ended = sum(stats["requests"][outcome] for outcome in ("completed", "cancelled", "moved", "failed"))
        assert ended + unfinished == self.accepted, stats
        assert 0 < stats["bucket_fill"] <= 1, stats
        assert stats["backlog_s"] >= 0 and stats["device_busy_s"] >= 0, stats
        json.dumps(stats)

    def until(self, moment: float) -> None:
        """Ticks until the clock shows the moment."""
        while self.clock() < moment:
            if not self.tick():
                self.clock.reach(moment)
