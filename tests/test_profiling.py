"""app/profiling.py around counters that are no engines, and what jobs/profile.py makes of events."""

import asyncio
from pathlib import Path

import pytest

from app import profiling
from app.profiling import Profiler, Trace
from jobs.profile import own_times
from tests.clusters import soon


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


def test_the_profiler_is_stopped_whatever_happens(calls: list[str]) -> None:
    profiler = Profiler("one", Steps(most=3))

    async def cancelled() -> None:
        task = asyncio.create_task(profiler.trace(100, 10))
        await asyncio.to_thread(soon, lambda: "start" in calls)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    assert calls == ["start", "stop"] and not profiler.busy


def test_an_operation_is_not_given_the_time_of_those_inside_it() -> None:
    events = [(0.0, 10.0, "loop"), (1.0, 4.0, "body"), (2.0, 3.0, "inner"), (5.0, 9.0, "body"), (12.0, 13.0, "loop")]
    assert sorted(own_times(events)) == [("body", 2.0), ("body", 4.0), ("inner", 1.0), ("loop", 1.0), ("loop", 3.0)]
