"""Notices when a device no longer answers: when a call takes many times longer than predicted.

Knows of a call only its name, its thread, when it began and its predicted duration. It never interrupts a call, as
nothing can.
"""

import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

STALL_S = 60.0  # no call is a stall before this, however short its predicted duration
STALL_TIMES = 10  # nor before this many times its predicted duration
CHECK_INTERVAL_S = 1.0


@dataclass(eq=False)
class Call:
    """One call that has not returned."""

    verb: str
    thread: int
    began: float
    limit_s: float
    elapsed_s: float = 0.0  # while this process ran


class StallWatch:
    """Checks all calls under way in a thread of its own, and reports the first that exceeds its limit, once.

    From one check to the next, at most twice the usual interval counts as elapsed. So a process that was frozen, by
    SIGSTOP or by a suspended machine, finds no stall when it wakes up.
    """

    def __init__(
        self,
        stall_s: float,
        on_stall: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ):
        self.stall_s = stall_s
        self.interval_s = min(CHECK_INTERVAL_S, stall_s / 4)
        self.stalled = ""  # a sentence on the call that exceeded its limit
        self.stack = ""  # where its thread was then
        self._on_stall = on_stall
        self._clock = clock
        self._checked = clock()
        self._calls: set[Call] = set()
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._run, name="stall watch", daemon=True).start()

    def stop(self) -> None:
        self._ended.set()

    @contextmanager
    def call(self, verb: str, predicted_s: float) -> Iterator[None]:
        """Watches a block of code that may wait for the device."""
        call = Call(verb, threading.get_ident(), self._clock(), max(self.stall_s, STALL_TIMES * predicted_s))
        with self._lock:
            self._calls.add(call)
        try:
            yield
        finally:
            with self._lock:
                self._calls.discard(call)

    def check(self) -> None:
        now = self._clock()
        passed_s, self._checked = min(now - self._checked, 2 * self.interval_s), now
        with self._lock:
            calls = list(self._calls)
        for call in calls:
            call.elapsed_s += min(passed_s, now - call.began)
            if call.elapsed_s >= call.limit_s and not self.stalled:
                self.stack = stack_of(call.thread)
                self.stalled = (
                    f"The device does not answer: {call.verb} has not returned for {call.elapsed_s:.1f} s, "
                    f"and its limit is {call.limit_s:.1f} s."
                )
                self._on_stall(self.stalled)

    def _run(self) -> None:
        while not (self.stalled or self._ended.wait(self.interval_s)):
            self.check()


def stack_of(thread: int) -> str:
    """Returns what a thread is doing, as in a traceback; empty if it has ended."""
    frame = sys._current_frames().get(thread)
    return "".join(traceback.format_stack(frame)).rstrip() if frame else ""
