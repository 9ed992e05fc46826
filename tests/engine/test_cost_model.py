"""Predicted seconds of steps and decodes, and how measurements correct them."""

import pytest

from app.engine.cost_model import DecodeCost, StepCost
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


@pytest.mark.parametrize("pace", [0.67, 1.5])
def test_all_buckets_follow_the_pace_of_one_bucket(pace: float) -> None:
    cost = StepCost(SERIAL)
    for _ in range(60):
        cost.observe(2, pace * SERIAL[2])
    assert cost.step_s(2) == pytest.approx(pace * SERIAL[2], rel=0.01)
    assert cost.step_s(16) == pytest.approx(pace * SERIAL[16], rel=0.05)
    # Other buckets do not look better for not having been measured lately.
    assert batch_size([Work(10, 2)] * 8, cost, gain=0.05, expected_arrivals=1e6) == 1


def test_proportions_are_learned_where_several_buckets_run() -> None:
    cost = StepCost(SERIAL)
    for _ in range(400):
        for bucket in (2, 16):
            cost.observe(bucket, 0.01)
    assert cost.step_s(16) == pytest.approx(cost.step_s(2), rel=0.1)


def test_a_change_of_pace_is_not_mistaken_for_a_change_of_proportions() -> None:
    cost = StepCost(SERIAL)
    for bucket in (16, *[2] * 100):  # twice as slow from the second step on
        cost.observe(bucket, 2 * SERIAL[bucket] if bucket == 2 else SERIAL[16])
    assert cost.step_s(16) / cost.step_s(2) == pytest.approx(SERIAL[16] / SERIAL[2], rel=0.08)


def test_a_single_outlier_changes_little() -> None:
    cost = StepCost(SERIAL)
    cost.observe(2, 1000.0)
    assert cost.step_s(2) < 2 * SERIAL[2]
    cost.observe(2, 0.0)
    assert cost.step_s(2) > SERIAL[2] / 2


def test_as_many_images_are_decoded_together_as_makes_each_cheapest() -> None:
    serial = DecodeCost({1: 0.03, 2: 0.06, 4: 0.12})
    assert [serial.bucket(images) for images in (1, 2, 3, 9)] == [1, 1, 1, 1]
    flat = DecodeCost({4: 0.03, 1: 0.03, 2: 0.03})
    assert [flat.bucket(images) for images in (1, 2, 3, 9)] == [1, 2, 4, 4]
    assert DecodeCost({2: 0.03, 4: 0.04}).bucket(1) == 2
    assert (serial.image_s(), flat.image_s()) == (0.03, 0.03 / 4)
