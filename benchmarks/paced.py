"""A virtual pipeline on the real clock, as fast as an accelerator. All other time that passes is the engine's own.

Up to `chips` rows a step takes the same time, unless chips divide images; beyond that in proportion. Verbs return as
soon as a device lets them; `wait`, and `np.asarray` of decoded pixels, sleep until the device has come so far.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from app.diffusion.timing import timed
from app.engine.virtual import Clock, Done, RealClock, VirtualPipeline
from app.types import DispatchCost, Size
from capacity.chips import CHIPS

# By operations a decode of SD 1.x at 512x512 is 3.1 rows of its UNet (2.51 to 0.80 TFLOP).
SD1_DECODE_STEPS = 3.1
# Its encode over the eight chips of a v5litepod-8 is 0.28 rows, of which a chip takes two a step: cycles that libtpu
# estimates for each chip (docs/measured.md), and what the chips exchange, which it does not estimate. They wait for a
# neighbour's rows before each of 25 convolutions, for a sum at each of 22 group norms, and for keys and values.
V5E_HZ, ROW_CYCLES, ENCODE_CYCLES = CHIPS["v5e"].clock, 24.1e6 / 2, 2.78e6
EXCHANGES, EXCHANGE_S = 25 + 22, 5e-6  # assumed: an exchange of few bytes takes five microseconds
GATHERED, LINK_BYTES_S = 2 * 4 * 2**20, 45e9  # bytes that reach a chip, and one direction of a link
SD1_ENCODE_STEPS = (ENCODE_CYCLES + V5E_HZ * (EXCHANGES * EXCHANGE_S + GATHERED / LINK_BYTES_S)) / ROW_CYCLES
SETTLED_S, HICCUP_EVERY_S = 1.0, 1.0  # device-seconds: until clocks have ramped up, and from one hiccup to the next


@dataclass(frozen=True)
class Pace:
    """The device. `decode_steps`: the decode of an image, in steps of one row on one chip; 0 is free."""

    chips: int = 8
    step_s: float = 0.010
    decode_steps: float = 0.0
    host_s: float = 0.0  # of each call of a verb
    launch_s: float = 0.0  # what a dispatch adds to its steps
    blocks: bool = False  # a call returns when the device is done
    cold: float = 1.0  # how many times slower the clocks are at first
    hiccup_s: float = 0.0  # what one dispatch takes longer, now and then
    divided: float = 0.0  # how much of their speed chips keep that divide an image; 0: fewer rows than chips stay whole
    encode_steps: float = 0.0  # the encode of an image over all chips, in steps as `decode_steps`

    def step(self, rows: int) -> float:
        if self.divided and rows < self.chips:
            return self.step_s * min(1.0, rows / self.chips / self.divided)
        return self.step_s * max(1.0, rows / self.chips)

    def decode(self, images: int) -> float:
        return self.decode_steps * self.step(images)


class PacedPipeline(VirtualPipeline):
    def __init__(
        self, pace: Pace, *, batch_buckets: Sequence[int], size: Size = (512, 512), clock: Clock | None = None
    ):
        row_buckets = sorted({rows for images in batch_buckets for rows in (images, 2 * images)})
        decode_buckets = sorted({min(images, pace.chips) for images in batch_buckets})
        self.device = pace
        self.size = size
        super().__init__(
            {(size, rows): pace.step(rows) for rows in row_buckets},
            {(size, images): pace.decode(images) for images in decode_buckets},
            num_slots=2 * max(batch_buckets),
            encode_image_s=pace.encode_steps * pace.step(1),
            launch_s=pace.launch_s,
            dispatch_cost=DispatchCost(pace.blocks, pace.host_s),
            clock=clock or RealClock(),
        )

    def warm_up(self, budget_s: float = 2.0) -> None:
        """Replaces what the engine is told by what a replica would measure at its start."""

        def step(rows: int, count: int) -> Done:
            return Done(self.occupy(self.steps_take_s(self.size, rows, count)))

        def decode(images: int) -> Done:
            return Done(self.occupy(self.device.decode(images)))

        times = timed(
            step, decode, self.wait, self.row_buckets, self.decode_buckets, budget_s=budget_s, clock=self.clock
        )
        self.step_s = {(self.size, rows): seconds for rows, seconds in times.step_s.items()}
        self.launch_s = {(self.size, rows): seconds for rows, seconds in times.launch_s.items()}
        self.decode_s = {(self.size, images): seconds for images, seconds in times.decode_s.items()}
        self.dispatch_cost = times.dispatch_cost

    def steps_take_s(self, size: Size, bucket: int, count: int) -> float:
        return self.device.launch_s + count * self.device.step(bucket)

    def decode_takes_s(self, size: Size, bucket: int) -> float:
        return self.device.decode(bucket)

    def occupy(self, seconds: float) -> float:
        seconds *= self.device.cold + (1 - self.device.cold) * min(1.0, self.busy_s / SETTLED_S)
        if (self.busy_s + seconds) // HICCUP_EVERY_S > self.busy_s // HICCUP_EVERY_S:
            seconds += self.device.hiccup_s
        return super().occupy(seconds)
