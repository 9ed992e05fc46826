"""Who shares the next step, in which order, and when one that waits would be done. Measured step times decide.

Sharing a step is free only while the device would otherwise idle. Where two images in one step take twice as long as
one, running both makes both slow, and one after the other is better for everybody. So the engine asks `at_once` how
many of the pictures in line make images come fastest, and runs the first that many. Knows nothing of threads, devices
or requests.
"""

import heapq
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

# How far a measured time moves what was known. The machine's pace changes for all buckets together, and any step tells
# it: without that, a bucket that has not run lately would look better than those that have. Their proportions only the
# first step in another bucket than before can tell.
PACE = 0.2
SHAPE = 0.1


class Lane(NamedTuple):
    """A slot in a step; a guided one costs two UNet rows, the unconditional and the conditional."""

    slot: int
    guided: bool

    @property
    def rows(self) -> int:
        return 1 + self.guided


class Work(NamedTuple):
    """What is left of a picture."""

    steps: int
    rows: int


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


def at_once(line: Sequence[int], profile: Profile, gain: float, fixed: int | None = None) -> int:
    """How many of a line of pictures, given by their rows, should share the next step.

    A larger bucket must raise rows per second by the share `gain` over the best smaller one; within a bucket one more
    costs nothing. `fixed` overrides the measurement, never the largest bucket.
    """
    filled: dict[int, tuple[int, int]] = {}  # bucket -> (pictures, rows) that it holds of the line
    rows = 0
    for count, more in enumerate(line, 1):
        rows += more
        if rows > profile.largest or (fixed is not None and count > fixed):
            break
        filled[profile.bucket(rows)] = (count, rows)
    best, best_rate = 0, 0.0
    for bucket, (count, rows) in filled.items():  # ascending, as rows only grow
        rate = rows / profile.step_s(bucket)
        if fixed is not None or rate > best_rate * (1 + gain):
            best, best_rate = count, rate
    return best


def schedule(
    line: Sequence[Work], profile: Profile, gain: float, fixed: int | None = None
) -> list[tuple[float, float]]:
    """When each picture of a line begins and is denoised, in seconds from now, if nothing joins: a list schedule in
    which each takes the place of the first of those before it that ends."""
    places = at_once([work.rows for work in line], profile, gain, fixed)
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
