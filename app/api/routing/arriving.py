"""The load that has arrived lately. Plain code; the caller reads the clock."""

from collections import deque

WINDOW_S = 20.0  # the load is a mean over so long


class ArrivingLoad:
    def __init__(self) -> None:
        self._arrivals: deque[tuple[float, float]] = deque()  # when, and how many device-seconds

    def note(self, now: float, device_s: float) -> None:
        self._arrivals.append((now, device_s))
        while self._arrivals[0][0] < now - WINDOW_S:
            self._arrivals.popleft()

    def a_second(self, now: float) -> float:
        """Device-seconds that arrive in a second."""
        return sum(device_s for at, device_s in self._arrivals if at >= now - WINDOW_S) / WINDOW_S
