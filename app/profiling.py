"""A profiler's trace of a replica's next steps, under the load that it has. Knows of engines only how many steps they
have made.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

LOOK_S = 0.005


@dataclass(frozen=True)
class Trace:
    """What JAX's profiler wrote: an .xplane.pb, which XProf reads, and a .trace.json.gz, which Perfetto reads."""

    replica: str
    steps: int  # made meanwhile; a few more than were asked for
    seconds: float
    files: dict[str, bytes]  # by their endings


class Profiler:
    """One trace at a time, as JAX has one profiler in a process."""

    def __init__(self, replica: str, steps: Callable[[], int]) -> None:
        """`steps` counts them, and never goes back."""
        self.replica, self.steps = replica, steps
        self.busy = False

    async def trace(self, steps: int, timeout_s: float) -> Trace | str:
        """From the first step that is made to the last that is asked for, or a sentence on why there is none."""
        if self.busy:
            return "A trace of this replica is being taken already."
        self.busy = True
        try:
            with TemporaryDirectory() as folder, ThreadPoolExecutor(1, "profiler") as thread:
                return await self._trace(steps, time.monotonic() + timeout_s, Path(folder), thread)
        finally:
            self.busy = False

    async def _trace(self, steps: int, deadline: float, folder: Path, thread: ThreadPoolExecutor) -> Trace | str:
        before = self.steps()
        if not await self._reaches(before + 1, deadline):
            return "The replica made no step in that time: send it requests, and profile it then."
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(
            thread, start, folder
        )  # it may take a second, and the event loop has others to serve
        try:
            first, began = self.steps(), time.monotonic()
            await self._reaches(first + steps, deadline)
            made, seconds = self.steps() - first, time.monotonic() - began
        finally:
            await loop.run_in_executor(thread, stop)
        files = await loop.run_in_executor(thread, written, folder)
        return Trace(self.replica, made, seconds, files)

    async def _reaches(self, count: int, deadline: float) -> bool:
        while self.steps() < count:
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(LOOK_S)
        return True


def start(folder: Path) -> None:
    import jax

    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # calls in Python would be most of the file, and slow the engine
    jax.profiler.start_trace(folder, profiler_options=options)


def stop() -> None:
    import jax

    jax.profiler.stop_trace()  # type: ignore[no-untyped-call]


def written(folder: Path) -> dict[str, bytes]:
    found = {ending: next(folder.rglob(f"*{ending}"), None) for ending in (".xplane.pb", ".trace.json.gz")}
    return {ending: file.read_bytes() for ending, file in found.items() if file}
