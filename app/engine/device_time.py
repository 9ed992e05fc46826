"""What the device worked on and for how long, cut where a waiting thread sees that a piece of work has ended.

The device does its work in the order of dispatch. Knows nothing of verbs, and reads no clock.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from app.engine.request import Request

# A wait has seen the very moment of the end if it lasted this share of the predicted seconds. If it was shorter, the
# work had perhaps ended before.
SEEN = 0.05


@dataclasses.dataclass(eq=False)
class Work:
    """A dispatch of steps or a decode, until a thread has seen its end."""

    done: Any  # what the verb returned to wait for
    shares: Sequence[tuple[Request, float]]  # of its device-seconds
    predicted_s: float
    at: float  # the device cannot have begun before
    blocked: bool  # the call returned when the device had ended the work
    alone: bool  # no other verb was called since the work before it
    ended: float = math.inf
    exact: bool = False  # the end was seen at that moment
    previous: "Work | None" = None  # while neither has ended


class DeviceTime:
    """Measures pieces of work, and gives requests their shares of the seconds. The caller holds a lock."""

    def __init__(self) -> None:
        self.busy_s = 0.0
        self.pending_s = 0.0  # predicted seconds of the work that has not ended
        self.free_at = 0.0  # the end of the latest work that has ended
        self._exact = True  # of that end
        self._latest: Work | None = None

    def begin(self, work: Work) -> None:
        self.pending_s += work.predicted_s
        work.previous, self._latest = self._latest, work

    def end(self, work: Work, now: float, waited_s: float) -> float | None:
        """Notes the end of a piece of work, and of all before it, after a wait of `waited_s`.

        Returns the seconds that the device took, or an upper bound that is below the prediction; None if it is unknown.
        Where nobody saw the end, it is the predicted one, but not later than now.
        """
        if work.ended < math.inf:
            return None
        if work.previous:
            self.end(work.previous, now, 0.0)
        begins_exactly = work.blocked or (work.alone and (self._exact or work.at >= self.free_at))
        began = max(self.free_at, work.at)
        work.exact = work.blocked or waited_s > SEEN * work.predicted_s
        work.ended = now if work.exact else min(now, began + work.predicted_s)
        took_s = max(0.0, work.ended - began)
        for request, share in work.shares:
            request.device_s += took_s * share
            request.stepped = min(request.stepped, began)
        self.busy_s += took_s
        self.free_at, self._exact = max(self.free_at, work.ended), work.exact
        self._close(work)
        return took_s if begins_exactly and (work.exact or took_s < work.predicted_s) else None

    def drop(self, work: Work, now: float) -> None:
        """Forgets a piece of work that has failed."""
        if work.ended == math.inf:
            work.ended = now
            self._close(work)

    def left_s(self, works: Sequence[Work], now: float) -> float:
        """Returns the seconds until the device has done all of `works`, as predicted."""
        left = [work for work in works if work.ended == math.inf]
        begins = max(self.free_at, left[0].at) if left else now
        return begins + sum(work.predicted_s for work in left) - now

    def _close(self, work: Work) -> None:
        self.pending_s -= work.predicted_s
        work.previous = None
        if self._latest is work:
            self._latest = None
