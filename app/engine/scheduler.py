"""Who shares the next step, in which order, and when one that waits would be done. Measured step times decide.

Sharing a step is free only while the device would otherwise idle. Where two images in one step take twice as long as
one, running both makes both slow, and one after the other is better for everybody. In between it depends on the load:
what a shared step gains helps those who wait, and slows those who run. So the engine asks `at_once` how many of the
pictures in line should share the next step, and runs the first that many. Knows nothing of threads or devices.
"""

import heapq
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

# How far a measured time moves what was known. The machine's pace changes for all buckets together, and any step tells
# it: without that, a bucket that has not run lately would look better than those that have. Their proportions only the
# first step in another bucket than before can tell.
PACE = 0.2
SHAPE = 0.1
LATELY = 32  # requests that tell how fast others will come
FULL = 0.95  # a higher load is taken for this one: what an endless queue would be worth, nobody knows


class Work(NamedTuple):
    """What is left of a picture. `last`: with it, its request is answered."""

    steps: int
    rows: int
    last: bool = True


class Profile:
    """Seconds of one step of one size by row bucket: measured at warm-up, corrected while serving."""

    def __init__(self, step_s: Mapping[int, float]):
        self._step_s = {rows: max(step_s[rows], 1e-6) for rows in sorted(step_s)}
        self._pace = 1.0
        self._latest: int | None = None  # bucket that told the pace

    @property
    def largest(self) -> int:
        return max(self._step_s)

    def bucket(self, rows: int) -> int:
        """The smallest bucket that holds so many rows."""
        return next(bucket for bucket in self._step_s if bucket >= rows)

    def step_s(self, rows: int) -> float:
        return self._step_s[self.bucket(rows)] * self._pace

    def row_s(self) -> float:
        """What a row of a step costs where buckets are full: device-seconds."""
        return min(seconds / rows for rows, seconds in self._step_s.items()) * self._pace

    def observe(self, bucket: int, seconds: float) -> None:
        ratio = min(max(seconds / self.step_s(bucket), 0.1), 10.0)  # one hiccup must not turn the order upside down
        if self._latest not in (bucket, None):
            self._step_s[bucket] *= ratio**SHAPE
        self._pace *= ratio**PACE
        self._latest = bucket

    def table(self) -> dict[int, float]:
        return {rows: seconds * self._pace for rows, seconds in self._step_s.items()}


def at_once(line: Sequence[Work], profile: Profile, gain: float, coming: float, fixed: int | None = None) -> int:
    """How many of a line of pictures should share the next step.

    Within a bucket one more costs nothing. A larger bucket must raise rows per second by the share `gain` over the best
    smaller one, and lower by as much what latencies add up to if the line goes through in groups like it: those of the
    requests in line, and of the `coming` who will arrive before the device is idle. `fixed` overrides all this, never
    the largest bucket.
    """
    sums = list(accumulate(work.rows for work in line))
    filled: dict[int, int] = {}  # bucket -> pictures that it holds of the line
    for count, rows in enumerate(sums, 1):
        if rows > profile.largest or (fixed is not None and count > fixed):
            break
        filled[profile.bucket(rows)] = count
    if fixed is not None:
        return max(filled.values(), default=0)

    best, least_s, best_rate = 0, math.inf, 0.0
    for bucket, count in filled.items():  # ascending, as rows only grow
        rows, step_s = sums[count - 1], profile.step_s(bucket)
        if rows / step_s <= best_rate * (1 + gain):
            continue
        best_rate = rows / step_s
        groups = sum(math.ceil(until / rows) for until, work in zip(sums, line, strict=True) if work.last)
        latencies_s = step_s * (groups + coming * sums[-1] / rows)
        if latencies_s * (1 + gain) < least_s:
            best, least_s = count, latencies_s
    return best


def schedule(
    line: Sequence[Work], profile: Profile, gain: float, coming: float, fixed: int | None = None
) -> list[tuple[float, float]]:
    """When each picture of a line begins and is denoised, in seconds from now, if nothing joins: a list schedule in
    which each takes the place of the first of those before it that ends."""
    places = at_once(line, profile, gain, coming, fixed)
    free = [0.0] * places
    spans = []
    for work in line:  # as if those who share its steps were like it
        begins = heapq.heappop(free)
        ends = begins + work.steps * profile.step_s(min(work.rows * places, profile.largest))
        heapq.heappush(free, ends)
        spans.append((begins, ends))
    return spans


def device_s(line: Iterable[Work], profile: Profile) -> float:
    """Device-seconds that are left in a line of pictures, at the best that buckets can do."""
    return sum(work.steps * work.rows for work in line) * profile.row_s()


class Arrivals:
    """When the latest requests came, and how much they asked for."""

    def __init__(self) -> None:
        self._latest: deque[tuple[float, float]] = deque(maxlen=LATELY)

    def note(self, at: float, device_s: float) -> None:
        self._latest.append((at, device_s))

    def coming(self, now: float, backlog_s: float) -> float:
        """How many requests should arrive before a device with so much to do is idle, if they come as they came.

        Those who arrive meanwhile keep it busy longer, as in any M/G/1 queue: for backlog / (1 - load) in all.
        """
        if len(self._latest) < 2:
            return 0.0
        seconds = max(now - self._latest[0][0], 1e-6)
        load = sum(device_s for _, device_s in self._latest) / seconds
        return len(self._latest) / seconds * backlog_s / (1 - min(load, FULL))


class Decoding:
    """Seconds of a decode of one size by bucket, measured at warm-up."""

    def __init__(self, decode_s: Mapping[int, float]):
        self.decode_s = dict(sorted(decode_s.items()))
        self._costs = [0.0]
        for images in range(1, max(self.decode_s) + 2):
            self._costs.append(min(seconds + self._costs[max(0, images - b)] for b, seconds in self.decode_s.items()))

    def bucket(self, images: int) -> int:
        """The bucket to decode so many with, or the first of them: the one that costs least for each."""
        return min(self.decode_s, key=lambda bucket: (self.decode_s[bucket] / min(bucket, images), bucket))

    def due(self, images: int, next_s: float, others: int) -> bool:
        """Whether to decode so many finished pictures now, or with the next one, which is finished in `next_s`.

        A decode holds up all `others` that run or wait. It is put off if those that are finished wait less for the
        next one, all together, than sharing a decode with it saves the others.
        """
        if images >= max(self.decode_s):
            return True
        saved_s = self._costs[images] + self._costs[1] - self._costs[images + 1]
        return next_s * images >= saved_s * others

    def image_s(self) -> float:
        """What a picture costs where buckets are full: device-seconds."""
        return min(seconds / images for images, seconds in self.decode_s.items())
