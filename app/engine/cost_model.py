"""How long steps and decodes take on the device at hand: measured at warm-up, and for steps corrected while serving.

Knows nothing of requests, threads or clocks.
"""

from collections.abc import Mapping

# Weights of a new measurement. The machine's pace changes for all buckets together, so any step teaches it. The
# proportion between two buckets is learned only from the first step after a change of bucket: without this separation,
# a bucket that has not run lately would look better than those that have.
PACE_WEIGHT = 0.2
PROPORTION_WEIGHT = 0.1
LEAST_STEP_S = 1e-6


class StepCost:
    """Predicts the seconds of one step of one size by its row bucket."""

    def __init__(self, step_s: Mapping[int, float]):
        self._step_s = {rows: max(step_s[rows], LEAST_STEP_S) for rows in sorted(step_s)}
        self._pace = 1.0
        self._latest_bucket: int | None = None

    @property
    def largest_bucket(self) -> int:
        return max(self._step_s)

    def bucket(self, rows: int) -> int:
        """The smallest bucket that holds `rows`."""
        return next(bucket for bucket in self._step_s if bucket >= rows)

    def step_s(self, rows: int) -> float:
        return self._step_s[self.bucket(rows)] * self._pace

    def row_s(self) -> float:
        """Device-seconds of a row where buckets are full."""
        return min(seconds / rows for rows, seconds in self._step_s.items()) * self._pace

    def observe(self, bucket: int, seconds: float) -> None:
        ratio = min(max(seconds / self.step_s(bucket), 0.1), 10.0)  # one hiccup must not turn the order upside down
        if self._latest_bucket not in (bucket, None):
            self._step_s[bucket] *= ratio**PROPORTION_WEIGHT
        self._pace *= ratio**PACE_WEIGHT
        self._latest_bucket = bucket

    def table(self) -> dict[int, float]:
        return {rows: seconds * self._pace for rows, seconds in self._step_s.items()}


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
