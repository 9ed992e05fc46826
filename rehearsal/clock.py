"""A clock that moves when somebody sleeps on it, so that the minutes for which Ray polls Google pass at once."""

import time as real
from collections.abc import Iterator
from contextlib import contextmanager

from rehearsal.ray_parts import waiting_modules


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = real.time()

    def time(self) -> float:
        return self.now

    monotonic = time

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def __getattr__(self, name: str) -> object:
        return getattr(real, name)


@contextmanager
def waits_pass(clock: Clock) -> Iterator[None]:
    modules = waiting_modules()
    for module in modules:
        vars(module)["time"] = clock
    try:
        yield
    finally:
        for module in modules:
            vars(module)["time"] = real
