"""When requests are to be sent: seconds from the start of a run, drawn in advance. Knows nothing of requests or HTTP.

An arrival process is drawn at one a second and then seen through a rate that changes: what arrives at 1, 2.3, 2.9 ...
is sent when the integral of the rate has reached that. So every process can also step, ramp, and rest.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Span:
    """A rate, in requests a second, that goes evenly from one value to the other."""

    first: float
    last: float
    duration_s: float

    @property
    def count(self) -> float:
        """How many requests it makes on average."""
        return (self.first + self.last) / 2 * self.duration_s


def evenly(until: float, most: int) -> Seconds:
    """One a second before `until`, the first at 0; no more than `most`."""
    return np.arange(min(math.ceil(until), most), dtype=np.float64)


def gamma(until: float, most: int, cv: float, rng: np.random.Generator) -> Seconds:
    """One a second on average. `cv` is the gaps' standard deviation over their mean: 1 is Poisson, more is bursty."""
    arrived = np.empty(0)
    while len(arrived) < most and (not len(arrived) or arrived[-1] < until):
        gaps = rng.gamma(1 / cv**2, cv**2, min(most, math.ceil(until) + 16))
        arrived = np.append(arrived, (arrived[-1] if len(arrived) else 0.0) + np.cumsum(gaps))
    return arrived[arrived < until][:most]


def through(spans: Sequence[Span], arrived: Seconds) -> Seconds:
    """Arrivals at one a second, seen through the rates of the spans."""
    ends = np.cumsum([span.count for span in spans])
    starts_s = np.cumsum([0.0, *(span.duration_s for span in spans)])
    which = np.searchsorted(ends, arrived, side="right")
    times = np.empty(len(arrived))
    for i, span in enumerate(spans):
        within = arrived[which == i] - (ends[i] - span.count)
        times[which == i] = starts_s[i] + time_of(within, span)
    return times


def time_of(count: Seconds, span: Span) -> Seconds:
    """When the integral of the rate has reached `count`: the root of count = first t + (last - first) t^2 / 2d,
    written so that a rate of 0 at the start, or one that does not change, needs no case of its own."""
    slope = (span.last - span.first) / span.duration_s
    root = span.first + np.sqrt(np.maximum(span.first**2 + 2 * slope * count, 0.0))
    return np.divide(2 * count, root, out=np.zeros_like(count), where=root > 0)


def with_bursts(times: Seconds, bursts: Sequence[tuple[float, int]]) -> Seconds:
    """Adds `count` requests at once at each moment."""
    extra = [np.full(count, at) for at, count in bursts]
    return np.sort(np.concatenate([times, *extra]), kind="stable")
