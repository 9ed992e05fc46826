"""A device that hangs is noticed, in every verb and for both threads; a device that is only slow is no stall."""

import logging
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from app.engine.engine import Engine
from app.engine.errors import EngineStalled, HandedOver
from app.engine.stall import CHECK_INTERVAL_S, STALL_TIMES, StallWatch
from app.engine.virtual import VirtualClock
from app.types import Edit
from tests.engine.driver import Driver, wide
from tests.fake_pipeline import START, VERBS, WAIT_S, FakePipeline, flat, numbers, request

# The watch


def watched(stall_s: float = 60.0) -> tuple[StallWatch, VirtualClock, list[str]]:
    clock, reports = VirtualClock(START), list[str]()
    return StallWatch(stall_s, reports.append, clock), clock, reports


def check_until(watch: StallWatch, clock: VirtualClock, moment: float) -> None:
    while clock() < moment and not watch.stalled:
        clock.reach(clock() + CHECK_INTERVAL_S)
        watch.check()


@pytest.mark.parametrize("predicted_s", [0.0, 5.9, 30.0])
def test_a_call_is_a_stall_after_the_floor_and_after_many_times_its_predicted_duration(predicted_s: float) -> None:
    watch, clock, reports = watched()
    limit_s = max(60.0, STALL_TIMES * predicted_s)
    with watch.call("step", predicted_s):
        check_until(watch, clock, 1000 + limit_s - CHECK_INTERVAL_S)
        assert not reports and not watch.stalled
        check_until(watch, clock, 2000)
        assert clock() == pytest.approx(1000 + limit_s)
        watch.check()
    assert reports == [watch.stalled], "reported once"
    assert f"step has not returned for {limit_s:.1f} s, and its limit is {limit_s:.1f} s" in watch.stalled


def test_calls_that_return_are_forgotten_and_calls_beside_them_are_not() -> None:
    watch, clock, reports = watched()
    with watch.call("read", 0.0):
        for _ in range(59):
            with watch.call("step", 0.0):
                clock.reach(clock() + 1)
                watch.check()
        assert not reports
        clock.reach(clock() + 1)
        watch.check()
    assert len(reports) == 1 and "read has not returned" in reports[0]


def test_time_for_which_the_process_was_frozen_is_no_stall() -> None:
    watch, clock, reports = watched()
    with watch.call("wait", 0.0):
        clock.reach(clock() + 3600)
        watch.check()
        assert not reports
        check_until(watch, clock, clock() + 120)
    assert len(reports) == 1


# The engine, on a virtual clock


class WatchedClock(VirtualClock):
    """Moves on by the interval of checks, and has the watch check each time, as its thread does in real time."""

    watch: StallWatch | None = None

    def reach(self, moment: float) -> None:
        while self.now < moment:
            super().reach(min(moment, self.now + CHECK_INTERVAL_S))
            if self.watch:
                self.watch.check()


@pytest.mark.parametrize(("pace", "stalls"), [(1.0, False), (5.0, False), (100.0, True)])
def test_a_long_queue_and_a_slow_device_are_no_stall_and_a_hundred_times_slower_is(pace: float, stalls: bool) -> None:
    clock = WatchedClock(START)
    fake = FakePipeline(step_time=lambda size, rows: 20.0, decode_time=lambda size, images: 30.0, clock=clock)
    driver = Driver(fake, stall_s=60.0)
    clock.watch = driver.engine._watch
    fake.pace = pace
    futures = [driver.submit(request(steps=3, seed=100 * i)) for i in range(10)]
    while not all(future.done() for future in futures):
        driver.tick()
    assert bool(driver.engine.stalled) == stalls and driver.engine.healthy == (not stalls)
    for i, future in enumerate(futures):
        if stalls:
            assert isinstance(future.exception(0), EngineStalled | HandedOver)
        else:
            assert numbers(future.result(0)) == [100 * i + 3]


# The engine's threads


@pytest.fixture
def fake() -> Iterator[FakePipeline]:
    pipeline = wide(flat)
    pipeline.abandoned = lambda seed: True  # after a stall the engine's thread still ends its tick
    yield pipeline
    pipeline.open()
    assert not pipeline.broken


@pytest.fixture
def engine(fake: FakePipeline) -> Iterator[Engine]:
    engine = Engine(fake, max_waiting=20, stall_s=0.2)
    engine.start()
    yield engine
    fake.open()
    engine.close()


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in ("export", "import")])
def test_a_device_that_hangs_fails_all_who_wait_and_the_health_check(
    verb: str, engine: Engine, fake: FakePipeline, caplog: pytest.LogCaptureFixture
) -> None:
    fake.gates[verb].clear()
    edit = Edit(np.zeros((8, 8, 3), np.uint8)) if verb == "encode_image" else None
    futures = [
        engine.submit(request(steps=8, seed=100 * i, edit=edit), previews=1, on_preview=lambda index, pixels: None)
        for i in range(8)
    ]
    errors = [future.exception(WAIT_S) for future in futures]
    assert {type(error) for error in errors} <= {EngineStalled, HandedOver}
    seen_in = "wait|read" if verb == "wait" else verb  # the fetching thread waits for the last step too
    with pytest.raises(EngineStalled, match=f"^The device does not answer: ({seen_in}) has not returned for"):
        engine.submit(request())
    assert not engine.healthy and engine.stats()["unfinished"] == 0
    (line,) = [record for record in caplog.records if "does not answer" in record.getMessage()]
    assert line.levelno == logging.ERROR
    for seed in range(0, 800, 100):
        assert f"seed {seed} at 8x8, " in line.getMessage(), "the log says what was lost"
    assert 'fake_pipeline.py", line' in line.getMessage(), "and where the thread hangs"
    closing = threading.Thread(target=engine.close)
    closing.start()
    closing.join(WAIT_S)
    assert not closing.is_alive() and not fake.gates[verb].is_set(), "closing waits for no device that hangs"


def test_pixels_that_never_come_are_a_stall_although_steps_go_on(engine: Engine, fake: FakePipeline) -> None:
    fake.gates["read"].clear()
    decoded, running = engine.submit(request(steps=1, seed=0)), engine.submit(request(steps=10**9, seed=10))
    assert isinstance(decoded.exception(WAIT_S), EngineStalled) and isinstance(running.exception(WAIT_S), EngineStalled)
    assert "read has not returned" in engine.stalled


def test_a_stall_ends_a_drain(engine: Engine, fake: FakePipeline) -> None:
    fake.gates["wait"].clear()
    future = engine.submit(request(steps=9))
    assert fake.reached["wait"].wait(WAIT_S)
    draining = threading.Thread(target=engine.drain, args=(10 * WAIT_S,))
    draining.start()
    draining.join(WAIT_S)
    assert not draining.is_alive() and isinstance(future.exception(0), EngineStalled)
