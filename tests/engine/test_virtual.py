"""The stand-in device: its time, its images, and what it refuses."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from app.engine.virtual import Call, Encoded, State, VirtualClock, VirtualPipeline, number_of
from app.types import ActiveSlot

SIZE = (8, 8)
GUIDED = [ActiveSlot(0, True)]


class Failing(VirtualPipeline):
    """Its next step fails on the device."""

    def called(self, call: Call) -> Exception | None:
        return RuntimeError("step failed") if call.verb == "step" else None


def pipeline_of(kind: type[VirtualPipeline] = VirtualPipeline) -> VirtualPipeline:
    steps = {(SIZE, 2): 1.0, (SIZE, 4): 1.5}
    return kind(steps, {(SIZE, 1): 0.5, (SIZE, 2): 0.8}, num_slots=4, encode_s=0.1, clock=VirtualClock(100.0))


def with_images(pipeline: VirtualPipeline, seeds: Sequence[int] = (10,), steps: int = 5) -> State:
    """A state with guided images in its first slots."""
    state = pipeline.empty_state(SIZE)
    prompt = Encoded("a boat", truncated=False)
    for slot, seed in enumerate(seeds):
        state = pipeline.insert(state, slot, prompt, prompt, pipeline.table(None, steps), 7.5, seed)
    return state


def test_work_queues_on_the_device_and_waiting_moves_the_clock() -> None:
    pipeline = pipeline_of()
    state = with_images(pipeline, (10, 20))
    state, first = pipeline.step(state, GUIDED, 2)
    _, second = pipeline.step(state, [ActiveSlot(0, True), ActiveSlot(1, True)], 3)
    assert (first.ready_at, second.ready_at) == (102.0, 106.5)
    assert pipeline.clock() == 100.0
    pipeline.wait(first)
    assert pipeline.clock() == 102.0
    assert (pipeline.idle_at, pipeline.busy_s) == (106.5, 6.5)


def test_texts_take_time_and_long_ones_are_truncated() -> None:
    pipeline = pipeline_of()
    assert [encoded.truncated for encoded in pipeline.encode(["a boat", "x" * 41])] == [False, True]
    assert pipeline.idle_at == pytest.approx(100.2)


def test_an_image_shows_its_seed_plus_its_steps() -> None:
    pipeline = pipeline_of()
    state = with_images(pipeline, (10, 2**32 - 1))
    state, _ = pipeline.step(state, [ActiveSlot(0, True), ActiveSlot(1, True)], 3)
    assert number_of(np.asarray(pipeline.preview(state, 0))[0]) == 13
    state, _ = pipeline.step(state, [ActiveSlot(0, True), ActiveSlot(1, True)], 2)
    pixels = np.asarray(pipeline.decode(state, [0, 1]))
    assert pixels.shape == (2, 8, 8, 3) and pipeline.clock() == pytest.approx(108.3)
    assert [number_of(image) for image in pixels] == [15, 2**32 + 4]


def test_an_error_of_the_device_reaches_all_who_wait_for_what_depends_on_it() -> None:
    pipeline = pipeline_of(Failing)
    state, done = pipeline.step(with_images(pipeline), GUIDED, 5)
    with pytest.raises(RuntimeError, match="step failed"):
        pipeline.wait(done)
    with pytest.raises(RuntimeError, match="step failed"):
        np.asarray(pipeline.decode(state, [0]))


@pytest.mark.parametrize(
    "misuse",
    [
        lambda pipeline, state: pipeline.step(state, [], 1),
        lambda pipeline, state: pipeline.step(state, GUIDED * 2, 1),
        lambda pipeline, state: pipeline.step(state, GUIDED, 6),
        lambda pipeline, state: pipeline.step(state, [ActiveSlot(0, False)], 1),
        lambda pipeline, state: pipeline.step(state, [ActiveSlot(1, True)], 1),
        lambda pipeline, state: pipeline.decode(state, [0]),
        lambda pipeline, state: pipeline.preview(state, 1),
        lambda pipeline, state: pipeline.encode(["a boat", "a boat"]),
        lambda pipeline, state: (pipeline.step(state, GUIDED, 1), pipeline.step(state, GUIDED, 1)),
    ],
    ids=[
        "no slot",
        "a slot twice",
        "too many steps",
        "wrong guidance",
        "an empty slot",
        "a decode too early",
        "a preview of an empty slot",
        "a text twice",
        "a consumed state",
    ],
)
def test_what_no_engine_may_do_is_refused(misuse: Callable[[VirtualPipeline, State], object]) -> None:
    pipeline = pipeline_of()
    state = with_images(pipeline)
    with pytest.raises(AssertionError):
        misuse(pipeline, state)


def test_an_image_is_decoded_once() -> None:
    pipeline = pipeline_of()
    state, _ = pipeline.step(with_images(pipeline), GUIDED, 5)
    pipeline.decode(state, [0])
    with pytest.raises(AssertionError, match="decode of slots"):
        pipeline.decode(state, [0])
