"""A virtual pipeline on the real clock, as fast as a TPU host. All other time that passes is the engine's own.

Up to `chips` rows a step takes the same time, beyond that in proportion. Verbs return at once, as on a device; `wait`,
and `np.asarray` of decoded pixels, sleep until the device has come so far.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from app.engine.virtual import RealClock, VirtualPipeline
from app.types import Size

# By operations a decode of SD 1.x at 512x512 is 3.1 rows of its UNet (2.51 to 0.80 TFLOP).
SD1_DECODE_STEPS = 3.1


@dataclass(frozen=True)
class Pace:
    """The device. `decode_steps`: the decode of an image, in steps of one row on one chip; 0 is free."""

    chips: int = 8
    step_s: float = 0.010
    decode_steps: float = 0.0

    def step(self, rows: int) -> float:
        return self.step_s * max(1.0, rows / self.chips)

    def decode(self, images: int) -> float:
        return self.decode_steps * self.step(images)


class PacedPipeline(VirtualPipeline):
    def __init__(self, pace: Pace, *, batch_buckets: Sequence[int], size: Size = (512, 512)):
        row_buckets = sorted({rows for images in batch_buckets for rows in (images, 2 * images)})
        decode_buckets = sorted({min(images, pace.chips) for images in batch_buckets})
        super().__init__(
            {(size, rows): pace.step(rows) for rows in row_buckets},
            {(size, images): pace.decode(images) for images in decode_buckets},
            num_slots=2 * max(batch_buckets),
            clock=RealClock(),
        )
