"""Batch size, decode time and estimates, as they follow from step times alone."""

import math
from collections.abc import Iterable
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.engine.cost_model import DecodeCost, StepCost
from app.engine.scheduler import Work, batch_size, decode_due, device_s, schedule
from app.types import ActiveSlot

BUCKETS = (1, 2, 4, 8, 16)
SERIAL = {rows: 0.01 * rows for rows in BUCKETS}
FLAT = dict.fromkeys(BUCKETS, 0.01)
MANY = 1e6  # expected arrivals, with which only throughput counts
KNEE = {rows: 0.01 * max(1, rows / 8) for rows in BUCKETS}  # eight chips: flat up to a row for each

rows_lists = st.lists(st.integers(1, 2), max_size=20)
works = st.lists(st.tuples(st.integers(1, 50), st.integers(1, 2)).map(lambda work: Work(*work)), max_size=20)
costs = st.lists(st.floats(1e-4, 10), min_size=5, max_size=5).map(
    lambda seconds: StepCost(dict(zip(BUCKETS, seconds, strict=True)))
)
quick = settings(derandomize=True, database=None, deadline=None, max_examples=200)


def of(rows: Iterable[int]) -> list[Work]:
    """Requests for one image each."""
    return [Work(10, count) for count in rows]


def rate(cost: StepCost, rows: list[int], count: int) -> float:
    """Rows per second if so many images share the step."""
    return sum(rows[:count]) / cost.step_s(sum(rows[:count]))


def test_a_guided_slot_has_two_rows() -> None:
    assert (ActiveSlot(3, guided=True).rows, ActiveSlot(3, guided=False).rows) == (2, 1)


# Batch size


@pytest.mark.parametrize(
    ("step_s", "rows", "expected"),
    [
        (SERIAL, [2] * 10, 1),
        (SERIAL, [1] * 10, 1),
        (FLAT, [2] * 10, 8),
        (FLAT, [1] * 20, 16),
        (FLAT, [2] * 3, 3),
        (KNEE, [2] * 10, 4),
        (KNEE, [1] * 10, 8),
        (KNEE, [2, 1] * 5, 5),
        (FLAT, [], 0),
    ],
)
def test_as_many_images_share_a_step_as_gives_the_highest_throughput(
    step_s: dict[int, float], rows: list[int], expected: int
) -> None:
    assert batch_size(of(rows), StepCost(step_s), gain=0.05, expected_arrivals=MANY) == expected


def test_one_more_image_within_a_bucket_costs_nothing() -> None:
    cost = StepCost({1: 0.01, 2: 0.02, 4: 0.03, 8: 0.06})
    assert batch_size(of([1] * 3), cost, gain=0.05, expected_arrivals=MANY) == 1  # three rows would pay for four
    assert batch_size(of([1] * 4), cost, gain=0.05, expected_arrivals=MANY) == 4
    assert batch_size(of([2, 1, 1, 1]), cost, gain=0.05, expected_arrivals=MANY) == 3


@pytest.mark.parametrize(("gain", "expected"), [(0.0, 2), (0.2, 2), (0.3, 1)])
def test_a_larger_bucket_must_raise_the_rate_by_the_margin(gain: float, expected: int) -> None:
    assert batch_size(of([2, 2]), StepCost({2: 0.010, 4: 0.016}), gain, MANY) == expected  # by a quarter


def test_a_bucket_beyond_a_bad_one_is_judged_by_the_best_before_it() -> None:
    assert batch_size(of([1] * 4), StepCost({1: 0.01, 2: 0.03, 4: 0.02}), gain=0.05, expected_arrivals=MANY) == 4


@pytest.mark.parametrize("step_s", [SERIAL, FLAT])
def test_a_fixed_batch_size_overrides_the_cost_model_but_not_the_largest_bucket(step_s: dict[int, float]) -> None:
    cost = StepCost(step_s)
    assert [batch_size(of([2] * 20), cost, 0.05, MANY, fixed) for fixed in (1, 3, 8, 99)] == [1, 3, 8, 8]
    assert batch_size(of([2] * 2), cost, 0.05, MANY, 3) == 2


@pytest.mark.slow
@quick
@given(rows_lists, costs, st.floats(0, 0.5))
def test_no_other_batch_size_is_faster_by_more_than_the_margin(rows: list[int], cost: StepCost, gain: float) -> None:
    chosen = batch_size(of(rows), cost, gain, MANY)
    assert (chosen > 0) == bool(rows)
    for count in range(1, len(rows) + 1):
        if sum(rows[:count]) > cost.largest_bucket:
            assert chosen < count
        elif count != chosen:
            best = rate(cost, rows, chosen)
            assert rate(cost, rows, count) <= best * (1 + gain) * (1 + 1e-9)
            # Nor does a smaller bucket do as well.
            smaller = cost.bucket(sum(rows[:count])) < cost.bucket(sum(rows[:chosen]))
            assert not smaller or best > rate(cost, rows, count)


# Where sharing gains a little, only a queue makes it worthwhile.

CPU = StepCost({2: 0.0105, 4: 0.0189, 8: 0.0322})  # 11 and 17 % more rows per second


def test_two_alone_run_one_after_the_other_where_sharing_costs_one_more_than_it_gains_the_other() -> None:
    assert batch_size(of([2, 2]), CPU, gain=0.05, expected_arrivals=0) == 1
    assert batch_size(of([2, 2]), StepCost(FLAT), gain=0.05, expected_arrivals=0) == 2


def test_the_more_images_wait_or_are_expected_the_more_share() -> None:
    def size(images: int, expected_arrivals: float) -> int:
        return batch_size(of([2] * images), CPU, gain=0.05, expected_arrivals=expected_arrivals)

    assert [size(images, 0) for images in (1, 4, 7, 12, 20)] == [1, 1, 1, 4, 4]
    assert [size(4, expected_arrivals) for expected_arrivals in (0, 3, 4)] == [1, 1, 4]


def test_the_images_of_one_request_share_whatever_makes_it_faster() -> None:
    """The first of two is of no use to a client who waits for both."""
    queue = [Work(10, 2, last=False), Work(10, 2)]
    assert batch_size(queue, CPU, gain=0.05, expected_arrivals=0) == 2
    assert batch_size(queue * 2, CPU, gain=0.05, expected_arrivals=0) == 2


@pytest.mark.slow
@quick
@given(works, costs, st.floats(0, 100), st.floats(0, 100))
def test_more_expected_arrivals_never_reduce_the_batch_size(
    queue: list[Work], cost: StepCost, few: float, more: float
) -> None:
    assert batch_size(queue, cost, 0.05, few) <= batch_size(queue, cost, 0.05, few + more)


# Estimates


def test_where_sharing_gains_nothing_each_image_waits_for_all_before_it() -> None:
    queue = [Work(10, 2), Work(5, 1), Work(20, 2)]
    spans = schedule(queue, StepCost(SERIAL), gain=0.05, expected_arrivals=MANY)
    assert [end for _, end in spans] == pytest.approx(list(accumulate([0.2, 0.05, 0.4])))
    assert spans[-1][1] == pytest.approx(device_s(queue, StepCost(SERIAL)))


def test_where_sharing_is_free_each_image_takes_the_first_place_that_is_left() -> None:
    cost = StepCost({2: 0.01, 4: 0.01})
    spans = schedule([Work(10, 2), Work(4, 2), Work(3, 2), Work(5, 2)], cost, gain=0.05, expected_arrivals=MANY)
    assert [moment for span in spans for moment in span] == pytest.approx([0, 0.1, 0, 0.04, 0.04, 0.07, 0.07, 0.12])


def test_a_fixed_batch_size_makes_as_many_places() -> None:
    spans = schedule([Work(10, 1)] * 4, StepCost(SERIAL), gain=0.05, expected_arrivals=MANY, fixed=2)
    assert [end for _, end in spans] == pytest.approx([0.2, 0.2, 0.4, 0.4])


def test_an_empty_queue_takes_no_time() -> None:
    assert schedule([], StepCost(FLAT), gain=0.05, expected_arrivals=MANY) == []
    assert device_s([], StepCost(FLAT)) == 0


@quick
@given(works, costs)
def test_a_schedule_keeps_the_order_of_the_queue_and_its_places(queue: list[Work], cost: StepCost) -> None:
    places = batch_size(queue, cost, 0.05, MANY)
    spans = schedule(queue, cost, 0.05, MANY)
    assert len(spans) == len(queue)
    begins = [begin for begin, _ in spans]
    assert begins == sorted(begins) and begins[:places] == [0.0] * places
    for moment in begins:
        assert sum(begin <= moment < end for begin, end in spans) <= places
    for begin in begins[places:]:  # no image waits while a place is free
        assert begin in [end for _, end in spans]


# When to decode


def test_no_image_waits_for_a_shared_decode_that_gains_nothing_or_holds_up_nobody() -> None:
    assert decode_due(DecodeCost({1: 0.03, 2: 0.06, 4: 0.12}), 1, next_s=0.001, others=8)
    assert decode_due(DecodeCost({1: 0.0}), 1, next_s=0.001, others=8)
    flat = DecodeCost({1: 0.03, 2: 0.03, 4: 0.03})
    assert decode_due(flat, 1, next_s=0.001, others=0)
    assert decode_due(flat, 1, next_s=math.inf, others=8)  # no image is running
    assert decode_due(flat, 4, next_s=0.001, others=8)  # the largest bucket is full


def test_a_decode_is_put_off_if_its_images_lose_less_than_sharing_saves_the_others() -> None:
    cost = DecodeCost({1: 0.03, 2: 0.04, 4: 0.06})
    assert not decode_due(cost, 1, next_s=0.0599, others=3)
    assert decode_due(cost, 1, next_s=0.0601, others=3)  # two at once save 0.02 s for each of three
    assert not decode_due(cost, 1, next_s=0.0601, others=4)
    assert decode_due(cost, 2, next_s=0.0401, others=4)  # two wait, and a third saves 0.02 s for each of four


@quick
@given(st.integers(0, 100), st.lists(st.floats(0, 1), min_size=3, max_size=3), st.integers(1, 8))
def test_no_decode_is_put_off_for_longer_than_it_takes(images: int, seconds: list[float], others: int) -> None:
    cost = DecodeCost(dict(zip((1, 2, 4), sorted(seconds), strict=True)))
    assert decode_due(cost, images + 1, next_s=cost.decode_s[1] * others * (1 + 1e-9), others=others)
