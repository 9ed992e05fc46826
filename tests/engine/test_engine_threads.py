"""The engine's threads over a fake pipeline: waking up, holding on, draining, closing and dying."""

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from functools import partial

import numpy as np
import pytest

from app.engine.engine import Engine
from app.engine.errors import DeadlineUnmeetable, EngineStopped, HandedOver, QueueFull
from app.engine.failures import MOST_FAILURES
from app.engine.request import Generated
from app.engine.virtual import Call, number_of
from tests.engine.driver import wide
from tests.fake_pipeline import LARGE, SMALL, WAIT_S, FakePipeline, Fault, flat, numbers, request


@pytest.fixture
def fake() -> Iterator[FakePipeline]:
    pipeline = wide(flat)
    yield pipeline
    pipeline.open()
    assert not pipeline.broken


@pytest.fixture
def engine(fake: FakePipeline) -> Iterator[Engine]:
    engine = Engine(fake, max_waiting=20)
    fake.abandoned = lambda seed: True  # tests cancel without saying so
    engine.start()
    yield engine
    fake.open()
    engine.close()


def stopped(futures: list["Future[Generated]"]) -> bool:
    return all(isinstance(future.exception(WAIT_S), EngineStopped) for future in futures)


def test_an_idle_thread_wakes_for_each_request(engine: Engine) -> None:
    for seed in range(50):
        assert numbers(engine.submit(request(seed=seed)).result(WAIT_S)) == [seed + 3]
    assert engine.healthy


def test_submit_and_stats_never_wait_for_the_device(engine: Engine, fake: FakePipeline) -> None:
    fake.gates["wait"].clear()
    futures = [engine.submit(request(steps=30))]
    assert fake.reached["wait"].wait(WAIT_S)
    futures += [engine.submit(request(seed=100 * i, steps=5)) for i in range(5)]
    with pytest.raises(DeadlineUnmeetable):
        engine.submit(request(), timeout_s=0)
    assert (engine.stats()["unfinished"], engine.stats()["waiting"]) == (6, 5)
    assert futures.pop().cancel()
    assert engine.stats()["waiting"] == 4
    fake.open()
    for future in futures:
        assert future.result(WAIT_S)


def test_steps_go_on_while_pixels_are_fetched(engine: Engine, fake: FakePipeline) -> None:
    fake.gates["read"].clear()
    first = engine.submit(request(steps=1, seed=100))
    assert fake.reached["read"].wait(WAIT_S)
    second = engine.submit(request(steps=9, seed=200))
    while len(fake.of("decode")) < 2:  # the second has been denoised
        assert not first.done()
    fake.open()
    assert [numbers(future.result(WAIT_S)) for future in (first, second)] == [[101], [209]]


def test_a_request_cancelled_during_a_step_stops_at_the_next_step(engine: Engine, fake: FakePipeline) -> None:
    fake.gates["step"].clear()
    running = engine.submit(request(steps=1000, seed=0))
    assert fake.reached["step"].wait(WAIT_S)
    assert running.cancel()
    other = engine.submit(request(steps=3, seed=50))
    fake.open()
    assert numbers(other.result(WAIT_S)) == [53]
    assert sum(0 in call.seeds for call in fake.of("step")) == 1


def test_previews_come_from_another_thread_and_before_the_image(engine: Engine) -> None:
    seen: list[tuple[int, int, bool, str]] = []
    future: Future[Generated]
    ready = threading.Event()

    def show(index: int, pixels: np.ndarray) -> None:
        assert ready.wait(WAIT_S)
        seen.append((index, number_of(pixels), future.done(), threading.current_thread().name))

    future = engine.submit(request(steps=8, seed=0), previews=3, on_preview=show)
    ready.set()
    assert numbers(future.result(WAIT_S)) == [8]
    assert [facts[:3] for facts in seen] == [(0, 2, False), (1, 4, False), (2, 6, False)]
    assert not {facts[3] for facts in seen} & {"engine", threading.current_thread().name}


def held(engine: Engine, fake: FakePipeline) -> tuple[list["Future[Generated]"], ...]:
    """Requests that are decoding, running and waiting; the device holds their pixels and the next steps."""
    all_run = threading.Event()

    def hold(call: Call) -> None:
        if len(call.seeds) == 4:
            fake.before_step = lambda call: None
            fake.gates["step"].clear()
            all_run.set()

    fake.gates["read"].clear()
    decoding = [engine.submit(request(steps=1, seed=0))]
    assert fake.reached["read"].wait(WAIT_S)
    fake.before_step = hold
    fake.gates["insert"].clear()
    running = [engine.submit(request(steps=50, seed=100 * i)) for i in range(1, 5)]
    fake.gates["insert"].set()
    assert all_run.wait(WAIT_S)
    waiting = [engine.submit(request(steps=90, seed=1000 * i)) for i in range(1, 4)]
    return decoding, running, waiting


def test_draining_lets_waiting_requests_go_and_finishes_the_others(engine: Engine, fake: FakePipeline) -> None:
    decoding, running, waiting = held(engine, fake)
    draining = threading.Thread(target=engine.drain, args=(WAIT_S,))
    draining.start()
    assert stopped(waiting)  # at once
    with pytest.raises(EngineStopped):
        engine.submit(request())
    assert draining.is_alive() and engine.healthy and not any(future.done() for future in decoding + running)
    fake.open()
    assert numbers(decoding[0].result(WAIT_S)) == [1]
    assert [numbers(future.result(WAIT_S)) for future in running] == [[100 * i + 50] for i in range(1, 5)]
    draining.join(WAIT_S)
    assert not draining.is_alive() and not engine.healthy
    assert engine.stats()["requests"] | {"completed": 5, "moved": 3} == engine.stats()["requests"]
    with pytest.raises(EngineStopped):
        engine.submit(request())


def test_draining_ends_after_its_timeout_even_if_the_device_hangs(engine: Engine, fake: FakePipeline) -> None:
    decoding, running, waiting = held(engine, fake)
    draining = threading.Thread(target=engine.drain, args=(0.01,))
    draining.start()
    assert stopped(decoding + running + waiting)
    fake.open()
    draining.join(WAIT_S)
    assert not draining.is_alive()


def test_draining_an_idle_engine_closes_it(engine: Engine) -> None:
    engine.drain(WAIT_S)
    assert not engine.healthy


def test_closing_fails_unfinished_requests_and_refuses_new_ones(engine: Engine, fake: FakePipeline) -> None:
    decoding, running, waiting = held(engine, fake)
    closing = threading.Thread(target=engine.close)
    closing.start()
    assert stopped(decoding + running + waiting)
    assert not engine.healthy
    with pytest.raises(EngineStopped):
        engine.submit(request())
    fake.open()
    closing.join(WAIT_S)
    assert not closing.is_alive()
    engine.close()  # a second call does nothing
    assert engine.stats()["unfinished"] == 0


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("verb", ["insert", "step"])
def test_an_engine_whose_dispatches_all_fail_gives_up_and_fails_every_request(
    engine: Engine, fake: FakePipeline, verb: str, later: bool
) -> None:
    fake.gates["encode"].clear()
    futures = [engine.submit(request(steps=9, seed=100 * i, n=2)) for i in range(12)]
    assert fake.reached["encode"].wait(WAIT_S)
    fake.fail(verb, times=10**6, later=later)
    fake.open()
    errors = [future.exception(WAIT_S) for future in futures]
    assert {type(error) for error in errors} <= {Fault, EngineStopped, HandedOver}
    assert len(fake.faults) >= MOST_FAILURES
    with pytest.raises(EngineStopped):
        engine.submit(request())
    assert not engine.healthy
    outcomes = engine.stats()["requests"]
    assert outcomes["failed"] >= MOST_FAILURES and outcomes["failed"] + outcomes["moved"] == 12


@pytest.mark.parametrize(("verb", "later"), [("encode", False), ("decode", False), ("decode", True), ("read", False)])
def test_a_verb_that_always_fails_stops_the_engine(fake: FakePipeline, engine: Engine, verb: str, later: bool) -> None:
    """Also if steps in between succeed."""
    fake.fail(verb, times=100, later=later)
    errors = []
    for i in range(2 * MOST_FAILURES):
        try:
            errors.append(engine.submit(request(f"prompt {i}", seed=100 * i)).exception(WAIT_S))
        except EngineStopped as stopped:
            errors.append(stopped)
            break
    assert [type(error) for error in errors[: MOST_FAILURES - 1]] == [Fault] * (MOST_FAILURES - 1)
    assert type(errors[-1]) in (EngineStopped, HandedOver) and len(errors) <= MOST_FAILURES + 2
    assert not engine.healthy


def test_a_verb_that_fails_now_and_then_stops_nothing(fake: FakePipeline, engine: Engine) -> None:
    for i in range(3 * MOST_FAILURES):
        fake.fail("decode", times=1)
        assert isinstance(engine.submit(request(seed=1000 * i)).exception(WAIT_S), Fault)
        assert numbers(engine.submit(request(seed=1000 * i + 500)).result(WAIT_S)) == [1000 * i + 503]
    assert engine.healthy


@pytest.mark.slow
def test_a_request_that_comes_while_none_waits_joins_the_next_step() -> None:
    """The thread does not dispatch a second step while the first one runs."""
    fake = FakePipeline(step_time=lambda size, rows: 2.0, row_buckets=(1, 2, 4, 8), num_slots=8)
    engine = Engine(fake, max_waiting=20)
    engine.start()
    first = engine.submit(request(steps=50, seed=0))
    assert fake.reached["step"].wait(WAIT_S)
    second = engine.submit(request(steps=50, seed=1000))
    began = time.monotonic()
    while not any(call.seeds == (0, 1000) for call in fake.of("step")):
        assert time.monotonic() - began < WAIT_S
        time.sleep(0.01)
    assert [call.seeds for call in fake.of("step")][:2] == [(0,), (0, 1000)]
    engine.close()
    assert stopped([first, second])


def test_closing_does_not_wait_for_the_next_step() -> None:
    fake = FakePipeline(step_time=lambda size, rows: 3600.0)
    engine = Engine(fake, max_waiting=20)
    engine.start()
    future = engine.submit(request())
    assert fake.reached["step"].wait(WAIT_S)
    began = time.monotonic()
    engine.close()
    assert time.monotonic() - began < WAIT_S and stopped([future])


def test_pixels_that_fail_leave_the_slots_to_the_thread_that_owns_them(fake: FakePipeline) -> None:
    """The read of the first image fails while the second is being inserted."""
    engine = Engine(fake, max_waiting=20, images_at_once=1)
    fake.abandoned = lambda seed: True

    def hold(call: Call) -> None:
        if call.seeds == (0,):
            fake.reached["insert"].clear()
            fake.gates["insert"].clear()

    fake.before_step = hold
    fake.gates["read"].clear()
    fake.fail("decode", later=True)
    engine.start()
    spoilt = engine.submit(request(steps=1, seed=0, n=2))
    assert fake.reached["read"].wait(WAIT_S) and fake.reached["insert"].wait(WAIT_S)
    fake.gates["read"].set()
    assert isinstance(spoilt.exception(WAIT_S), Fault)
    fake.open()
    assert numbers(engine.submit(request(steps=1, seed=100)).result(WAIT_S)) == [101]
    assert engine.stats()["active_slots"] == 0
    engine.close()


def test_a_thread_that_dies_fails_every_request(engine: Engine, fake: FakePipeline) -> None:
    def die(call: Call) -> None:
        raise SystemExit

    fake.before_step = die
    assert stopped([engine.submit(request())])
    with pytest.raises(EngineStopped):
        engine.submit(request())
    assert not engine.healthy


def test_many_threads_submit_and_cancel_and_nothing_is_lost() -> None:
    fake = FakePipeline(step_time=lambda size, rows: 0.005, row_buckets=(1, 2, 4, 8), num_slots=8)
    engine = Engine(fake, max_waiting=30)
    owners: dict[int, Future[Generated]] = {}
    fake.abandoned = lambda seed: owners[seed].done()
    engine.start()
    clients, each = 4, 25
    refused = [0] * clients

    def settled(futures: list[Future[Generated]]) -> None:
        for future in futures:
            with suppress(CancelledError):
                future.exception(WAIT_S)

    def client(number: int) -> None:
        draw = random.Random(number)
        mine: list[Future[Generated]] = []
        for i in range(each):
            seed, n = 10**6 * number + 1000 * i, draw.randint(1, 3)
            size, steps = draw.choice([SMALL, LARGE]), draw.randint(1, 16)
            try:
                future = engine.submit(
                    request(f"{draw.randint(0, 9)}", steps=steps, seed=seed, n=n, size=size),
                    previews=3 * (n == 1),
                    on_preview=lambda index, pixels: None,
                )
            except QueueFull:
                refused[number] += 1
                settled(mine[-1:])
                continue
            owners.update(dict.fromkeys(range(seed, seed + n), future))
            expected = [seed + j + steps for j in range(n)]
            future.add_done_callback(partial(judge, expected))
            mine.append(future)
            if draw.random() < 0.4:
                draw.choice(mine).cancel()
        settled(mine)

    judged: list[bool] = []

    def judge(expected: list[int], future: "Future[Generated]") -> None:
        judged.append(future.cancelled() or numbers(future.result(0)) == expected)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    engine.drain(WAIT_S)
    stats = engine.stats()
    assert not fake.broken and all(judged)
    assert len(judged) == clients * each - sum(refused)
    assert stats["requests"]["completed"] + stats["requests"]["cancelled"] == len(judged)
    assert (stats["requests"]["failed"], stats["requests"]["queue_full"]) == (0, sum(refused))
    assert stats["requests"]["cancelled"] > 10 and stats["requests"]["completed"] > 10
    assert (stats["unfinished"], stats["waiting"]) == (0, 0)
