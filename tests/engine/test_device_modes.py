"""The engine on devices that dispatch in every way a real one may, on a virtual clock: it costs the device next to
nothing, and what it measures is right. benchmarks/device_modes.py measures the same in real time."""

import itertools

import numpy as np
import pytest

from app.engine.virtual import VirtualClock
from benchmarks.device_modes import LONE, SATURATED
from benchmarks.paced import Pace, PacedPipeline
from benchmarks.whole_batch import Picture, draw
from capacity.simulate import SIZE, Load, request, simulate_on

STEPS = 20
PACES = [
    Pace(8, step_s, 1.0, host_s, launch_s, blocks)
    for blocks, step_s, host_s, launch_s in itertools.product(
        (False, True), (0.001, 0.01, 0.1), (0.0001, 0.002, 0.01), (0.0, 0.004)
    )
]
CHANGING = [
    Pace(8, 0.01, 1.0, 0.0001, 0.001, blocks, cold, hiccup_s)
    for blocks, cold, hiccup_s in itertools.product((False, True), (1.0, 1.5), (0.0, 0.05))
]


def started(pace: Pace) -> PacedPipeline:
    pipeline = PacedPipeline(pace, batch_buckets=(1, 2, 4), size=SIZE, clock=VirtualClock())
    pipeline.warm_up()
    return pipeline


def bare_s(pipeline: PacedPipeline, count: int, batches: int = 1) -> float:
    """Seconds of the bare verbs for full batches of pictures."""
    state, began = pipeline.empty_state(SIZE), pipeline.clock()
    load = Load(np.zeros(count), STEPS)
    for batch in range(batches):
        pictures = [Picture(request(1000 + batch * count + number, load), 0) for number in range(count)]
        state, _ = draw(pipeline, state, pictures)
    return pipeline.clock() - began


def engine_s(pipeline: PacedPipeline, count: int) -> float:
    began = pipeline.clock()
    load = Load(np.full(count, began), STEPS)
    return float(simulate_on(pipeline, load, gain=0.05, max_waiting=count).latencies.max())


@pytest.mark.parametrize("pace", PACES, ids=str)
def test_warm_up_measures_the_device(pace: Pace) -> None:
    pipeline = started(pace)
    assert pipeline.dispatch_cost.blocks == pace.blocks
    if not pace.blocks:
        assert pipeline.dispatch_cost.host_s == pytest.approx(pace.host_s)
    for rows in pipeline.row_buckets:
        assert pipeline.step_s[SIZE, rows] == pytest.approx(pace.step(rows))
        assert pipeline.launch_s[SIZE, rows] == pytest.approx(pace.launch_s + pace.blocks * pace.host_s)


@pytest.mark.parametrize("pace", PACES + CHANGING, ids=str)
def test_a_lone_request_takes_what_the_bare_verbs_take_and_a_dispatch(pace: Pace) -> None:
    pipeline = started(pace)
    for _ in range(3):
        engine_s(pipeline, 1)  # clocks ramp up
    seconds = sorted(engine_s(pipeline, 1) for _ in range(3))[1]
    assert seconds <= LONE * bare_s(pipeline, 1) + pace.host_s + pace.launch_s + pace.hiccup_s


@pytest.mark.parametrize("pace", PACES + CHANGING, ids=str)
def test_a_full_queue_is_served_as_fast_as_the_bare_verbs_serve_full_batches(pace: Pace) -> None:
    pipeline = started(pace)
    engine_s(pipeline, 16)
    seconds = engine_s(pipeline, 16)
    assert seconds <= bare_s(pipeline, 4, batches=4) / SATURATED + pace.hiccup_s
