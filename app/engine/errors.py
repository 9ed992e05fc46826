"""Why the engine does not answer a request. Each error says, as far as known, what the client can do about it."""

from app.types import Resumed


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


class NotResumable(Exception):
    """What another engine made of a request does not fit the pipeline of this one."""


class EngineStopped(Exception):
    """The engine does not go on with the request: its thread has ended, by `close` or by a failure."""


class HandedOver(EngineStopped):
    """The engine has let the request go, and another one can go on with it: with `resumed`, or from its beginning."""

    def __init__(self, resumed: Resumed | None = None):
        super().__init__("the request goes on in another engine")
        self.resumed = resumed  # None: nothing was made of it


class EngineStalled(EngineStopped):
    """The engine has given up because the device no longer answers."""
