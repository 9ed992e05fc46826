"""Arrival processes: the seconds at which requests are sent, drawn before a run starts.

The load test, the benchmarks and the planner share them. This module knows nothing of requests or HTTP.

Each process is drawn at a mean rate of one request a second. `through` then stretches it to a rate that changes: an
arrival at 2.3 is sent when the integral of the rate reaches 2.3. So every process can also step, ramp and pause.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Span:
    """A rate, in requests a second, that changes linearly from `first` to `last`."""

    first: float
    last: float
    duration_s: float

    @property
    def count(self) -> float:
        """The mean number of requests in the span."""
        return (self.first + self.last) / 2 * self.duration_s


def evenly(until: float, most: int) -> Seconds:
    """One arrival each second before `until`, the first at 0, and at most `most` of them."""
    return np.arange(min(math.ceil(until), most), dtype=np.float64)


def gamma(until: float, most: int, cv: float, rng: np.random.Generator) -> Seconds:
    """Arrivals before `until` with gamma-distributed gaps of mean 1 s, and at most `most` of them.

    `cv` is the standard deviation of the gaps over their mean. A `cv` of 1 is a Poisson process; more is bursty.
    """
    arrived = np.empty(0)
    while len(arrived) < most and (not len(arrived) or arrived[-1] < until):
        gaps = rng.gamma(1 / cv**2, cv**2, min(most, math.ceil(until) + 16))
        arrived = np.append(arrived, (arrived[-1] if len(arrived) else 0.0) + np.cumsum(gaps))
    return arrived[arrived < until][:most]


def poisson(count: int, rng: np.random.Generator) -> Seconds:
    """Exactly `count` arrivals of a Poisson process with a mean gap of 1 s. Divide by a rate to get that rate."""
    return np.cumsum(rng.exponential(1.0, count))


def through(spans: Sequence[Span], arrived: Seconds) -> Seconds:
    """Stretches arrivals at one a second to the rates of the spans."""
    ends = np.cumsum([span.count for span in spans])
    starts_s = np.cumsum([0.0, *(span.duration_s for span in spans)])
    which = np.searchsorted(ends, arrived, side="right")
    times = np.empty(len(arrived))
    for i, span in enumerate(spans):
        within = arrived[which == i] - (ends[i] - span.count)
        times[which == i] = starts_s[i] + time_of(within, span)
    return times


def time_of(count: Seconds, span: Span) -> Seconds:
    """The time t at which the integral of the rate reaches `count`: count = first t + (last - first) t^2 / 2d.

    The form of this root also holds for a rate that starts at 0 and for a constant rate.
    """
    slope = (span.last - span.first) / span.duration_s
    root = span.first + np.sqrt(np.maximum(span.first**2 + 2 * slope * count, 0.0))
    return np.divide(2 * count, root, out=np.zeros_like(count), where=root > 0)


def with_bursts(times: Seconds, bursts: Sequence[tuple[float, int]]) -> Seconds:
    """Adds `count` simultaneous arrivals at each burst's time."""
    extra = [np.full(count, at) for at, count in bursts]
    return np.sort(np.concatenate([times, *extra]), kind="stable")
