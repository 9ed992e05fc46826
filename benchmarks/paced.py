"""A pipeline whose device is a clock: the engine's verbs over numbers, each taking as long as a TPU host would take.

Up to `chips` rows a step takes the same time, beyond that in proportion. As on a device, verbs return at once and queue
on a timeline; `wait`, and `np.asarray` of decoded pixels, sleep until it has come so far. The clock is the real one, so
what the host does between dispatches costs what it costs. A picture is its seed plus the number of steps it took.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from app.diffusion.samplers import SamplerTable
from app.types import ActiveSlot
from capacity.simulate import smallest, table_of

Size = tuple[int, int]


@dataclass(frozen=True)
class Pace:
    """What the device is like. `decode_steps`: an image's decoding in steps of one row on one chip; 0 is free."""

    chips: int = 8
    step_s: float = 0.010
    decode_steps: float = 0.0

    def step(self, rows: int) -> float:
        return self.step_s * max(1.0, rows / self.chips)

    def decode(self, images: int) -> float:
        return self.decode_steps * self.step(images)


# By operations a decoding of SD 1.x at 512x512 is 3.1 rows of its UNet (2.51 to 0.80 TFLOP).
SD1_DECODE_STEPS = 3.1


@dataclass
class State:
    """One number for each slot: the seed, plus one for each step. `consumed`: given to a verb, so not to be used."""

    size: Size
    numbers: npt.NDArray[np.int64]
    consumed: bool = False


@dataclass(frozen=True)
class Encoded:
    embeds: None
    truncated: bool


@dataclass(frozen=True)
class Pixels:
    """Pictures on the device; they are on the host, as numpy's asarray gives them, once `ready_at` has come."""

    numbers: npt.NDArray[np.int64]
    size: Size
    ready_at: float

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[np.uint8]:
        sleep_until(self.ready_at)
        width, height = self.size
        greys = (self.numbers % 256).astype(np.uint8)[:, None, None, None]
        return np.broadcast_to(greys, (len(greys), height, width, 3)).astype(dtype or np.uint8)


class PacedPipeline:
    """The verbs of app/engine/engine.py. Owns the device's timeline, which is one number: when it will be idle."""

    def __init__(
        self,
        pace: Pace,
        *,
        batch_buckets: Sequence[int],
        size: Size = (512, 512),
    ):
        self.pace = pace
        self.sizes: tuple[Size, ...] = (size,)
        self.default_sampler = "ddim"
        self.row_buckets = tuple(sorted({rows for images in batch_buckets for rows in (images, 2 * images)}))
        self.decode_buckets = tuple(sorted({min(images, pace.chips) for images in batch_buckets}))
        self.num_slots = 2 * max(batch_buckets)
        self.step_s: Mapping[tuple[Size, int], float] = {(size, rows): pace.step(rows) for rows in self.row_buckets}
        self.decode_s: Mapping[tuple[Size, int], float] = {
            (size, images): pace.decode(images) for images in self.decode_buckets
        }
        self.idle_at = 0.0

    def table(self, sampler: str | None, num_inference_steps: int) -> SamplerTable:
        return table_of(num_inference_steps)

    def empty_state(self, size: Size) -> State:
        return State(size, np.zeros(self.num_slots, np.int64))

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        return [Encoded(None, truncated=False) for _ in texts]

    def insert(
        self,
        state: State,
        slot: int,
        prompt: Encoded,
        negative_prompt: Encoded,
        table: SamplerTable,
        guidance_scale: float,
        seed: int,
    ) -> State:
        numbers = consume(state)
        numbers[slot] = seed
        return State(state.size, numbers)

    def step(self, state: State, active: Sequence[ActiveSlot], count: int = 1) -> tuple[State, float]:
        numbers = consume(state)
        bucket = smallest(self.row_buckets, sum(1 + lane.guided for lane in active))
        slots = [lane.slot for lane in active]
        assert len(set(slots)) == len(slots), slots
        numbers[slots] += count
        return State(state.size, numbers), self._occupy(count * self.step_s[state.size, bucket])

    def decode(self, state: State, slots: Sequence[int]) -> Pixels:
        bucket = smallest(self.decode_buckets, len(slots))
        numbers = np.zeros(bucket, np.int64)
        numbers[: len(slots)] = state.numbers[list(slots)]
        return Pixels(numbers, state.size, self._occupy(self.decode_s[state.size, bucket]))

    def preview(self, state: State, slot: int) -> Pixels:
        return Pixels(state.numbers[[slot]], state.size, self._occupy(0.0))

    def wait(self, done: float) -> None:
        sleep_until(done)

    def _occupy(self, seconds: float) -> float:
        """Queues so much work behind what is queued; returns when it will be done."""
        self.idle_at = max(self.idle_at, time.monotonic()) + seconds
        return self.idle_at


def consume(state: State) -> npt.NDArray[np.int64]:
    """The numbers of a state that nobody may use again, as a donated array on a device."""
    assert not state.consumed, "a state that was given to a verb is used again"
    state.consumed = True
    return state.numbers.copy()


def sleep_until(moment: float) -> None:
    """On time.monotonic's clock."""
    while (left := moment - time.monotonic()) > 0:
        time.sleep(left)
