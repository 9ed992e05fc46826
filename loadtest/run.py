"""Runs a load test: sends every request at its time and records the outcome. Knows nothing of reports."""

import asyncio
import gc
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from loadtest.client import Client
from loadtest.plan import Planned
from loadtest.records import Journal, Record
from loadtest.scenario import Closed, Scenario

SPIN_S = 0.002  # the last part of a wait is a busy loop, as timers of the event loop may be 1 ms late
LONGEST_RETRY_S = 30.0  # longest wait of a client for Retry-After
HEAD_START_S = 0.2  # from `start` to second 0 of the run


@dataclass
class Clock:
    """Counts the seconds of the run. A resumed run continues at `offset`."""

    offset: float = 0.0
    began: float = 0.0
    epoch: float = 0.0  # the same time in Unix time

    def start(self) -> None:
        self.began, self.epoch = time.perf_counter() + HEAD_START_S, time.time() + HEAD_START_S

    def __call__(self) -> float:
        return time.perf_counter() - self.began + self.offset

    async def until(self, moment: float) -> None:
        """Waits. It yields at least once, so that tasks just created run even if the schedule is late."""
        if (left := moment - self()) > SPIN_S:
            await asyncio.sleep(left - SPIN_S)
        await asyncio.sleep(0)
        while self() < moment:  # noqa: ASYNC110 -- other tasks run meanwhile
            await asyncio.sleep(0)


@dataclass
class Progress:
    """The state of a run that the display shows."""

    planned: int | None  # None: a time ends the run, not a number of requests
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
        """Runs until all requests are answered, the time is over, or `stop` is set.

        `stop` drops the requests in flight without a record, so that a resumed run sends them again.
        """
        gc.collect()
        gc.freeze()  # the plan is never garbage, so the collector need not scan it
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
            for planned in requests:
                await self.clock.until(planned.at)
                if self.progress.in_flight >= self.scenario.max_in_flight:
                    self.refuse(planned)
                else:
                    self.progress.offered += 1
                    tasks.create_task(self.send(planned, planned.at))

    async def closed(self, requests: Iterable[Planned], concurrency: int, duration_s: float | None) -> None:
        pending = iter(requests)
        await self.clock.until(self.clock.offset)

        async def client() -> None:
            for planned in pending:
                if duration_s is not None and self.clock() >= duration_s:
                    return
                self.progress.offered += 1
                record = await self.send(planned, self.clock())
                if record.retry_after:  # as a well-behaved client does
                    await asyncio.sleep(min(record.retry_after, LONGEST_RETRY_S))

        async with asyncio.TaskGroup() as tasks:
            for _ in range(concurrency):
                tasks.create_task(client())

    async def send(self, planned: Planned, intended: float) -> Record:
        record = await self.client.send(planned, intended)
        self.note(record)
        return record

    def refuse(self, planned: Planned) -> None:
        self.progress.offered += 1
        self.note(
            Record(
                id=planned.id,
                kind=planned.kind,
                endpoint=planned.endpoint,
                request=planned.request,
                intended=planned.at,
                sent=None,
                first_byte=None,
                preview=None,
                done=planned.at,
                outcome="client_overload",
                error=f"{self.scenario.max_in_flight} requests were open already (max_in_flight)",
            )
        )

    def note(self, record: Record) -> None:
        self.journal.record(record)
        self.progress.records.append(record)


def remaining(requests: Sequence[Planned], done: set[int]) -> tuple[list[Planned], float]:
    """The requests that a resumed run still has to send, and the second of the run at which it continues."""
    left = [planned for planned in requests if planned.id not in done]
    return left, left[0].at if left else 0.0


async def every(interval_s: float, stop: asyncio.Event, do: Callable[[], None]) -> None:
    while not stop.is_set():
        do()
        try:
            async with asyncio.timeout(interval_s):
                await stop.wait()
        except TimeoutError:
            continue
