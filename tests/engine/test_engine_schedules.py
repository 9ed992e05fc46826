"""Random schedules: clients, the device and the clock act in any order, and three things always hold. Every image is
right, every request ends exactly once, and an engine with nothing left to do is empty.

The default run is the same each time. For a long one, of other schedules each time:
`SCHEDULES=5000 pytest tests/engine/test_engine_schedules.py`; what fails is printed as the calls that lead to it.
"""

import itertools
import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from app.engine.errors import DeadlineUnmeetable, EngineStopped, QueueFull
from app.engine.failures import MOST_FAILURES
from app.engine.request import Generated
from app.engine.scheduler import AGEING, CLOSED_OVERHEAD, KEEPS_UP, OVERHEAD
from app.engine.virtual import Call, number_of
from app.types import Generation, Size
from tests.engine.driver import Driver
from tests.fake_pipeline import LARGE, SMALL, WAIT_S, FakePipeline, Fault, flat, numbers, request, serial

SCHEDULES = int(os.environ.get("SCHEDULES", 0))


def knee(size: Size, rows: int) -> float:
    return 0.01 * max(1, rows / 4) * size[0] / SMALL[0]


def fast(size: Size, rows: int) -> float:
    """Where a launch takes some time, a dispatch has many steps."""
    return 0.001 * rows**0.8


@dataclass(eq=False)
class Client:
    """A client with one request, and what it has seen of it so far."""

    generation: Generation
    since: float
    due: list[int]  # steps after which a preview is due
    future: "Future[Generated]" = field(default_factory=Future)
    cancelled: bool = False
    ended: int = 0
    shown: list[tuple[int, int]] = field(default_factory=list)  # index and number of each preview

    @property
    def size(self) -> Size:
        return self.generation.width, self.generation.height

    @property
    def rows(self) -> int:
        return 1 + (self.generation.guidance_scale > 1)

    @property
    def seeds(self) -> list[int]:
        return [self.generation.seed + i for i in range(self.generation.n)]

    @property
    def steps(self) -> int:
        return self.generation.num_inference_steps + (self.generation.sampler == "pndm")

    def show(self, index: int, pixels: np.ndarray) -> None:
        assert not self.future.done()
        self.shown.append((index, number_of(pixels)))

    def end(self, future: "Future[Generated]") -> None:
        self.ended += 1


WISHES = st.fixed_dictionaries(
    {
        "prompt": st.sampled_from(["", "a", "b", "c"]),
        "negative_prompt": st.sampled_from(["", "a"]),
        "size": st.sampled_from([SMALL, LARGE]),
        "steps": st.integers(1, 12),
        "n": st.sampled_from([1, 1, 1, 2, 3, 5]),
        "guidance_scale": st.sampled_from([1.0, 7.5]),
        "sampler": st.sampled_from([None, "pndm"]),
        "previews": st.integers(0, 3),
        "timeout_s": st.sampled_from([math.inf] * 5 + [1.0]),
    }
)


class Schedules(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.clients: list[Client] = []
        self.owners: dict[int, Client] = {}  # by seed
        self.taken: dict[int, int] = {}  # steps, by seed
        self.seeds = itertools.count(0, 1000)
        self.refused = {"queue_full": 0, "deadline": 0}
        self.failed_encodes = 0  # before the latest dispatch
        self.stopped = False

    @initialize(
        step_time=st.sampled_from([serial, flat, knee, fast]),
        images_at_once=st.sampled_from([None, None, 1, 3]),
        num_slots=st.sampled_from([3, 4, 8]),
        decode_buckets=st.sampled_from([(1,), (1, 2), (2, 4)]),
        decode_s=st.sampled_from([(0.004, 0.0), (0.001, 0.03)]),
        launch_s=st.sampled_from([0.0, 0.001]),
        prompt_cache=st.sampled_from([0, 2, 256]),
        max_waiting=st.sampled_from([4, 50]),
    )
    def begin(
        self,
        step_time: Callable[[Size, int], float],
        images_at_once: int | None,
        num_slots: int,
        decode_buckets: tuple[int, ...],
        decode_s: tuple[float, float],  # for each image, and for each decode
        launch_s: float,
        prompt_cache: int,
        max_waiting: int,
    ) -> None:
        self.fake = FakePipeline(
            step_time=step_time,
            row_buckets=(1, 2, 4, 8),
            num_slots=num_slots,
            decode_buckets=decode_buckets,
            decode_time=lambda size, images: decode_s[0] * images + decode_s[1],
            launch_s=launch_s,
            before_step=self.check_step,
        )
        self.max_waiting = max_waiting
        self.driver = Driver(
            self.fake, max_waiting=max_waiting, images_at_once=images_at_once, prompt_cache=prompt_cache
        )
        self.clock, self.engine = self.driver.clock, self.driver.engine

    # What clients do

    @rule(wishes=st.lists(WISHES, min_size=1, max_size=4))
    def submit(self, wishes: list[dict[str, Any]]) -> None:
        for wish in wishes:
            self.submit_wish(**wish)

    def submit_wish(self, n: int, previews: int, timeout_s: float, **wish: Any) -> None:
        generation = request(n=n, seed=next(self.seeds), **wish)
        previews = previews if n == 1 else 0
        client = Client(generation, self.clock(), [])
        client.due = sorted(
            {round(client.steps * (i + 1) / (previews + 1)) for i in range(previews)} - {0, client.steps}
        )
        full = self.engine.stats()["waiting"] >= self.max_waiting
        try:
            client.future = self.driver.submit(
                generation, timeout_s=timeout_s, previews=previews, on_preview=client.show if previews else None
            )
        except EngineStopped:
            assert self.stopped
        except QueueFull as refusal:
            assert full and 0 < refusal.retry_after_s < math.inf
            self.refused["queue_full"] += 1
        except DeadlineUnmeetable as refusal:
            assert refusal.estimate_s > timeout_s and 0 < refusal.retry_after_s < math.inf
            self.refused["deadline"] += 1
        else:
            assert not full and not self.stopped
            client.future.add_done_callback(client.end)
            self.clients.append(client)
            self.owners.update(dict.fromkeys(client.seeds, client))

    @precondition(lambda self: self.clients)
    @rule(which=st.integers(0, 10))
    def cancel(self, which: int) -> None:
        """Cancels an unfinished request, or the last one if all are finished."""
        unfinished = [client for client in self.clients if not client.future.done()]
        client = unfinished[which % len(unfinished)] if unfinished else self.clients[-1]
        done = client.future.done()
        cancelled = client.future.cancel()
        assert cancelled or client.future.done()
        client.cancelled |= cancelled and not done

    # What the device and the clock do

    @rule(seconds=st.sampled_from([0.001, 0.03, 2.0]), pace=st.sampled_from([0.3, 1.0, 1.0, 3.0]))
    def pass_time(self, seconds: float, pace: float) -> None:
        self.clock.reach(self.clock() + seconds)
        self.fake.pace = pace

    @precondition(lambda self: len(self.clients) > 2 and len(self.fake.faults) < 4)
    @rule(
        verb=st.sampled_from(["encode", "insert", "step", "decode", "preview"]),
        after=st.integers(0, 3),
        later=st.booleans(),
    )
    def fail(self, verb: str, after: int, later: bool) -> None:
        self.fake.fail(verb, after=after, later=later)

    # What the two threads do

    @precondition(lambda self: not self.stopped)
    @rule()
    def tick(self) -> None:
        self.ticks(1)

    @precondition(lambda self: not self.stopped)
    @rule(times=st.integers(2, 30))
    def ticks(self, times: int) -> None:
        for _ in range(times):
            try:
                self.engine.tick()
            except RuntimeError:  # it would end the thread, which then closes the engine
                assert self.may_give_up()
                self.engine.close()
                self.stopped = True
                return
            inserted = {seed for call in self.fake.of("insert") for seed in call.seeds}
            decoded = {seed for call in self.fake.of("decode") for seed in call.seeds}
            in_slots = [seed for seed in inserted - decoded if not self.owners[seed].future.done()]
            assert self.engine.stats()["active_slots"] == len(in_slots)

    @precondition(lambda self: self.driver.fetcher.pending)
    @rule(all_of_them=st.booleans())
    def fetch(self, all_of_them: bool) -> None:
        while self.driver.fetcher.pending:
            self.clock.reach(self.driver.fetcher.next_at())
            self.driver.fetcher.run()
            if not all_of_them:
                break

    @precondition(lambda self: not self.stopped and len(self.clients) > 8)
    @rule(now=st.sampled_from([False] * 5 + [True]))  # rarely, as it ends most runs soon
    def drain(self, now: bool) -> None:
        if not now:
            return
        begun = {client for client in self.clients if any(seed in self.taken for seed in client.seeds)}
        inserted = {self.owners[seed] for call in self.fake.of("insert") for seed in call.seeds}
        waiting = [client for client in self.clients if not client.future.done() and client not in begun | inserted]
        draining = threading.Thread(target=self.engine.drain, args=(1e9,))
        draining.start()
        for client in waiting:
            assert isinstance(client.future.exception(WAIT_S), EngineStopped)
        self.stopped = True
        while draining.is_alive():
            try:
                busy = self.driver.tick()
            except RuntimeError:
                self.engine.close()
                break
            if not busy:
                draining.join(WAIT_S)
                assert not draining.is_alive()
        draining.join(WAIT_S)
        for client in inserted:
            if not client.cancelled and client.future.exception(0) and not self.spoilt(client):
                assert self.may_give_up()

    # What must hold

    def may_give_up(self) -> bool:
        """A failed encoding spoils a dispatch of each size."""
        spoilt = [len(self.fake.sizes) if fault.verb == "encode" else 1 for fault in self.fake.faults]
        return sum(spoilt) >= MOST_FAILURES

    def check_step(self, call: Call) -> None:
        """Before each dispatch: checks which images share it, and its number of steps."""
        assert call.size is not None
        stats = self.engine.stats()["sizes"][f"{call.size[0]}x{call.size[1]}"]
        step_s = {int(rows): seconds for rows, seconds in stats["step_s"].items()}
        row_s = min(seconds / rows for rows, seconds in step_s.items())

        def rank(client: Client) -> float:
            left = sum(client.steps - self.taken.get(seed, 0) for seed in client.seeds)
            return left * client.rows * row_s + AGEING * client.since

        chosen = {self.owners[seed] for seed in call.seeds}
        assert not any(client.future.done() for client in chosen), "a step of a cancelled request"
        inserted = {seed for other in self.fake.of("insert") for seed in other.seeds}
        in_slots = stats["active"] < self.fake.num_slots
        last = max(rank(client) for client in chosen)
        # A batch is not chosen anew when prompts of it could not be encoded, so some rows or slots may stay free.
        failed_encodes = sum(bool(fault.texts) for fault in self.fake.faults)
        as_chosen, self.failed_encodes = failed_encodes == self.failed_encodes, failed_encodes
        for client in self.clients if as_chosen else []:
            if client.size == call.size and not client.future.done() and rank(client) < last - 1e-9:
                before = sum(self.owners[seed].rows for seed in call.seeds if rank(self.owners[seed]) <= rank(client))
                for seed in client.seeds:
                    left_out = seed not in call.seeds and self.taken.get(seed, 0) < client.steps
                    fits = before + client.rows <= call.bucket and (in_slots or seed in inserted)
                    assert not (left_out and fits), "a step that leaves out an image of a lower rank"

        cost = self.engine._queues[call.size].step_cost
        overhead = self.engine._dispatcher.overhead(cost.launch_s(call.bucket))
        most_s = max((overhead.device_s + overhead.host_s) / CLOSED_OVERHEAD, overhead.lead_s * KEEPS_UP)
        assert (call.count - 1) * cost.step_s(call.bucket) <= most_s + 1e-9
        stops = []
        for seed in call.seeds:
            taken = self.taken.get(seed, 0)
            after = taken + call.count
            marks = [*self.owners[seed].due, self.owners[seed].steps]
            assert not any(taken < mark < after for mark in marks), "steps past an end or a preview"
            stops += [mark == after for mark in marks]
            self.taken[seed] = after
        if not any(stops):
            assert call.count * cost.step_s(call.bucket) * OVERHEAD >= overhead.device_s - 1e-9

    def spoilt(self, client: Client) -> set[Fault]:
        texts = {client.generation.prompt, client.generation.negative_prompt}
        return {fault for fault in self.fake.faults if fault.touched & {*client.seeds} or fault.texts & texts}

    def check_previews(self, client: Client) -> None:
        indices = [index for index, _ in client.shown]
        shown = [shown - client.generation.seed for _, shown in client.shown]
        assert indices == sorted(set(indices)) and shown == sorted(shown)
        assert all(client.due[index] == taken for index, taken in zip(indices, shown, strict=True))
        if not any(fault.verb == "preview" for fault in self.fake.faults):
            assert indices == list(range(len(indices)))
            assert client.future.cancelled() or client.future.exception(0) or len(indices) == len(client.due)

    @invariant()
    def nothing_is_broken(self) -> None:
        if not hasattr(self, "driver"):
            return
        assert not self.fake.broken, self.fake.broken
        self.driver.check()
        stats = self.engine.stats()
        outcomes = stats["requests"]
        assert {key: outcomes[key] for key in self.refused} == self.refused
        for client in self.clients:
            future = client.future
            assert client.ended == future.done()
            assert client.cancelled == future.cancelled()
            if not future.done() or client.cancelled:
                continue
            error = future.exception(0)
            if isinstance(error, EngineStopped):
                assert self.stopped
            elif error is not None:
                assert error in self.spoilt(client), error
            else:
                generated = future.result(0)
                assert numbers(generated) == [seed + client.steps for seed in client.seeds]
                assert generated.seeds == tuple(client.seeds)
                assert not any(fault.touched & {*client.seeds} for fault in self.fake.faults if fault.verb != "preview")
                assert min(generated.queue_s, generated.denoise_s, generated.decode_s, generated.device_s) >= 0
                self.check_previews(client)

    def teardown(self) -> None:
        if not hasattr(self, "driver"):
            return
        self.fake.forget_faults()
        while not self.stopped:
            try:
                if not self.driver.tick():
                    break
            except RuntimeError:
                self.engine.close()
                self.stopped = True
        self.nothing_is_broken()
        assert all(client.future.done() for client in self.clients)
        stats = self.engine.stats()
        assert (stats["unfinished"], stats["waiting"]) == (0, 0)
        if not self.stopped:
            assert self.engine.healthy
            assert (stats["active_slots"], stats["backlog_s"]) == (0, 0)
        self.engine.close()


Schedules.TestCase.settings = settings(
    max_examples=SCHEDULES or 100,
    stateful_step_count=40,
    derandomize=not SCHEDULES,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
TestSchedules = pytest.mark.slow(Schedules.TestCase)
