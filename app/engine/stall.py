"""Notices when a device no longer answers: a call that takes many times longer than it should.

Knows of a call only its name, when it began and how long it should take. It never interrupts one, as nothing can.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

STALL_S = 60.0  # no call is a stall before this, however short it should be
STALL_TIMES = 10  # nor before so many times its expected duration
LOOK_S = 1.0  # between two looks


@dataclass(eq=False)
class Call:
    """One call that has not returned."""

    verb: str
    began: float
    limit_s: float
    seen_s: float = 0.0  # time that passed while this process ran


class StallWatch:
    """Looks at all calls under way from a thread of its own, and reports the first that exceeds its limit, once.

    Time counts only from look to look, and at most twice the usual interval: a process that was frozen, by SIGSTOP or
    by a suspended machine, finds no stall when it wakes up.
    """

    def __init__(
        self,
        stall_s: float,
        on_stall: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ):
        self.stall_s = stall_s
        self.look_s = min(LOOK_S, stall_s / 4)
        self.stalled = ""  # which call exceeded its limit, as a sentence
        self._on_stall = on_stall
        self._clock = clock
        self._looked = clock()
        self._calls: set[Call] = set()
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._run, name="stall watch", daemon=True).start()

    def stop(self) -> None:
        self._ended.set()

    @contextmanager
    def call(self, verb: str, expected_s: float) -> Iterator[None]:
        """Around whatever may block on the device."""
        call = Call(verb, self._clock(), max(self.stall_s, STALL_TIMES * expected_s))
        with self._lock:
            self._calls.add(call)
        try:
            yield
        finally:
            with self._lock:
                self._calls.discard(call)

    def look(self) -> None:
        now = self._clock()
        passed_s, self._looked = min(now - self._looked, 2 * self.look_s), now
        with self._lock:
            calls = list(self._calls)
        for call in calls:
            call.seen_s += min(passed_s, now - call.began)
            if call.seen_s >= call.limit_s and not self.stalled:
                self.stalled = (
                    f"The device does not answer: {call.verb} has not returned for {call.seen_s:.1f} s, "
                    f"and its limit is {call.limit_s:.1f} s."
                )
                self._on_stall(self.stalled)

    def _run(self) -> None:
        while not (self.stalled or self._ended.wait(self.look_s)):
            self.look()
