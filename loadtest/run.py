"""The run itself: sends every request at its time and writes down what came of it. Knows nothing of reports."""

import asyncio
import gc
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from loadtest.client import Client
from loadtest.plan import Planned
from loadtest.records import Journal, Record
from loadtest.scenario import Closed, Scenario

SPIN_S = 0.002  # a timer of the event loop may be a millisecond late, so the last of the way is waited awake
LONGEST_RETRY_S = 30.0  # that a client waits after it was refused
HEAD_START_S = 0.2  # between the decision to begin and the first request


@dataclass
class Clock:
    """Seconds of the run, which go on where a run that is resumed had been interrupted."""

    offset: float = 0.0
    began: float = 0.0
    epoch: float = 0.0  # the same moment in Unix time

    def start(self) -> None:
        self.began, self.epoch = time.perf_counter() + HEAD_START_S, time.time() + HEAD_START_S

    def __call__(self) -> float:
        return time.perf_counter() - self.began + self.offset

    async def until(self, moment: float) -> None:
        """Yields at least once, so that what was just begun runs even where everything is late."""
        if (left := moment - self()) > SPIN_S:
            await asyncio.sleep(left - SPIN_S)
        await asyncio.sleep(0)
        while self() < moment:  # noqa: ASYNC110 -- everything else goes on meanwhile
            await asyncio.sleep(0)


@dataclass
class Progress:
    """What the display shows."""

    planned: int | None  # None: as many as the clients get done in their time
    offered: int = 0
    records: list[Record] = field(default_factory=list)

    @property
    def in_flight(self) -> int:
        return self.offered - len(self.records)


@dataclass
class Load:
    scenario: Scenario
    client: Client
    clock: Clock
    journal: Journal
    progress: Progress
    stop: asyncio.Event

    async def run(self, requests: Sequence[Planned]) -> None:
        """Until all have been answered, or the clients' time is over, or somebody stops it: then what is under way is
        dropped and not recorded, so that a resumed run sends it again."""
        gc.collect()
        gc.freeze()  # the plan is never garbage, so looking through it again and again would only cost time
        match self.scenario.arrivals:
            case Closed(concurrency=concurrency, duration_s=duration_s):
                work = self.closed(requests, concurrency, duration_s)
            case _:
                work = self.open(requests)
        working = asyncio.ensure_future(work)
        stopping = asyncio.ensure_future(self.stop.wait())
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not working.done():
            working.cancel()
        try:
            await working
        except asyncio.CancelledError:
            if not self.stop.is_set():
                raise
        finally:
            gc.unfreeze()

    async def open(self, requests: Iterable[Planned]) -> None:
        async with asyncio.TaskGroup() as tasks:
            for one in requests:
                await self.clock.until(one.at)
                if self.progress.in_flight >= self.scenario.max_in_flight:
                    self.refuse(one)
                else:
                    self.progress.offered += 1
                    tasks.create_task(self.send(one, one.at))

    async def closed(self, requests: Iterable[Planned], concurrency: int, duration_s: float | None) -> None:
        pending = iter(requests)
        await self.clock.until(self.clock.offset)

        async def ask() -> None:
            for one in pending:
                if duration_s is not None and self.clock() >= duration_s:
                    return
                self.progress.offered += 1
                record = await self.send(one, self.clock())
                if record.retry_after:  # as a well-behaved client does, and this one stands for users
                    await asyncio.sleep(min(record.retry_after, LONGEST_RETRY_S))

        async with asyncio.TaskGroup() as tasks:
            for _ in range(concurrency):
                tasks.create_task(ask())

    async def send(self, one: Planned, intended: float) -> Record:
        record = await self.client.send(one, intended)
        self.note(record)
        return record

    def refuse(self, one: Planned) -> None:
        self.progress.offered += 1
        self.note(
            Record(
                id=one.id,
                kind=one.kind,
                endpoint=one.endpoint,
                request=one.request,
                intended=one.at,
                sent=None,
                first_byte=None,
                preview=None,
                done=one.at,
                outcome="client_overload",
                error=f"{self.scenario.max_in_flight} requests were open already (max_in_flight)",
            )
        )

    def note(self, record: Record) -> None:
        self.journal.record(record)
        self.progress.records.append(record)


def remaining(requests: Sequence[Planned], done: set[int]) -> tuple[list[Planned], float]:
    """What a resumed run still has to send, and the second of the run at which it goes on."""
    left = [one for one in requests if one.id not in done]
    return left, left[0].at if left else 0.0


async def every(interval_s: float, stop: asyncio.Event, do: Callable[[], None]) -> None:
    while not stop.is_set():
        do()
        try:
            await asyncio.wait_for(stop.wait(), interval_s)
        except TimeoutError:
            continue
