"""app/serving/profiling.py around counters that are no engines, and what jobs/profile.py makes of events."""

import asyncio
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from app.serving import profiling
from app.serving.profiling import Profiler, Trace
from jobs.profile import own_times


class Steps:
    """One step at each look."""

    def __init__(self, most: int = 10**9) -> None:
        self.count, self.most = 0, most

    def __call__(self) -> int:
        self.count = min(self.count + 1, self.most)
        return self.count


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """In place of JAX's profiler: what is asked of it."""
    calls: list[str] = []

    def stop() -> None:
        calls.append("stop")

    def start(folder: Path) -> None:
        calls.append("start")
        (folder / "plugins").mkdir()
        (folder / "plugins" / "host.xplane.pb").write_bytes(b"planes")
        (folder / "plugins" / "host.trace.json.gz").write_bytes(b"events")

    monkeypatch.setattr(profiling, "start", start)
    monkeypatch.setattr(profiling, "stop", stop)
    return calls


def test_a_trace_has_the_steps_that_were_asked_for_and_both_files(calls: list[str]) -> None:
    trace = asyncio.run(Profiler("one", Steps()).trace(5, 10))
    assert isinstance(trace, Trace) and trace.steps >= 5 and trace.replica == "one"
    assert trace.files == {".xplane.pb": b"planes", ".trace.json.gz": b"events"} and calls == ["start", "stop"]


def test_an_idle_replica_is_not_traced(calls: list[str]) -> None:
    assert "made no step" in str(asyncio.run(Profiler("one", Steps(most=1)).trace(5, 0.05))) and calls == []


def test_a_trace_ends_in_time_with_the_steps_that_there_were(calls: list[str]) -> None:
    trace = asyncio.run(Profiler("one", Steps(most=4)).trace(5, 0.1))
    assert isinstance(trace, Trace) and trace.steps < 5 and calls == ["start", "stop"]


def test_there_is_one_trace_at_a_time_and_then_another(calls: list[str]) -> None:
    profiler = Profiler("one", Steps())

    async def both() -> list[Trace | str]:
        return list(await asyncio.gather(profiler.trace(5, 10), profiler.trace(5, 10)))

    first, second = asyncio.run(both())
    assert isinstance(first, Trace) and second == "A trace of this replica is being taken already."
    assert isinstance(asyncio.run(profiler.trace(5, 10)), Trace)


PHASES = ["waiting", "start", "tracing", "stop", "files_in"]


class Held:
    """Holds a trace in one of its phases, where it has arrived once `arrived` is set."""

    def __init__(self, phase: str, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.phase, self.arrived, self.gate = phase, threading.Event(), threading.Event()
        self.calls, self.traced = calls, 0
        for name in ("start", "stop", "files_in"):
            monkeypatch.setattr(profiling, name, partial(self.call, name, getattr(profiling, name)))

    def call(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        result = function(*arguments)
        self.hold(name)
        return result

    def hold(self, phase: str) -> None:
        if phase == self.phase:
            self.arrived.set()
            assert phase in ("waiting", "tracing") or self.gate.wait(20)

    def steps(self) -> int:
        """In two phases there is no step until the gate opens."""
        if not self.gate.is_set() and (self.phase == "waiting" or (self.phase == "tracing" and "start" in self.calls)):
            self.hold(self.phase)
            return self.traced
        self.traced += 1
        return self.traced


@pytest.mark.parametrize("phase", PHASES)
def test_a_trace_cancelled_in_any_phase_stops_the_profiler_and_blocks_nobody(
    phase: str, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(phase, calls, monkeypatch)
    profiler = Profiler("one", held.steps)

    async def cancelled() -> Trace | str:
        task = asyncio.create_task(profiler.trace(5, 20))
        assert await asyncio.to_thread(held.arrived.wait, 20)
        task.cancel()
        for _ in range(3):
            await asyncio.sleep(0)  # the loop goes on although the gate is closed
        if phase not in ("waiting", "tracing"):  # where nothing holds it, it may have ended already
            assert not task.done() and "already" in str(await profiler.trace(5, 20))
        held.gate.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert calls == ["start", "stop"] * (phase != "waiting") and not profiler.busy
        return await profiler.trace(5, 20)

    trace = asyncio.run(cancelled())
    assert isinstance(trace, Trace) and trace.steps >= 5
    assert calls == ["start", "stop"] * (1 + (phase != "waiting"))


def test_who_cancels_twice_does_not_wait_and_the_profiler_is_stopped_all_the_same(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held("start", calls, monkeypatch)
    profiler = Profiler("one", held.steps)

    async def cancelled() -> None:
        task = asyncio.create_task(profiler.trace(5, 20))
        assert await asyncio.to_thread(held.arrived.wait, 20)
        for _ in range(2):
            task.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert profiler.busy and calls == ["start"]
        held.gate.set()
        await profiler.close()
        assert calls == ["start", "stop"] and not profiler.busy

    asyncio.run(cancelled())


def test_a_trace_that_fails_says_so_and_the_next_one_works(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    profiler = Profiler("one", Steps())

    def broken(folder: Path) -> dict[str, bytes]:
        raise OSError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(profiling, "files_in", broken)
        with pytest.raises(OSError, match="no space"):
            asyncio.run(profiler.trace(5, 10))
    assert calls == ["start", "stop"]
    assert isinstance(asyncio.run(profiler.trace(5, 10)), Trace)


def test_an_operation_is_not_given_the_time_of_those_inside_it() -> None:
    events = [(0.0, 10.0, "loop"), (1.0, 4.0, "body"), (2.0, 3.0, "inner"), (5.0, 9.0, "body"), (12.0, 13.0, "loop")]
    assert sorted(own_times(events)) == [("body", 2.0), ("body", 4.0), ("inner", 1.0), ("loop", 1.0), ("loop", 3.0)]
