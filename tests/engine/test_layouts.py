"""A device whose chips divide images where there are fewer than chips: the engine has the best of both ends of load.

On a virtual clock; benchmarks/layouts.py measures the same in real time.
"""

import numpy as np
import pytest

from app.engine.cost_model import StepCost
from app.engine.scheduler import Work, batch_size
from benchmarks.layouts import BATCHES, DIVIDED, STEPS, WHOLE, capacity
from benchmarks.paced import Pace
from capacity.simulate import Load, Simulated, Timings, simulate
from loadtest.arrivals import poisson

GAIN = 0.05


def served(pace: Pace, arrivals: np.ndarray) -> Simulated:
    rows, images = (1, 2, 4, 8), BATCHES
    timings = Timings(
        {count: pace.step(count) for count in rows}, {count: pace.decode(count) for count in images}, slots=8
    )
    return simulate(timings, Load(arrivals, STEPS, guided=False), gain=GAIN, max_waiting=1000)


def test_a_lone_image_has_all_chips() -> None:
    lone = served(DIVIDED, np.zeros(1)).latencies
    assert lone == pytest.approx([STEPS * DIVIDED.step(1) + DIVIDED.decode(1)])
    assert lone < 0.4 * served(WHOLE, np.zeros(1)).latencies


def test_a_full_queue_is_served_as_fast_as_by_whole_rows() -> None:
    divided, whole = (np.sort(served(pace, np.zeros(64)).latencies) for pace in (DIVIDED, WHOLE))
    last = WHOLE.chips  # for these the queue is short: they are drawn one after the other
    assert divided[:-last] == pytest.approx(whole[:-last])
    assert divided[-last:].mean() < whole[-last:].mean()


@pytest.mark.parametrize(("load", "bar"), [(0.1, 0.6), (0.5, 1.0), (0.9, 1.0)])
def test_requests_wait_less_at_any_load(load: float, bar: float) -> None:
    arrivals = poisson(300, np.random.default_rng(0)) / (load * capacity())
    divided, whole = (served(pace, arrivals).latencies.mean() for pace in (DIVIDED, WHOLE))
    assert divided <= bar * whole


def test_one_image_after_the_other_while_the_queue_is_short_and_four_at_once_while_it_is_long() -> None:
    cost = StepCost({rows: DIVIDED.step(rows) for rows in (1, 2, 4)})
    work = [Work(STEPS, 1)] * 8
    assert [batch_size(work[:count], cost, GAIN, expected_arrivals=0) for count in (1, 2, 3)] == [1, 1, 1]
    assert batch_size(work, cost, GAIN, expected_arrivals=20) == 4
