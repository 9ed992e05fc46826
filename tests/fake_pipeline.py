"""The virtual pipeline with faults: any verb can be held, and any call of it can fail.

A call fails when it is dispatched or, as on a device, later, when somebody waits for what it made. What no engine may
do raises and is kept in `broken`, as an engine outlives a verb that raises. The clock is virtual, so a test with
threads waits for nothing.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NoReturn

from app.diffusion.samplers import SamplerTable
from app.engine.request import Generated
from app.engine.virtual import (
    FREE_DISPATCH,
    Call,
    Clock,
    Done,
    Encoded,
    SlotState,
    State,
    VirtualClock,
    VirtualPipeline,
    number_of,
)
from app.types import ActiveSlot, DispatchCost, Generation, InvalidField, Size

SMALL, LARGE = (8, 8), (16, 8)
VERBS = ("encode", "encode_image", "insert", "step", "decode", "preview", "export", "import", "wait", "read")
WAIT_S = 60.0  # no test waits so long unless it fails
START = 1000.0  # on the clock

Seconds = Callable[[Size, int], float]  # by size and bucket


def serial(size: Size, rows: int) -> float:
    """Step seconds of a device on which sharing a step gains nothing. The large size costs twice as much."""
    return 0.01 * rows * size[0] / SMALL[0]


def flat(size: Size, rows: int) -> float:
    """Step seconds of a device on which sharing a step costs nothing."""
    return 0.01 * size[0] / SMALL[0]


def free(size: Size, images: int) -> float:
    return 0.0


class Fault(RuntimeError):
    """The error of a verb that a test lets fail. `touched`: seeds of the images that it spoils; `texts`: the prompts
    that could not be encoded."""

    def __init__(self, verb: str):
        super().__init__(f"{verb} failed")
        self.verb = verb
        self.touched: set[int] = set()
        self.texts: set[str] = set()


@dataclass
class _Plan:
    verb: str
    skip: int
    times: int
    later: bool


class FakePipeline(VirtualPipeline):
    """`step_time` and `decode_time` are what warm-up would have measured."""

    def __init__(
        self,
        *,
        sizes: Sequence[Size] = (SMALL, LARGE),
        num_slots: int = 4,
        row_buckets: Sequence[int] = (1, 2, 4),
        decode_buckets: Sequence[int] = (1, 2),
        step_time: Seconds = serial,
        decode_time: Seconds = free,
        launch_s: float = 0.0,
        encode_image_s: float = 0.0,
        reference_time: Seconds | None = None,
        dispatch_cost: DispatchCost = FREE_DISPATCH,
        clock: Clock | None = None,
        before_step: Callable[[Call], None] = lambda call: None,
    ):
        super().__init__(
            {(size, rows): step_time(size, rows) for size in sizes for rows in row_buckets},
            {(size, images): decode_time(size, images) for size in sizes for images in decode_buckets},
            num_slots=num_slots,
            launch_s=launch_s,
            encode_image_s=encode_image_s,
            reference_step_s=reference_time
            and {(size, rows): reference_time(size, rows) for size in sizes for rows in row_buckets},
            dispatch_cost=dispatch_cost,
            clock=clock or VirtualClock(START),
        )
        self.before_step = before_step
        # Whether an unfinished image may lose its slot: because its request was cancelled, or has failed.
        self.abandoned: Callable[[int], bool] = lambda seed: False
        self.calls: list[Call] = []
        self.broken: list[str] = []
        self.faults: list[Fault] = []
        self.gates = {verb: threading.Event() for verb in VERBS}  # a closed gate holds its verb
        self.reached = {verb: threading.Event() for verb in VERBS}
        self._plans: list[_Plan] = []
        self.open()

    # What tests ask for

    def of(self, *verbs: str) -> list[Call]:
        return [call for call in self.calls if call.verb in verbs]

    def fail(self, verb: str, *, after: int = 0, times: int = 1, later: bool = False) -> None:
        """Lets `times` calls of a verb fail, after `after` calls; `later`: when somebody waits for what they made."""
        self._plans.append(_Plan(verb, after, times, later))

    def forget_faults(self) -> None:
        self._plans.clear()

    def open(self) -> None:
        for gate in self.gates.values():
            gate.set()

    # What happens around each verb

    def called(self, call: Call) -> Fault | None:
        """Records the call; raises or returns the fault that was planned for it."""
        if call.verb == "step":
            self.before_step(call)
        self.calls.append(call)
        self.reached[call.verb].set()
        assert self.gates[call.verb].wait(WAIT_S), f"nobody opened the gate of {call.verb}"
        for plan in [plan for plan in self._plans if plan.verb == call.verb]:
            if plan.skip:
                plan.skip -= 1
                continue
            plan.times -= 1
            if not plan.times:
                self._plans.remove(plan)
            fault = Fault(call.verb)
            self.faults.append(fault)
            if call.verb == "decode":
                fault.touched.update(call.seeds)
            if plan.later:
                return fault
            if call.verb == "encode":
                fault.texts.update(call.texts)
            raise fault
        return None

    def refuse(self, what: str) -> NoReturn:
        self.broken.append(what)
        super().refuse(what)

    # What differs in a verb

    def table(
        self, sampler: str | None, num_inference_steps: int, size: Size | None = None, strength: float | None = None
    ) -> SamplerTable:
        """Sampler "pndm" evaluates once more than it has steps; "lcm" does not suit."""
        if sampler == "lcm":
            raise InvalidField("sampler", "sampler must be one of ddim, pndm, got lcm.")
        return super().table(sampler, num_inference_steps + (sampler == "pndm"), size, strength)

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
        before = state.slots[slot] if 0 <= slot < self.num_slots else None
        if before and not self.abandoned(before.seed):
            self.refuse(f"insert of {seed} into slot {slot} of {before}")
        others = {image.seed for number, image in enumerate(state.slots) if image and number != slot}
        try:
            after = super().insert(state, slot, prompt, negative_prompt, table, guidance_scale, seed, fields, edit)
            return spoilt(after)
        except Fault as fault:
            fault.touched |= others | {seed}
            raise

    def import_slot(self, state: State, slot: int, image: SlotState) -> State:
        before = state.slots[slot] if 0 <= slot < self.num_slots else None
        if before and not self.abandoned(before.seed):
            self.refuse(f"import of {image} into slot {slot} of {before}")
        try:
            return spoilt(super().import_slot(state, slot, image))
        except Fault as fault:
            fault.touched |= seeds_in(state) | {image.seed}
            raise

    def step(self, state: State, active: Sequence[ActiveSlot], count: int) -> tuple[State, Done]:
        try:
            after, done = super().step(state, active, count)
        except Fault as fault:
            fault.touched |= seeds_in(state)
            raise
        return spoilt(after), done


def spoilt(state: State) -> State:
    """A fault spoils every image of a state that depends on it."""
    if isinstance(state.error, Fault):
        state.error.touched |= seeds_in(state)
    return state


def seeds_in(state: State) -> set[int]:
    return {image.seed for image in state.slots if image}


def numbers(generated: Generated) -> list[int]:
    """What the images of a request show."""
    return [number_of(image) for image in generated.pixels]


def request(prompt: str = "a house", *, steps: int = 3, seed: int = 10, n: int = 1, **other: Any) -> Generation:
    """Guided and small by default, so each image takes two rows."""
    facts: dict[str, Any] = {"negative_prompt": "", "size": SMALL, "guidance_scale": 7.5, "sampler": None} | other
    width, height = facts.pop("size")
    return Generation(prompt=prompt, num_inference_steps=steps, seed=seed, n=n, width=width, height=height, **facts)
