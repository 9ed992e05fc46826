"""Why the engine does not answer a request. Each error says, as far as known, what the client can do about it."""


class QueueFull(Exception):
    """The request was not queued; `retry_after_s` estimates when there is room for it."""

    def __init__(self, retry_after_s: float):
        super().__init__(f"the queue is full; retry in {retry_after_s:.1f} s")
        self.retry_after_s = retry_after_s


class DeadlineUnmeetable(Exception):
    """The request was not queued, as it would take `estimate_s`. It fits after `retry_after_s` if no others come."""

    def __init__(self, estimate_s: float, retry_after_s: float):
        super().__init__(f"it would take {estimate_s:.1f} s; retry in {retry_after_s:.1f} s")
        self.estimate_s = estimate_s
        self.retry_after_s = retry_after_s


class EngineStopped(Exception):
    """The engine's thread has ended, by `close` or by a failure."""


class EngineStalled(EngineStopped):
    """The engine has given up because the device no longer answers."""
