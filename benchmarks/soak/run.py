"""Runs a soak test: an idle phase, the load with its kills, and another idle phase.

A stopped test continues where its load had got to. This module knows nothing of verdicts.
"""

import asyncio
import contextlib
import random
import signal
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from benchmarks.soak.clients import TIMEOUT_S, Outcome, ask_badly, code_of, hang_up, never_read
from benchmarks.soak.load import Load, equal_requests, plan
from benchmarks.soak.records import Result, read
from benchmarks.soak.verdict import RECOVERY_S
from benchmarks.soak.watch import processes_of, replicas_of, sample, stats_of
from cluster.cli import UsageError
from cluster.local.state import Cluster
from loadtest.checks import EqualSeeds, identity
from loadtest.client import Client
from loadtest.client import session as client_session
from loadtest.plan import Planned
from loadtest.records import Journal
from loadtest.run import Clock
from loadtest.session import headers

SAMPLE_S = 5.0
IDLE_S = 15.0  # before and after the load, for samples of an idle cluster
SETTLE_S = 60.0
LINE_S = 60.0  # between two lines of progress
AT_WORK_S = 30.0  # how long a kill waits for a request to hit
MOST_OPEN = 500  # clients at once
LAST_S = TIMEOUT_S + 30  # how long the last request may take


@dataclass
class Soak:
    url: str
    cluster: Cluster
    load: Load
    client: Client
    clock: Clock
    results: Journal
    events: Journal
    stop: asyncio.Event
    offset: float  # second of the load at which this session begins
    seed: int
    phase: str = "before"
    began: float | None = None  # the clock at the start of the load
    outcomes: Counter[str] = field(default_factory=Counter)
    open: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def position(self) -> float:
        """Seconds of the load so far."""
        return self.offset if self.began is None else min(self.load.duration_s, self.clock() - self.began + self.offset)

    async def run(self, done: set[int], model: Mapping[str, Any]) -> None:
        await self.draw_alone(model)
        await self.wait(IDLE_S)
        self.began, self.phase = self.clock(), "load"
        killing = asyncio.create_task(self.kill_replicas())
        try:
            await self.send(done)
            await self.wait(max(0.0, self.load.duration_s - self.position))
            if self.open and not self.stop.is_set():
                await asyncio.wait(self.open, timeout=LAST_S)
            await killing
        finally:
            for task in (killing, *self.open):
                task.cancel()
        self.phase = "after"
        if not self.stop.is_set():
            await self.settle()

    async def draw_alone(self, model: Mapping[str, Any]) -> None:
        """Sends the equal requests twice. Later answers are compared with these, and the server is warm then."""
        for number, request in enumerate(2 * equal_requests(model["samplers"])):
            planned = Planned(-1 - number, 0.0, "alone", "generations", request)
            record = await self.client.send(planned, self.clock())
            if record.outcome != "ok":
                raise UsageError(f"The cluster fails before the load starts: {record.error}")

    async def send(self, done: set[int]) -> None:
        assert self.began is not None
        for planned in self.load.requests:
            if planned.at < self.offset or planned.id in done:
                continue
            await self.clock.until(self.began + planned.at - self.offset)
            if self.stop.is_set():
                return
            if len(self.open) >= MOST_OPEN:
                raise UsageError(f"{MOST_OPEN} clients are waiting for an answer: the server has stopped answering.")
            task = asyncio.create_task(self.perform(planned))
            self.open.add(task)
            task.add_done_callback(self.open.discard)

    async def perform(self, planned: Planned) -> None:
        at, compared = self.clock(), False
        try:
            async with asyncio.timeout(TIMEOUT_S + 10):
                match planned.kind:
                    case "bad request":
                        outcome = await ask_badly(self.client.session, self.url, planned.request["bad"])
                    case "leaves at once" | "leaves a stream":
                        outcome = await hang_up(self.url, planned.request)
                    case "never reads":
                        outcome = await never_read(self.url, planned.request)
                    case _:
                        outcome, compared = await self.ask(planned)
        except TimeoutError:
            outcome = "timeout", None, f"no answer within {TIMEOUT_S:g} s"
        except (aiohttp.ClientError, OSError, ValueError, IndexError) as problem:
            outcome = "reset", None, f"{type(problem).__name__}: {problem}"
        name, status, error = outcome
        self.outcomes[name] += 1
        code = code_of(error)
        result = Result(planned.id, planned.kind, at, self.clock(), name, status, code, error, compared)
        self.results.write({key: value for key, value in asdict(result).items() if value is not None})

    async def ask(self, planned: Planned) -> tuple[Outcome, bool]:
        record = await self.client.send(planned, self.clock())
        return (record.outcome, record.status, record.error), record.compared

    async def kill_replicas(self) -> None:
        assert self.began is not None
        for number, at in enumerate(self.load.kills):
            if at < self.offset:
                continue
            await self.wait(self.began + at - self.offset - self.clock())
            if self.stop.is_set():
                return
            await self.kill(random.Random(f"{self.seed} {number}"))

    async def kill(self, rng: random.Random) -> None:
        """Kills a replica that answers, if possible while it works. Its process must carry the cluster's mark."""
        busy_by = self.clock() + AT_WORK_S
        stats = await stats_of(self.client.session, self.url)
        while self.clock() < busy_by and not self.stop.is_set() and not (stats and stats["total"]["unfinished"]):
            await self.wait(0.2)
            stats = await stats_of(self.client.session, self.url)
        replicas = replicas_of(stats)
        processes = await asyncio.to_thread(processes_of, self.cluster)
        ours = {process.pid for process in processes if process.kind == "replica"}
        victims = sorted(ours & {*replicas.values()})
        if not victims:
            return
        victim = rng.choice(victims)
        killed = self.clock()
        psutil.Process(victim).kill()
        self.events.write({"event": "kill", "t": killed, "pid": victim})
        while self.clock() < killed + RECOVERY_S and not self.stop.is_set():
            await self.wait(1.0)
            stats = await stats_of(self.client.session, self.url)
            answering = {*replicas_of(stats).values()}
            if answering and victim not in answering:
                self.events.write({"event": "recovered", "t": self.clock(), "kill": killed})
                return

    async def settle(self) -> None:
        """Waits for unfinished requests to end, then records the final state."""
        total: dict[str, Any] = {}
        deadline = self.clock() + SETTLE_S
        while self.clock() < deadline and not self.stop.is_set():
            total = (await stats_of(self.client.session, self.url) or {}).get("total", {})
            if total.get("replicas") and total["unfinished"] == 0:
                break
            await self.wait(1.0)
        await self.wait(IDLE_S)
        kept = {name: total.get(name) for name in ("unfinished", "active_slots", "replicas", "compiles_after_ready")}
        self.events.write({"event": "end", "t": self.clock(), **kept})

    async def watch(self) -> None:
        last_line = 0.0
        while True:
            began, position = self.clock(), self.position
            state = await sample(self.cluster, self.client.session, self.url)
            self.events.write({"event": "sample", "t": began, "phase": self.phase, "position": position, **state})
            if self.phase == "load" and began - last_line >= LINE_S:
                last_line = began
                outcomes = ", ".join(f"{count} {name}" for name, count in self.outcomes.most_common())
                now = f"{len(self.open)} open, {state['replicas']} replicas"
                print(f"{position / 60:5.1f} min: {outcomes}; {now}", flush=True)
            await asyncio.sleep(max(0.0, began + SAMPLE_S - self.clock()))

    async def wait(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, seconds)):
                await self.stop.wait()


async def soak(folder: Path, url: str, cluster: Cluster, model: Mapping[str, Any]) -> bool:
    """Runs the test, or the rest of it, and returns whether it was interrupted."""
    before = read(folder)
    head = before.head
    load = plan(head["seed"], head["duration_s"], head["rate"], model["samplers"])
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    alone = [identity(request) for request in equal_requests(model["samplers"])]
    clock = Clock(offset=before.seen_s)
    async with contextlib.AsyncExitStack() as stack:
        results = stack.enter_context(Journal(folder / "results.jsonl"))
        events = stack.enter_context(Journal(folder / "events.jsonl"))
        client = Client(
            session=await stack.enter_async_context(client_session(headers())),
            url=url,
            timeout_s=TIMEOUT_S,
            clock=clock,
            check=True,
            default_size=model["defaults"]["size"],
            # The count is never used up, so that the first pictures are kept for the whole test.
            equal_seeds=EqualSeeds(1, Counter({key: load.requests[-1].id + 1000 for key in alone if key})),
            checkers=stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="check")),
            pictures=None,
        )
        clock.start()
        events.write({"event": "session", "t": clock.offset, "unix": time.time(), "position": before.reached_s})
        test = Soak(url, cluster, load, client, clock, results, events, stop, before.reached_s, head["seed"])
        watching = asyncio.create_task(test.watch())
        try:
            await test.run({result.id for result in before.results}, model)
        finally:
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching
    return stop.is_set()
