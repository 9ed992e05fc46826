"""Traces a replica's next steps with JAX's profiler, under its current load. Knows of engines only their step count.

A thread of its own does the work, because starting JAX's profiler may take a second, in which the event loop has other
requests to serve. A trace ends early when its caller is cancelled. The thread stops the profiler in any case.
"""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from app.engine.worker import Worker

LOOK_S = 0.005
STOP_S = 10.0  # how long `close` waits for the trace under way


@dataclass(frozen=True)
class Trace:
    """What JAX's profiler wrote: an .xplane.pb, which XProf reads, and a .trace.json.gz, which Perfetto reads."""

    replica: str
    steps: int  # in the trace; a few more than were asked for
    seconds: float
    files: dict[str, bytes]  # by their endings


class Profiler:
    """Takes one trace at a time, as JAX has one profiler in a process."""

    def __init__(self, replica: str, steps: Callable[[], int]) -> None:
        """`steps` counts them, and never goes back. It is called from another thread."""
        self.replica, self.steps = replica, steps
        self.under_way: Future[Trace | str] | None = None
        self.unwanted = threading.Event()

    @property
    def busy(self) -> bool:
        return self.under_way is not None and not self.under_way.done()

    async def trace(self, steps: int, timeout_s: float) -> Trace | str:
        """A trace of so many steps, or a sentence on why there is none."""
        if self.busy:
            return "A trace of this replica is being taken already."
        self.unwanted = unwanted = threading.Event()
        thread = Worker("profiler")
        self.under_way = thread.submit(self._take, steps, time.monotonic() + timeout_s, unwanted)
        thread.shutdown(wait=False)
        taken = asyncio.wrap_future(self.under_way)
        try:
            return await asyncio.shield(taken)
        except asyncio.CancelledError:
            unwanted.set()
            # The next trace may begin once this one has ended. A second cancellation does not wait for that.
            await asyncio.wait({taken})
            raise

    async def close(self) -> None:
        """Ends the trace under way, if there is one, after the steps so far."""
        self.unwanted.set()
        if self.under_way and self.busy:
            await asyncio.wait({asyncio.wrap_future(self.under_way)}, timeout=STOP_S)

    def _take(self, steps: int, deadline: float, unwanted: threading.Event) -> Trace | str:
        if not self._reaches(self.steps() + 1, deadline, unwanted):
            return "The replica made no step in that time: send it requests, and profile it then."
        with TemporaryDirectory() as folder:
            start(Path(folder))
            try:
                first, began = self.steps(), time.monotonic()
                self._reaches(first + steps, deadline, unwanted)
                made, seconds = self.steps() - first, time.monotonic() - began
            finally:
                stop()
            return Trace(self.replica, made, seconds, files_in(Path(folder)))

    def _reaches(self, count: int, deadline: float, unwanted: threading.Event) -> bool:
        while self.steps() < count:
            if time.monotonic() > deadline or unwanted.wait(LOOK_S):
                return False
        return not unwanted.is_set()


def start(folder: Path) -> None:
    import jax

    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # calls in Python would be most of the file, and slow the engine
    jax.profiler.start_trace(folder, profiler_options=options)


def stop() -> None:
    import jax

    jax.profiler.stop_trace()  # type: ignore[no-untyped-call]


def files_in(folder: Path) -> dict[str, bytes]:
    files = {ending: next(folder.rglob(f"*{ending}"), None) for ending in (".xplane.pb", ".trace.json.gz")}
    return {ending: file.read_bytes() for ending, file in files.items() if file}
