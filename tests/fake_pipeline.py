"""The engine's verbs over numbers: a picture is its seed plus one for each step, written into its pixels.

Nothing is computed, so what a test sees is what the engine decided. The device is a timeline on a fake clock; without
a clock everything is done at once, for tests with threads. Any verb can be held, and can fail at any call, when it is
dispatched or, as on a device, later, when somebody waits for what it made. What no engine may do raises and is kept in
`broken`, as an engine outlives a verb that raises.
"""

import json
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from app.diffusion.samplers import SamplerTable
from app.engine.engine import Engine
from app.engine.request import Generated
from app.types import ActiveSlot, Generation, InvalidField
from capacity.simulate import smallest, table_of

Size = tuple[int, int]  # width and height

SMALL, LARGE = (8, 8), (16, 8)
VERBS = ("encode", "insert", "step", "decode", "preview", "wait", "read")  # "read": of decoded pixels
LONG_TEXT = 40  # characters; longer texts are reported as truncated
WAIT_S = 20.0  # no test waits so long unless it fails


def serial(size: Size, rows: int) -> float:
    """Step seconds of a device on which sharing a step gains nothing. The large size costs twice as much."""
    return 0.01 * rows * size[0] / SMALL[0]


def flat(size: Size, rows: int) -> float:
    """Of one on which it costs nothing."""
    return 0.01 * size[0] / SMALL[0]


class Clock:
    """Stands still until somebody moves it."""

    def __init__(self, now: float = 1000.0):
        self.now = now

    def __call__(self) -> float:
        return self.now

    def reach(self, moment: float) -> None:
        self.now = max(self.now, moment)


class Fault(RuntimeError):
    """What a verb that was told to fail fails with. `touched`: the seeds of pictures that it spoils, `texts`: prompts
    that could not be encoded."""

    def __init__(self, verb: str):
        super().__init__(f"{verb} failed")
        self.verb = verb
        self.touched: set[int] = set()
        self.texts: set[str] = set()


@dataclass(frozen=True)
class Call:
    """One call of a verb, or one reading of pixels."""

    verb: str
    size: Size | None = None
    seeds: tuple[int, ...] = ()  # of the pictures that it is about
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
    fault: Fault | None = None


@dataclass(frozen=True)
class Seat:
    """A picture in its slot."""

    seed: int
    steps: int
    guided: bool
    taken: int = 0


@dataclass
class State:
    size: Size
    seats: list[Seat | None]
    fault: Fault | None = None  # a device that fails spoils all that depends on it
    decoded: set[int] = field(default_factory=set)  # slots whose pictures have been asked for
    consumed: bool = False


@dataclass(frozen=True)
class Done:
    ready_at: float
    fault: Fault | None


@dataclass(frozen=True)
class Pixels:
    """Pictures on the device; as many as the bucket holds, like a real decode's."""

    pipeline: "FakePipeline"
    size: Size
    seeds: tuple[int, ...]
    numbers: tuple[int, ...]
    bucket: int
    ready_at: float
    fault: Fault | None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        self.pipeline.enter(Call("read", self.size, self.seeds))
        self.pipeline.clock.reach(self.ready_at)
        if self.fault:
            raise self.fault
        width, height = self.size
        numbers = [*self.numbers, *[0] * (self.bucket - len(self.numbers))]
        return np.stack([np.resize(np.frombuffer(n.to_bytes(8), np.uint8), (height, width, 3)) for n in numbers])


def number(pixels: np.ndarray) -> int:
    """What a picture says: its seed plus the steps that it took."""
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
    return int.from_bytes(pixels.tobytes()[:8])


def numbers(generated: Generated) -> list[int]:
    return [number(image) for image in generated.pixels]


@dataclass
class _Plan:
    verb: str
    skip: int
    times: int
    later: bool


@dataclass
class FakePipeline:
    """`step_s` and `decode_s` are what warm-up would have measured; `pace` is how much longer it takes by now."""

    sizes: tuple[Size, ...] = (SMALL, LARGE)
    num_slots: int = 4
    row_buckets: tuple[int, ...] = (1, 2, 4)
    decode_buckets: tuple[int, ...] = (1, 2)
    default_sampler: str = "ddim"
    profile: Callable[[Size, int], float] = serial
    decoding: Callable[[Size, int], float] = lambda size, images: 0.0
    clock: Clock = field(default_factory=Clock)
    pace: float = 1.0
    # Whether a picture that is not finished may lose its slot: it was cancelled, or failed.
    abandoned: Callable[[int], bool] = lambda seed: False
    before_step: Callable[[Call], None] = lambda call: None

    def __post_init__(self) -> None:
        sizes = self.sizes
        self.step_s: Mapping[tuple[Size, int], float] = {
            (size, rows): self.profile(size, rows) for size in sizes for rows in self.row_buckets
        }
        self.decode_s: Mapping[tuple[Size, int], float] = {
            (size, images): self.decoding(size, images) for size in sizes for images in self.decode_buckets
        }
        self.idle_at = self.clock()  # when the device will have done what it was given
        self.busy_s = 0.0
        self.calls: list[Call] = []
        self.broken: list[str] = []
        self.faults: list[Fault] = []
        self.gates = {verb: threading.Event() for verb in VERBS}  # a closed one holds its verb
        self.reached = {verb: threading.Event() for verb in VERBS}
        self._plans: list[_Plan] = []
        for gate in self.gates.values():
            gate.set()

    # --- for tests

    def of(self, *verbs: str) -> list[Call]:
        return [call for call in self.calls if call.verb in verbs]

    def fail(self, verb: str, *, after: int = 0, times: int = 1, later: bool = False) -> None:
        """The next `times` calls of a verb fail, `after` so many; `later`: when somebody waits for what they made."""
        self._plans.append(_Plan(verb, after, times, later))

    def open(self) -> None:
        for gate in self.gates.values():
            gate.set()

    # --- the verbs

    def table(self, sampler: str | None, num_inference_steps: int) -> SamplerTable:
        """Sampler "pndm" evaluates once more than it has steps; "lcm" does not suit."""
        if sampler == "lcm":
            raise InvalidField("sampler", "sampler must be one of ddim, pndm, got lcm.")
        return table_of(num_inference_steps + (sampler == "pndm"))

    def empty_state(self, size: Size) -> State:
        return State(size, [None] * self.num_slots)

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        self.check(bool(texts) and len(set(texts)) == len(texts), f"encode of {texts}")
        fault = self.enter(Call("encode", texts=tuple(texts)), texts=texts)
        return [Encoded(text, len(text) > LONG_TEXT, fault) for text in texts]

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
        seats = self._consume(state)
        self.check(0 <= slot < self.num_slots, f"insert into slot {slot}")
        there = seats[slot]
        self.check(
            there is None or slot in state.decoded or self.abandoned(there.seed),
            f"insert of {seed} into slot {slot} of {there}",
        )
        seats[slot] = Seat(seed, len(table), guidance_scale > 1)
        texts = (prompt.text, negative_prompt.text)
        remain = State(state.size, seats, state.fault or prompt.fault or negative_prompt.fault, state.decoded - {slot})
        fault = self.enter(Call("insert", state.size, (seed,), (slot,), texts), spoils=remain)
        return self._spoilt(replace(remain, fault=remain.fault or fault))

    def step(self, state: State, active: Sequence[ActiveSlot], count: int) -> tuple[State, Done]:
        seats = self._consume(state)
        slots = [lane.slot for lane in active]
        rows = sum(1 + lane.guided for lane in active)
        self.check(bool(active) and len(set(slots)) == len(slots), f"step of {active}")
        self.check(rows <= self.row_buckets[-1] and count >= 1, f"step of {rows} rows, {count} times")
        seeds = []
        for lane in active:
            seat = seats[lane.slot]
            assert seat is not None, f"step of the empty slot {lane.slot}"
            self.check(seat.guided == lane.guided and lane.slot not in state.decoded, f"step of {lane}: {seat}")
            self.check(seat.taken + count <= seat.steps, f"{count} steps of {seat}")
            seats[lane.slot] = replace(seat, taken=seat.taken + count)
            seeds.append(seat.seed)
        bucket = smallest(self.row_buckets, rows)
        seconds = count * self.profile(state.size, bucket) * self.pace
        call = Call("step", state.size, tuple(seeds), tuple(slots), (), count, bucket, self.clock(), seconds)
        self.before_step(call)
        remain = State(state.size, seats, state.fault, state.decoded)
        fault = self.enter(call, spoils=remain) or remain.fault
        return self._spoilt(replace(remain, fault=fault)), Done(self._occupy(seconds), fault)

    def decode(self, state: State, slots: Sequence[int]) -> Pixels:
        seats = self._seats(state, slots)
        self.check(len(slots) <= self.decode_buckets[-1], f"decode of {len(slots)} slots")
        self.check(all(seat.taken == seat.steps for seat in seats), f"decode of {seats}")
        bucket = smallest(self.decode_buckets, len(slots))
        seeds = tuple(seat.seed for seat in seats)
        seconds = self.decoding(state.size, bucket) * self.pace
        call = Call("decode", state.size, seeds, tuple(slots), (), 0, bucket, self.clock(), seconds)
        state.decoded.update(slots)
        return self._pixels(state, seats, call, self.enter(call, touches=seeds))

    def preview(self, state: State, slot: int) -> Pixels:
        seats = self._seats(state, [slot])
        call = Call("preview", state.size, (seats[0].seed,), (slot,), (), 0, 1, self.clock(), 0.0)
        return self._pixels(state, seats, call, self.enter(call))

    def wait(self, done: Done) -> None:
        self.enter(Call("wait"))
        self.clock.reach(done.ready_at)
        if done.fault:
            raise done.fault

    # --- how they do it

    def _seats(self, state: State, slots: Sequence[int]) -> list[Seat]:
        """Those of slots that may be looked at."""
        self.check(not state.consumed, "decode of a state that was consumed")
        self.check(bool(slots) and len(set(slots)) == len(slots), f"decode of slots {slots}")
        seats = [seat for slot in slots if (seat := state.seats[slot])]
        self.check(len(seats) == len(slots), f"decode of an empty slot of {slots}")
        self.check(not state.decoded & set(slots), f"decode of {slots} once more")
        return seats

    def _pixels(self, state: State, seats: Sequence[Seat], call: Call, fault: Fault | None) -> Pixels:
        shown = tuple(seat.seed + seat.taken for seat in seats)
        ready_at = self._occupy(call.seconds)
        return Pixels(self, state.size, call.seeds, shown, call.bucket, ready_at, state.fault or fault)

    def enter(
        self, call: Call, *, spoils: State | None = None, touches: Sequence[int] = (), texts: Sequence[str] = ()
    ) -> Fault | None:
        """Records a call; raises, or returns what is to fail later, where that was planned."""
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
            fault.touched.update(touches)
            self.faults.append(fault)
            if not plan.later:
                fault.texts.update(texts)
                if spoils is not None:
                    self._spoilt(replace(spoils, fault=fault))
                raise fault
            return fault
        return None

    def check(self, holds: bool, what: str) -> None:
        if not holds:
            self.broken.append(what)
        assert holds, what

    def _consume(self, state: State) -> list[Seat | None]:
        self.check(not state.consumed, "a state that was consumed is used again")
        state.consumed = True
        return state.seats[:]

    def _spoilt(self, state: State) -> State:
        if state.fault:
            seats = [seat for slot, seat in enumerate(state.seats) if seat and slot not in state.decoded]
            state.fault.touched.update(seat.seed for seat in seats)
        return state

    def _occupy(self, seconds: float) -> float:
        self.idle_at = max(self.idle_at, self.clock()) + seconds
        self.busy_s += seconds
        return self.idle_at


def request(prompt: str = "a house", *, steps: int = 3, seed: int = 10, n: int = 1, **other: Any) -> Generation:
    """Guided and small unless told otherwise: two rows."""
    facts: dict[str, Any] = {"negative_prompt": "", "size": SMALL, "guidance_scale": 7.5, "sampler": None} | other
    width, height = facts.pop("size")
    return Generation(prompt=prompt, num_inference_steps=steps, seed=seed, n=n, width=width, height=height, **facts)


class Fetcher(Executor):
    """In place of the fetching thread: what was submitted waits, in order, until `run`."""

    def __init__(self) -> None:
        self.pending: deque[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]] = deque()

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.pending.append((future, function, arguments))
        return future

    def next_at(self) -> float:
        """When what the first one waits for is ready."""
        return next(argument.ready_at for argument in self.pending[0][2] if isinstance(argument, Pixels))

    def run(self) -> None:
        """The first."""
        future, function, arguments = self.pending.popleft()
        future.set_result(function(*arguments))  # what it raises no engine may leave unhandled


class Hand:
    """An engine without threads, driven step by step on a fake clock."""

    def __init__(self, fake: FakePipeline | None = None, *, max_waiting: int = 100, **options: Any):
        self.fake = fake or FakePipeline()
        self.clock = self.fake.clock
        self.fetcher = Fetcher()
        self.accepted = 0
        self.owners: dict[int, Future[Generated]] = {}  # by seed
        self.fake.abandoned = lambda seed: self.owners[seed].done()
        self.engine = Engine(self.fake, max_waiting=max_waiting, clock=self.clock, fetcher=self.fetcher, **options)

    def submit(self, generation: Generation, **options: Any) -> "Future[Generated]":
        future = self.engine.submit(generation, **options)
        self.accepted += 1
        self.owners.update(dict.fromkeys(range(generation.seed, generation.seed + generation.n), future))
        return future

    def tick(self) -> bool:
        """One turn of the engine, and of the fetching thread as far as the device has come."""
        busy = self.engine.tick()
        if not busy and self.fetcher.pending:
            self.clock.reach(self.fetcher.next_at())
        self.fetch()
        assert not self.fake.broken, self.fake.broken
        return busy or bool(self.fetcher.pending)

    def fetch(self) -> None:
        while self.fetcher.pending and self.fetcher.next_at() <= self.clock():
            self.fetcher.run()

    def finish(self, *futures: "Future[Generated]") -> list[Generated]:
        """Ticks until they are done."""
        for _ in range(100_000):
            if all(future.done() for future in futures):
                return [future.result(0) for future in futures]
            self.tick()
        raise AssertionError("the engine never gets there")

    def idle(self) -> None:
        """Ticks until there is nothing left to do."""
        for _ in range(100_000):
            if not self.tick():
                return
        raise AssertionError("the engine never gets there")

    def check(self) -> None:
        """Statistics that must add up at every moment."""
        stats = self.engine.stats()
        sizes = stats["sizes"].values()
        unfinished = sum(not future.done() for future in set(self.owners.values()))
        assert stats["unfinished"] == unfinished, stats
        assert 0 <= stats["waiting"] <= unfinished, stats
        assert stats["active_slots"] == sum(size["active"] for size in sizes), stats
        assert all(0 <= size["active"] <= self.fake.num_slots for size in sizes), stats
        assert stats["num_slots"] == len(sizes) * self.fake.num_slots, stats
        ended = sum(stats["requests"][outcome] for outcome in ("completed", "cancelled", "failed"))
        assert ended + unfinished == self.accepted, stats
        assert 0 < stats["bucket_fill"] <= 1, stats
        assert stats["backlog_s"] >= 0 and stats["device_busy_s"] >= 0, stats
        json.dumps(stats)

    def until(self, moment: float) -> None:
        """Ticks until the clock shows it."""
        while self.clock() < moment:
            if not self.tick():
                self.clock.reach(moment)
