"""An estimate of how many requests will arrive soon, from those that arrived lately. Knows no clock."""

from collections import deque

WINDOW = 32  # requests that the estimate is made from
# A higher load counts as this one. With a load of 1 or more the queue grows without end, and has no expected value.
MOST_LOAD = 0.95


class ArrivalRate:
    """When the latest requests arrived, and how many device-seconds each asked for."""

    def __init__(self) -> None:
        self._latest: deque[tuple[float, float]] = deque(maxlen=WINDOW)

    def note(self, at: float, device_s: float) -> None:
        self._latest.append((at, device_s))

    def expected(self, now: float, backlog_s: float) -> float:
        """The number of requests that arrive before a device with this backlog is idle, at the rate of late.

        Arrivals extend the busy period, as in any M/G/1 queue: to backlog / (1 - load).
        """
        if len(self._latest) < 2:
            return 0.0
        seconds = max(now - self._latest[0][0], 1e-6)
        load = sum(device_s for _, device_s in self._latest) / seconds
        return len(self._latest) / seconds * backlog_s / (1 - min(load, MOST_LOAD))
