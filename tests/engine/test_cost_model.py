"""Predicted seconds of steps and decodes, and how measurements correct them."""

import pytest

from app.engine.cost_model import RECENT, DecodeCost, StepCost
from app.engine.scheduler import Work, batch_size

BUCKETS = (1, 2, 4, 8, 16)
SERIAL = {rows: 0.01 * rows for rows in BUCKETS}


def test_rows_take_the_time_of_the_smallest_bucket_that_holds_them() -> None:
    cost = StepCost({4: 0.03, 1: 0.01, 8: 0.05})
    assert [cost.bucket(rows) for rows in (1, 2, 4, 5, 8)] == [1, 4, 4, 8, 8]
    assert [cost.step_s(rows) for rows in (1, 3, 8)] == [0.01, 0.03, 0.05]
    assert cost.largest_bucket == 8
    assert list(cost.table()) == [1, 4, 8]
    assert cost.row_s() == pytest.approx(0.05 / 8)


def test_a_dispatch_takes_its_launch_and_its_steps() -> None:
    cost = StepCost({2: 0.01, 4: 0.015}, {2: 0.004, 4: 0.005})
    assert cost.dispatch_s(2, 10) == pytest.approx(0.104) and cost.dispatch_s(3, 2) == pytest.approx(0.035)
    for _ in range(60):
        cost.observe(4, 2, 2 * 0.035)
    assert (cost.launch_s(4), cost.step_s(4)) == pytest.approx((0.01, 0.03), rel=0.01)
    assert cost.dispatch_s(2, 10) == pytest.approx(0.104)


@pytest.mark.parametrize("pace", [0.67, 1.5])
def test_a_bucket_is_corrected_by_its_own_dispatches_alone(pace: float) -> None:
    cost = StepCost(SERIAL)
    for _ in range(60):
        cost.observe(2, 5, pace * 5 * SERIAL[2])
    assert cost.step_s(2) == pytest.approx(pace * SERIAL[2], rel=0.01)
    assert [cost.step_s(rows) for rows in (1, 4, 8, 16)] == [SERIAL[rows] for rows in (1, 4, 8, 16)]


@pytest.mark.parametrize(
    ("first", "second", "pace"), [(1.5, 1.3, 1.3), (0.5, 0.6, 0.6), (0.5, 1.5, 1.0), (1.0, 2.0, 1.0)]
)
def test_other_buckets_follow_what_two_buckets_have_in_common(first: float, second: float, pace: float) -> None:
    cost = StepCost(SERIAL)
    for _ in range(60):
        cost.observe(2, 1, first * SERIAL[2])
        cost.observe(4, 1, second * SERIAL[4])
    assert cost.step_s(2) == pytest.approx(first * SERIAL[2], rel=0.01)
    assert cost.step_s(4) == pytest.approx(second * SERIAL[4], rel=0.01)
    assert cost.step_s(16) == pytest.approx(pace * SERIAL[16], rel=0.01)


def test_a_bucket_that_looked_bad_once_gets_another_chance() -> None:
    cost = StepCost(SERIAL)
    for _ in range(20):
        cost.observe(16, 1, 3 * SERIAL[16])
    for _ in range(RECENT - 1):
        cost.observe(2, 1, SERIAL[2])
    assert cost.step_s(16) > 2.9 * SERIAL[16]
    cost.observe(2, 1, SERIAL[2])
    assert cost.step_s(16) == SERIAL[16]


def test_sharing_that_only_looks_better_is_given_up_after_a_few_dispatches() -> None:
    """The machine is slower than at warm-up, and only the bucket of a lone request has shown it."""
    cost, wanted = StepCost(SERIAL), [Work(10, 2)] * 8
    for _ in range(60):
        cost.observe(2, 1, 1.5 * SERIAL[2])
    tried = []
    while (count := batch_size(wanted, cost, gain=0.05, expected_arrivals=1e6)) > 1:
        tried.append(count)
        cost.observe(2 * count, 1, 1.5 * SERIAL[2 * count])
    assert 0 < len(tried) < 12


def test_a_single_outlier_changes_little() -> None:
    cost = StepCost(SERIAL)
    cost.observe(2, 1, 1000.0)
    assert cost.step_s(2) < 2 * SERIAL[2]
    cost.observe(2, 1, 0.0)
    assert cost.step_s(2) > SERIAL[2] / 2


def test_as_many_images_are_decoded_together_as_makes_each_cheapest() -> None:
    serial = DecodeCost({1: 0.03, 2: 0.06, 4: 0.12})
    assert [serial.bucket(images) for images in (1, 2, 3, 9)] == [1, 1, 1, 1]
    flat = DecodeCost({4: 0.03, 1: 0.03, 2: 0.03})
    assert [flat.bucket(images) for images in (1, 2, 3, 9)] == [1, 2, 4, 4]
    assert DecodeCost({2: 0.03, 4: 0.04}).bucket(1) == 2
    assert (serial.image_s(), flat.image_s()) == (0.03, 0.03 / 4)
