"""What the host adds to a dispatch: measured at warm-up, and corrected at every dispatch while serving.

From it follow how long before the device runs out of work the host must act, and what a dispatch costs beside its
steps. Knows nothing of requests, and reads no clock.
"""

from app.types import DispatchCost

# As in TCP's retransmission timer (RFC 6298): a mean, a mean deviation, and four deviations above the mean.
MEAN_WEIGHT, DEVIATION_WEIGHT, DEVIATIONS = 1 / 8, 1 / 4, 4
OUTLIER = 3  # a value counts at most as so many times the highest that is expected


class Estimate:
    """A running mean of seconds, and how far values deviate from it."""

    def __init__(self, mean: float | None = None):
        self.values = int(mean is not None)
        self.mean = mean or 0.0
        self.deviation = self.mean / 2

    @property
    def high(self) -> float:
        """The most that is expected."""
        return self.mean + DEVIATIONS * self.deviation

    def observe(self, value: float) -> None:
        if not self.values:
            self.mean, self.deviation = value, value / 2
        else:
            if self.high:
                value = min(value, OUTLIER * self.high)
            self.deviation += DEVIATION_WEIGHT * (abs(value - self.mean) - self.deviation)
            self.mean += MEAN_WEIGHT * (value - self.mean)
        self.values += 1


class HostCost:
    def __init__(self, measured: DispatchCost):
        self._call = Estimate(measured.host_s)  # of `step`, where it does not wait for the device
        self._turn = Estimate()  # from the moment when the engine's thread could go on, to its call of `step`
        self._early = Estimate()  # how much sooner than predicted a dispatch ended
        self._blocking = float(measured.blocks)  # share of the latest calls

    @property
    def blocks(self) -> bool:
        """Whether a call of `step` returns only when the device is done."""
        return self._blocking > 0.5

    @property
    def lead_s(self) -> float:
        """Returns how long before the device runs out of work the host must turn to the next dispatch."""
        return self._turn.high + self._call.high + self._early.high

    @property
    def host_s(self) -> float:
        """Host-seconds of a dispatch: of the engine's thread, and of the call."""
        return self._turn.mean + self._call.mean

    def waited(self, call_s: float, device_s: float) -> bool:
        """Returns whether a call that took `call_s` waited for the device, which needs `device_s` for it."""
        return call_s - self._call.mean > device_s / 2

    def observe_turn(self, seconds: float) -> None:
        self._turn.observe(seconds)

    def observe_step(self, call_s: float, device_s: float) -> bool:
        """Learns from a call of `step`. Returns whether it waited for the device."""
        waited = self.waited(call_s, device_s)
        self._blocking += MEAN_WEIGHT * (waited - self._blocking)
        if not waited:
            self._call.observe(call_s)
        return waited

    def observe_end(self, predicted_s: float, took_s: float) -> None:
        self._early.observe(max(0.0, predicted_s - took_s))
