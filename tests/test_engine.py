"""The engine over a fake pipeline whose pictures can be worked out by hand: seed plus one for each step."""

import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from app.engine import Engine, EngineStopped, QueueFull
from app.protocol import Generation

WAIT_S = 20


@dataclass(frozen=True)
class Embeds:
    prompt_truncated: bool
    negative_prompt_truncated: bool


@dataclass
class FakePipeline:
    """A slot is a number. `gate` holds every step until it is opened; `fail` names a verb that raises."""

    num_slots: int = 2
    sizes: tuple[tuple[int, int], ...] = ((8, 8), (8, 16))
    default_sampler: str = "ddim"
    gate: threading.Event = field(default_factory=threading.Event)
    stepping: threading.Event = field(default_factory=threading.Event)
    fail: str = ""
    calls: list[tuple[Any, ...]] = field(default_factory=list)

    def call(self, verb: str, *facts: Any) -> None:
        self.calls.append((verb, *facts))
        if self.fail == verb:
            raise RuntimeError(f"{verb} failed")

    def table(self, sampler: str | None, num_inference_steps: int) -> Any:
        if sampler == "lcm":
            raise ValueError("sampler must be ddim, got lcm.")
        return range(num_inference_steps)

    def empty_state(self, size: tuple[int, int]) -> list[int]:
        return [0] * self.num_slots

    def encode(self, prompt: str, negative_prompt: str) -> Embeds:
        self.call("encode", prompt)
        return Embeds(len(prompt) > 10, len(negative_prompt) > 10)

    def insert(self, state: Any, slot: int, embeddings: Any, table: Any, guidance_scale: float, seed: int) -> Any:
        self.call("insert", slot, seed)
        return [*state[:slot], seed, *state[slot + 1 :]]

    def step(self, state: Any, slots: range) -> Any:
        self.stepping.set()
        assert self.gate.wait(WAIT_S)
        self.call("step", len(slots))
        return [value + 1 if slot in slots else value for slot, value in enumerate(state)]

    def decode(self, state: Any, slots: range) -> Any:
        self.call("decode", len(slots))
        return np.array(state, np.uint64)[:, None, None, None]  # as long as a bucket, not as `slots`


def request(prompt: str = "a house", *, steps: int = 3, seed: int = 10, n: int = 1, **other: Any) -> Generation:
    facts: dict[str, Any] = {
        "negative_prompt": "",
        "width": 8,
        "height": 8,
        "guidance_scale": 7.5,
        "sampler": None,
    } | other
    return Generation(prompt=prompt, num_inference_steps=steps, seed=seed, n=n, **facts)


@pytest.fixture
def fake() -> FakePipeline:
    pipeline = FakePipeline()
    pipeline.gate.set()
    return pipeline


@pytest.fixture
def engine(fake: FakePipeline) -> Iterator[Engine]:
    engine = Engine(fake, max_waiting=2)
    yield engine
    fake.gate.set()
    engine.close()


def test_every_step_of_the_table_is_taken_and_the_picture_comes_back(engine: Engine) -> None:
    generated = engine.submit(request(steps=5, seed=100)).result(WAIT_S)
    assert generated.pixels.ravel().tolist() == [105]
    assert (generated.seeds, generated.sampler) == ((100,), "ddim")


def test_n_pictures_have_consecutive_seeds_and_run_in_groups_of_slots(engine: Engine, fake: FakePipeline) -> None:
    generated = engine.submit(request(steps=3, seed=2**32 - 2, n=5)).result(WAIT_S)
    assert generated.seeds == (2**32 - 2, 2**32 - 1, 0, 1, 2)
    assert generated.pixels.ravel().tolist() == [seed + 3 for seed in generated.seeds]
    assert [call[1] for call in fake.calls if call[0] == "decode"] == [2, 2, 1]


def test_requests_run_in_the_order_of_their_arrival(engine: Engine, fake: FakePipeline) -> None:
    fake.gate.clear()
    futures = [engine.submit(request(name)) for name in ("first", "second", "third")]
    fake.gate.set()
    for future in futures:
        future.result(WAIT_S)
    assert [call[1] for call in fake.calls if call[0] == "encode"] == ["first", "second", "third"]


def test_truncation_of_either_prompt_is_reported(engine: Engine) -> None:
    generated = engine.submit(request("a", negative_prompt="much too long")).result(WAIT_S)
    assert (generated.prompt_truncated, generated.negative_prompt_truncated) == (False, True)


def test_a_full_queue_refuses_and_says_when_to_come_back(engine: Engine, fake: FakePipeline) -> None:
    fake.gate.clear()
    futures = [engine.submit(request()) for _ in range(3)]  # one runs, two wait
    with pytest.raises(QueueFull) as full:
        engine.submit(request())
    assert full.value.retry_after_s > 0
    fake.gate.set()
    for future in futures:
        future.result(WAIT_S)
    assert engine.submit(request()).result(WAIT_S)


def test_a_cancelled_waiting_request_never_runs_and_frees_its_place(engine: Engine, fake: FakePipeline) -> None:
    fake.gate.clear()
    running, waiting, last = (engine.submit(request(name)) for name in ("running", "waiting", "last"))
    assert waiting.cancel()
    replacement = engine.submit(request("replacement"))
    fake.gate.set()
    for future in (running, last, replacement):
        future.result(WAIT_S)
    assert [call[1] for call in fake.calls if call[0] == "encode"] == ["running", "last", "replacement"]


def test_a_cancelled_running_request_stops_at_its_next_step(engine: Engine, fake: FakePipeline) -> None:
    fake.gate.clear()
    running = engine.submit(request("running", steps=1000))
    assert fake.stepping.wait(WAIT_S)
    assert running.cancel()
    other = engine.submit(request("other", steps=3, seed=50))
    fake.gate.set()
    assert other.result(WAIT_S).pixels.ravel().tolist() == [53]
    assert len([call for call in fake.calls if call[0] == "step"]) == 1 + 3
    with pytest.raises(CancelledError):
        running.result(WAIT_S)


@pytest.mark.parametrize("verb", ["encode", "insert", "step", "decode"])
def test_a_failing_verb_fails_its_own_request_and_no_other(engine: Engine, fake: FakePipeline, verb: str) -> None:
    fake.fail = verb
    with pytest.raises(RuntimeError, match=f"{verb} failed"):
        engine.submit(request()).result(WAIT_S)
    fake.fail = ""
    assert engine.submit(request(steps=1, seed=7)).result(WAIT_S).pixels.ravel().tolist() == [8]
    assert engine.healthy


def test_an_undeclared_size_or_unsuited_sampler_is_refused_before_it_queues(engine: Engine) -> None:
    with pytest.raises(ValueError, match="size must be one of 8x8, 8x16, got 16x16"):
        engine.submit(request(width=16, height=16))
    with pytest.raises(ValueError, match="sampler must be ddim, got lcm"):
        engine.submit(request(sampler="lcm"))
    assert engine.stats()["unfinished"] == 0


def test_closing_fails_what_is_unfinished_and_then_refuses(engine: Engine, fake: FakePipeline) -> None:
    fake.gate.clear()
    futures = [engine.submit(request(steps=1000)), engine.submit(request())]
    assert fake.stepping.wait(WAIT_S)
    closing = threading.Thread(target=engine.close)
    closing.start()
    fake.gate.set()
    closing.join(WAIT_S)
    for future in futures:
        with pytest.raises(EngineStopped):
            future.result(WAIT_S)
    assert not engine.healthy
    with pytest.raises(EngineStopped):
        engine.submit(request())
