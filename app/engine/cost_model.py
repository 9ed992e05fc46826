"""How long steps and decodes take on the device at hand: measured at warm-up, and for steps corrected while serving.

Knows nothing of requests, threads or clocks.
"""

from bisect import bisect_left
from collections.abc import Mapping

WEIGHT = 0.2  # of a new measurement
RECENT = 256  # a correction is forgotten after so many dispatches that were of other buckets
LEAST_STEP_S = 1e-6


class StepCost:
    """Predicts the seconds of a dispatch of one size by its row bucket: launch + count x step.

    Each bucket is corrected by its own dispatches. What the recent corrections of several buckets have in common is the
    pace of the device, and holds for the other buckets too. A single bucket says nothing about the others.
    """

    def __init__(self, step_s: Mapping[int, float], launch_s: Mapping[int, float] | None = None):
        self._step_s = {rows: max(step_s[rows], LEAST_STEP_S) for rows in sorted(step_s)}
        self._launch_s = dict(launch_s or dict.fromkeys(step_s, 0.0))
        self._corrections: dict[int, float] = {}  # measured over warm-up's seconds, by bucket
        self._latest: dict[int, int] = {}  # the number of the latest dispatch, by bucket
        self._dispatches = 0
        self._pace = 1.0
        self._buckets = list(self._step_s)
        self.largest_bucket = self._buckets[-1]
        self._correct()

    def _correct(self) -> None:
        """Works out once what the scheduler asks for many times in a turn."""
        self._corrected_s = {rows: self._step_s[rows] * self._correction(rows) for rows in self._buckets}
        self._row_s = min(seconds / rows for rows, seconds in self._corrected_s.items())

    def _correction(self, bucket: int) -> float:
        return self._corrections.get(bucket, self._pace)

    def bucket(self, rows: int) -> int:
        """The smallest bucket that holds `rows`."""
        return self._buckets[bisect_left(self._buckets, rows)]

    def step_s(self, rows: int) -> float:
        return self._corrected_s[self.bucket(rows)]

    def launch_s(self, rows: int) -> float:
        """What a dispatch takes beside its steps."""
        bucket = self.bucket(rows)
        return self._launch_s[bucket] * self._correction(bucket)

    def dispatch_s(self, rows: int, count: int) -> float:
        return self.launch_s(rows) + count * self.step_s(rows)

    def row_s(self) -> float:
        """Device-seconds of a row where buckets are full."""
        return self._row_s

    def observe(self, bucket: int, count: int, seconds: float) -> None:
        """Corrects a bucket by a dispatch that took `seconds`."""
        ratio = seconds / self.dispatch_s(bucket, count)
        ratio = min(max(ratio, 0.1), 10.0)  # one hiccup must not turn the order upside down
        corrections = self._corrections | {bucket: self._correction(bucket) * ratio**WEIGHT}
        self._dispatches += 1
        self._latest[bucket] = self._dispatches
        recent = {rows: value for rows, value in corrections.items() if self._latest[rows] > self._dispatches - RECENT}
        self._corrections, self._pace = recent, pace_of(list(recent.values()))
        self._correct()

    def table(self) -> dict[int, float]:
        return dict(self._corrected_s)


def pace_of(corrections: list[float]) -> float:
    """Returns the part that several corrections have in common, and 1 for a single one."""
    if len(corrections) > 1 and min(corrections) > 1:
        return min(corrections)
    if len(corrections) > 1 and max(corrections) < 1:
        return max(corrections)
    return 1.0


class DecodeCost:
    """Predicts the seconds of decodes of one size by bucket."""

    def __init__(self, decode_s: Mapping[int, float]):
        self.decode_s = dict(sorted(decode_s.items()))
        self._total_s = [0.0]  # of the cheapest way to decode so many images
        for images in range(1, max(self.decode_s) + 2):
            self._total_s.append(
                min(seconds + self._total_s[max(0, images - bucket)] for bucket, seconds in self.decode_s.items())
            )

    @property
    def largest_bucket(self) -> int:
        return max(self.decode_s)

    def bucket(self, images: int) -> int:
        """The bucket with the least cost per image for the first decode of `images` images."""
        return min(self.decode_s, key=lambda bucket: (self.decode_s[bucket] / min(bucket, images), bucket))

    def saved_s(self, images: int) -> float:
        """Device-seconds saved by decoding one more image together with `images`, rather than alone."""
        return self._total_s[images] + self._total_s[1] - self._total_s[images + 1]

    def image_s(self) -> float:
        """Device-seconds of an image where buckets are full."""
        return min(seconds / images for images, seconds in self.decode_s.items())
