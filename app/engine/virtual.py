"""A stand-in for a pipeline whose device only takes time, for tests, the planner and paced benchmarks.

The device works through a timeline with as many seconds for each program as a table says. On a virtual clock that time
passes at once; on the real one `wait` sleeps. A call may take the host some time, and may block until the device is
done. An image shows its seed plus the number of its steps, so what a request should get can be computed by hand.
Knows nothing of networks, and of engines only the verbs that they call.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NoReturn, Protocol

import numpy as np
import numpy.typing as npt

from app.diffusion.samplers import HISTORY, SamplerTable
from app.types import ActiveSlot, Capabilities, DispatchCost, Edit, Generation, Size

LONGEST_TEXT = 40  # characters; longer texts are truncated
NUMBER_BYTES = 8  # of an image, at its beginning
FREE_DISPATCH = DispatchCost()


class Clock(Protocol):
    def __call__(self) -> float: ...
    def reach(self, moment: float) -> None: ...


class VirtualClock:
    """A clock that stands still until it is moved."""

    def __init__(self, now: float = 0.0):
        self.now = now

    def __call__(self) -> float:
        return self.now

    def reach(self, moment: float) -> None:
        self.now = max(self.now, moment)


class RealClock:
    def __call__(self) -> float:
        return time.monotonic()

    def reach(self, moment: float) -> None:
        while (left := moment - time.monotonic()) > 0:
            time.sleep(left)


@dataclass(frozen=True)
class Call:
    """A call of a verb. The verb "read" is `np.asarray` of pixels."""

    verb: str
    size: Size | None = None
    seeds: tuple[int, ...] = ()  # of its images
    slots: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()
    count: int = 0  # steps
    bucket: int = 0
    at: float = 0.0
    seconds: float = 0.0  # on the device


@dataclass(frozen=True)
class Encoded:
    text: str
    truncated: bool
    error: Exception | None = None


@dataclass(frozen=True)
class SlotState:
    """An image in its slot."""

    seed: int
    steps: int
    guided: bool
    taken: int = 0  # steps so far


@dataclass
class State:
    """The slots of one size. Whatever is made of them raises `error` when it is waited for."""

    size: Size
    slots: list[SlotState | None]
    error: Exception | None = None
    consumed: bool = False


@dataclass(frozen=True)
class Done:
    ready_at: float
    error: Exception | None = None


@dataclass(frozen=True)
class Exported:
    """An image that leaves the device. `bytes` waits for it."""

    pipeline: "VirtualPipeline"
    image: SlotState
    ready_at: float
    error: Exception | None = None

    def __bytes__(self) -> bytes:
        self.pipeline.called(Call("read", seeds=(self.image.seed,)))
        self.pipeline.clock.reach(self.ready_at)
        if self.error:
            raise self.error
        return json.dumps(asdict(self.image)).encode()


@dataclass(frozen=True)
class Pixels:
    """As many images on the device as the bucket holds. `np.asarray` waits for them."""

    pipeline: "VirtualPipeline"
    size: Size
    seeds: tuple[int, ...]
    numbers: tuple[int, ...]
    bucket: int
    ready_at: float
    error: Exception | None = None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[np.uint8]:
        self.pipeline.called(Call("read", self.size, self.seeds))
        self.pipeline.clock.reach(self.ready_at)
        if self.error:
            raise self.error
        width, height = self.size
        images = np.zeros((self.bucket, height, width, 3), np.uint8)
        for image, number in zip(images.reshape(self.bucket, -1), self.numbers, strict=False):
            image[:NUMBER_BYTES] = np.frombuffer(number.to_bytes(NUMBER_BYTES), np.uint8)
        return images


def number_of(pixels: npt.NDArray[np.uint8]) -> int:
    """Reads from an image its seed plus the steps that it took."""
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
    return int.from_bytes(pixels.tobytes()[:NUMBER_BYTES])


class VirtualPipeline:
    """The verbs over the timeline of a device. A call that no engine may make raises AssertionError."""

    default_sampler = "ddim"
    capabilities = Capabilities(edits=True, masks=True)

    def __init__(
        self,
        step_s: Mapping[tuple[Size, int], float],
        decode_s: Mapping[tuple[Size, int], float],
        *,
        num_slots: int,
        encode_s: float = 0.0,
        encode_image_s: float = 0.0,
        reference_step_s: Mapping[tuple[Size, int], float] | None = None,
        launch_s: float | Mapping[tuple[Size, int], float] = 0.0,
        dispatch_cost: DispatchCost = FREE_DISPATCH,
        clock: Clock,
    ):
        """Takes the seconds of a step by size and rows, of a decode by size and images, and of encoding a text or
        an image; and of a step whose slots look at images, by default as of any other.

        `launch_s` is what a dispatch adds to its steps. Every verb costs the host `dispatch_cost`.
        """
        self.step_s, self.decode_s, self.encode_s = step_s, decode_s, encode_s
        self.launch_s = dict.fromkeys(step_s, launch_s) if isinstance(launch_s, float) else launch_s
        self.dispatch_cost = self.device_cost = dispatch_cost  # what the engine is told, and what is true
        self.encode_image_s = dict.fromkeys((size for size, _ in step_s), encode_image_s)
        self.reference_step_s = {} if reference_step_s is None else reference_step_s
        self.sizes = tuple(dict.fromkeys(size for size, _ in step_s))
        self.row_buckets = tuple(sorted({rows for _, rows in step_s}))
        self.decode_buckets = tuple(sorted({images for _, images in decode_s}))
        self.num_slots = num_slots
        self.clock = clock
        self.pace = 1.0  # how many times longer than in the tables everything takes
        self.idle_at = clock()  # when the device will have done all its work
        self.busy_s = 0.0

    def called(self, call: Call) -> Exception | None:
        """Tests override it to record calls, to raise, or to return an error that the result of the call then has."""
        return None

    def steps_take_s(self, size: Size, bucket: int, count: int) -> float:
        """Device-seconds of a dispatch. By default the engine's tables are right."""
        return self.launch_s[size, bucket] + count * self.step_s[size, bucket]

    def decode_takes_s(self, size: Size, bucket: int) -> float:
        return self.decode_s[size, bucket]

    def refuse(self, what: str) -> NoReturn:
        """Raises for a call that no engine may make."""
        raise AssertionError(what)

    def check(self, generation: Generation) -> Generation:
        """Every request can be followed."""
        return generation

    def table(
        self, sampler: str | None, num_inference_steps: int, size: Size | None = None, strength: float | None = None
    ) -> SamplerTable:
        return blank_table(num_inference_steps if strength is None else max(1, int(num_inference_steps * strength)))

    def empty_state(self, size: Size) -> State:
        return State(size, [None] * self.num_slots)

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        if not texts or len(set(texts)) < len(texts):
            self.refuse(f"encode of {texts}")
        error = self.called(Call("encode", texts=tuple(texts)))
        self.occupy(len(texts) * self.encode_s)
        return [Encoded(text, len(text) > LONGEST_TEXT, error) for text in texts]

    def encode_image(self, edit: Edit, size: Size) -> Done:
        if edit.image is not None and edit.image.shape != (size[1], size[0], 3):
            self.refuse(f"encode of an image {edit.image.shape} at {size}")
        seconds = edit.images * self.encode_image_s[size] * self.pace
        error = self.called(Call("encode_image", size, at=self.clock(), seconds=seconds))
        return Done(self.occupy(seconds), error)

    def insert(
        self,
        state: State,
        slot: int,
        prompt: Encoded,
        negative_prompt: Encoded,
        table: SamplerTable,
        guidance_scale: float,
        seed: int,
        fields: Mapping[str, Any] = MappingProxyType({}),
        edit: Done | None = None,
    ) -> State:
        slots = self._consume(state)
        if not 0 <= slot < self.num_slots:
            self.refuse(f"insert into slot {slot}")
        slots[slot] = SlotState(seed, len(table), guidance_scale > 1)
        error = self.called(Call("insert", state.size, (seed,), (slot,), (prompt.text, negative_prompt.text)))
        self.occupy(0.0)
        encoded = [prompt.error, negative_prompt.error, edit.error if edit else None]
        return State(state.size, slots, state.error or next(filter(None, encoded), error))

    def step(self, state: State, active: Sequence[ActiveSlot], count: int) -> tuple[State, Done]:
        slots = self._consume(state)
        numbers = tuple(slot.slot for slot in active)
        rows = sum(slot.rows for slot in active)
        if not active or len(set(numbers)) < len(numbers) or rows > self.row_buckets[-1] or count < 1:
            self.refuse(f"{count} steps of {active}")
        seeds = []
        for number, guided, _ in active:
            slot = slots[number]
            if slot is None or slot.guided != guided or slot.taken + count > slot.steps:
                self.refuse(f"{count} steps of {slot} in slot {number}, guided: {guided}")
            slots[number] = SlotState(slot.seed, slot.steps, slot.guided, slot.taken + count)
            seeds.append(slot.seed)
        bucket = smallest(self.row_buckets, rows)
        seconds = self.steps_take_s(state.size, bucket, count) * self.pace
        if self.reference_step_s and any(slot.looks for slot in active):
            seconds *= self.reference_step_s[state.size, bucket] / self.step_s[state.size, bucket]
        call = Call("step", state.size, tuple(seeds), numbers, (), count, bucket, self.clock(), seconds)
        error = self.called(call) or state.error
        return State(state.size, slots, error), Done(self.occupy(seconds), error)

    def decode(self, state: State, slots: Sequence[int]) -> Pixels:
        images = self._images(state, slots)
        if len(slots) > self.decode_buckets[-1] or any(image.taken < image.steps for image in images):
            self.refuse(f"decode of {images}")
        bucket = smallest(self.decode_buckets, len(slots))
        for slot in slots:
            state.slots[slot] = None
        seconds = self.decode_takes_s(state.size, bucket) * self.pace
        return self._pixels("decode", state, slots, images, bucket, seconds)

    def preview(self, state: State, slot: int) -> Pixels:
        return self._pixels("preview", state, [slot], self._images(state, [slot]), 1, 0.0)

    def export_slot(self, state: State, slot: int) -> Exported:
        (image,) = self._images(state, [slot])
        state.slots[slot] = None
        error = self.called(Call("export", state.size, (image.seed,), (slot,), at=self.clock()))
        return Exported(self, image, self.occupy(0.0), state.error or error)

    def unpacked(self, size: Size, packed: bytes) -> SlotState:
        return SlotState(**json.loads(packed))

    def import_slot(self, state: State, slot: int, image: SlotState) -> State:
        slots = self._consume(state)
        if not 0 <= slot < self.num_slots:
            self.refuse(f"import into slot {slot}")
        slots[slot] = image
        error = self.called(Call("import", state.size, (image.seed,), (slot,)))
        self.occupy(0.0)
        return State(state.size, slots, state.error or error)

    def wait(self, done: Done | Pixels) -> None:
        self.called(Call("wait"))
        self.clock.reach(done.ready_at)
        if done.error:
            raise done.error

    def _images(self, state: State, slots: Sequence[int]) -> list[SlotState]:
        """Returns the images in slots, which may be decoded or previewed."""
        images = [image for slot in slots if (image := state.slots[slot])]
        if state.consumed or not slots or len(set(slots)) < len(slots) or len(images) < len(slots):
            self.refuse(f"decode of slots {slots} of {state}")
        return images

    def _pixels(
        self, verb: str, state: State, slots: Sequence[int], images: Sequence[SlotState], bucket: int, seconds: float
    ) -> Pixels:
        seeds = tuple(image.seed for image in images)
        error = self.called(Call(verb, state.size, seeds, tuple(slots), (), 0, bucket, self.clock(), seconds))
        numbers = tuple(image.seed + image.taken for image in images)
        return Pixels(self, state.size, seeds, numbers, bucket, self.occupy(seconds), state.error or error)

    def _consume(self, state: State) -> list[SlotState | None]:
        """Returns the slots of a state, which must not be used again, like a donated array on a device."""
        if state.consumed:
            self.refuse("a state that was consumed is used again")
        state.consumed = True
        return state.slots[:]

    def occupy(self, seconds: float) -> float:
        """Queues work behind what is queued, as every dispatch does. Returns when it will be done."""
        if self.device_cost.host_s:
            self.clock.reach(self.clock() + self.device_cost.host_s)
        self.idle_at = max(self.idle_at, self.clock()) + seconds
        self.busy_s += seconds
        if self.device_cost.blocks:
            self.clock.reach(self.idle_at)
        return self.idle_at


@lru_cache
def blank_table(evaluations: int) -> SamplerTable:
    """Makes a table of the right length. Nothing reads its values."""
    columns = {name: np.zeros(evaluations, np.float32) for name in ("timesteps", "p", "q", "a", "n")}
    b, pairs = np.zeros((evaluations, HISTORY), np.float32), np.zeros((evaluations, 2), np.float32)
    return SamplerTable(**columns, b=b, preview=pairs, levels=pairs, initial_scale=1.0)


def smallest(buckets: Sequence[int], size: int) -> int:
    """Returns the smallest bucket that holds `size`."""
    return next(bucket for bucket in buckets if bucket >= size)
