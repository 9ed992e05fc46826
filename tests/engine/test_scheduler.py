"""Who shares a step and when one that waits is done, from step times alone."""

import math
from collections.abc import Iterable
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.engine.scheduler import Arrivals, Decoding, Profile, Work, at_once, device_s, schedule
from app.types import ActiveSlot

BUCKETS = (1, 2, 4, 8, 16)
SERIAL = {rows: 0.01 * rows for rows in BUCKETS}
FLAT = dict.fromkeys(BUCKETS, 0.01)
MANY = 1e6  # who will come: then nothing counts but how many pictures a second
KNEE = {rows: 0.01 * max(1, rows / 8) for rows in BUCKETS}  # eight chips: flat as far as they go round

lines = st.lists(st.integers(1, 2), max_size=20)
works = st.lists(st.tuples(st.integers(1, 50), st.integers(1, 2)).map(lambda work: Work(*work)), max_size=20)
profiles = st.lists(st.floats(1e-4, 10), min_size=5, max_size=5).map(
    lambda s: Profile(dict(zip(BUCKETS, s, strict=True)))
)
quick = settings(derandomize=True, database=None, deadline=None, max_examples=200)


def of(rows: Iterable[int]) -> list[Work]:
    """Requests for one picture each."""
    return [Work(10, one) for one in rows]


def rate(profile: Profile, line: list[int], count: int) -> float:
    """Rows per second if so many share the step."""
    return sum(line[:count]) / profile.step_s(sum(line[:count]))


def test_a_guided_lane_is_two_rows() -> None:
    assert (ActiveSlot(3, guided=True).rows, ActiveSlot(3, guided=False).rows) == (2, 1)


# How many at once


@pytest.mark.parametrize(
    ("step_s", "line", "expected"),
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
def test_so_many_share_a_step_as_make_images_come_fastest(
    step_s: dict[int, float], line: list[int], expected: int
) -> None:
    assert at_once(of(line), Profile(step_s), gain=0.05, coming=MANY) == expected


def test_one_more_within_a_bucket_costs_nothing() -> None:
    profile = Profile({1: 0.01, 2: 0.02, 4: 0.03, 8: 0.06})
    assert at_once(of([1] * 3), profile, gain=0.05, coming=MANY) == 1  # three rows would pay for four
    assert at_once(of([1] * 4), profile, gain=0.05, coming=MANY) == 4
    assert at_once(of([2, 1, 1, 1]), profile, gain=0.05, coming=MANY) == 3


@pytest.mark.parametrize(("gain", "expected"), [(0.0, 2), (0.2, 2), (0.3, 1)])
def test_a_larger_bucket_must_raise_the_rate_by_the_margin(gain: float, expected: int) -> None:
    assert at_once(of([2, 2]), Profile({2: 0.010, 4: 0.016}), gain, MANY) == expected  # by a quarter


def test_a_bucket_beyond_a_bad_one_is_judged_by_the_best_before_it() -> None:
    assert at_once(of([1] * 4), Profile({1: 0.01, 2: 0.03, 4: 0.02}), gain=0.05, coming=MANY) == 4


@pytest.mark.parametrize("step_s", [SERIAL, FLAT])
def test_a_fixed_number_overrides_the_measurement_and_never_the_largest_bucket(step_s: dict[int, float]) -> None:
    profile = Profile(step_s)
    assert [at_once(of([2] * 20), profile, 0.05, MANY, fixed) for fixed in (1, 3, 8, 99)] == [1, 3, 8, 8]
    assert at_once(of([2] * 2), profile, 0.05, MANY, 3) == 2


@quick
@given(lines, profiles, st.floats(0, 0.5))
def test_no_other_number_is_faster_by_more_than_the_margin(line: list[int], profile: Profile, gain: float) -> None:
    chosen = at_once(of(line), profile, gain, MANY)
    assert (chosen > 0) == bool(line)
    for count in range(1, len(line) + 1):
        if sum(line[:count]) > profile.largest:
            assert chosen < count
        elif count != chosen:
            best = rate(profile, line, chosen)
            assert rate(profile, line, count) <= best * (1 + gain) * (1 + 1e-9)
            # Nor does a smaller bucket do as well.
            smaller = profile.bucket(sum(line[:count])) < profile.bucket(sum(line[:chosen]))
            assert not smaller or best > rate(profile, line, count)


# Where sharing gains a little, only a queue makes it worth it

CPU = Profile({2: 0.0105, 4: 0.0189, 8: 0.0322})  # 11 and 17 % more rows per second


def test_two_alone_run_one_after_the_other_where_sharing_slows_one_more_than_it_helps_the_other() -> None:
    assert at_once(of([2, 2]), CPU, gain=0.05, coming=0) == 1
    assert at_once(of([2, 2]), Profile(FLAT), gain=0.05, coming=0) == 2


def test_the_more_wait_or_will_come_the_more_share() -> None:
    assert [at_once(of([2] * count), CPU, gain=0.05, coming=0) for count in (1, 4, 7, 12, 20)] == [1, 1, 1, 4, 4]
    assert [at_once(of([2] * 4), CPU, gain=0.05, coming=coming) for coming in (0, 3, 4)] == [1, 1, 4]


def test_the_pictures_of_one_request_share_whatever_makes_it_faster() -> None:
    """The first of two is of no use to who waits for both."""
    line = [Work(10, 2, last=False), Work(10, 2)]
    assert at_once(line, CPU, gain=0.05, coming=0) == 2
    assert at_once(line * 2, CPU, gain=0.05, coming=0) == 2


@quick
@given(works, profiles, st.floats(0, 100), st.floats(0, 100))
def test_one_who_comes_never_makes_fewer_share(line: list[Work], profile: Profile, few: float, more: float) -> None:
    assert at_once(line, profile, 0.05, coming=few) <= at_once(line, profile, 0.05, coming=few + more)


def test_who_is_coming_follows_the_rate_and_the_load_of_late() -> None:
    arrivals = Arrivals()
    assert arrivals.coming(0.0, backlog_s=1.0) == 0
    for second in range(100):
        arrivals.note(second, device_s=9.0 if second < 50 else 0.5)  # the earlier ones are forgotten
    assert arrivals.coming(100.0, backlog_s=3.0) == pytest.approx(6.0)  # 3 s take 6 s at half load, and one comes each
    assert arrivals.coming(100.0, backlog_s=0.0) == 0
    assert arrivals.coming(1000.0, backlog_s=3.0) < 0.2


def test_overload_counts_for_much_and_not_for_ever() -> None:
    arrivals = Arrivals()
    for second in range(10):
        arrivals.note(second, device_s=2.0)
    assert arrivals.coming(10.0, backlog_s=1.0) == pytest.approx(20.0)


# What a step takes


def test_rows_take_the_time_of_the_smallest_bucket_that_holds_them() -> None:
    profile = Profile({4: 0.03, 1: 0.01, 8: 0.05})
    assert [profile.bucket(rows) for rows in (1, 2, 4, 5, 8)] == [1, 4, 4, 8, 8]
    assert [profile.step_s(rows) for rows in (1, 3, 8)] == [0.01, 0.03, 0.05]
    assert profile.largest == 8
    assert list(profile.table()) == [1, 4, 8]
    assert profile.row_s() == pytest.approx(0.05 / 8)


@pytest.mark.parametrize("pace", [0.67, 1.5])
def test_all_buckets_follow_the_pace_of_one(pace: float) -> None:
    profile = Profile(SERIAL)
    for _ in range(60):
        profile.observe(2, pace * SERIAL[2])
    assert profile.step_s(2) == pytest.approx(pace * SERIAL[2], rel=0.01)
    assert profile.step_s(16) == pytest.approx(pace * SERIAL[16], rel=0.05)
    assert (
        at_once(of([2] * 8), profile, gain=0.05, coming=MANY) == 1
    )  # others are no better for not having been measured lately


def test_proportions_are_learned_where_several_buckets_run() -> None:
    profile = Profile(SERIAL)
    for _ in range(400):
        for bucket in (2, 16):
            profile.observe(bucket, 0.01)
    assert profile.step_s(16) == pytest.approx(profile.step_s(2), rel=0.1)


def test_a_change_of_pace_does_not_pass_for_one_of_proportions() -> None:
    profile = Profile(SERIAL)
    for bucket in (16, *[2] * 100):  # twice as slow from the second step on
        profile.observe(bucket, 2 * SERIAL[bucket] if bucket == 2 else SERIAL[16])
    assert profile.step_s(16) / profile.step_s(2) == pytest.approx(SERIAL[16] / SERIAL[2], rel=0.08)


def test_one_hiccup_changes_little() -> None:
    profile = Profile(SERIAL)
    profile.observe(2, 1000.0)
    assert profile.step_s(2) < 2 * SERIAL[2]
    profile.observe(2, 0.0)
    assert profile.step_s(2) > SERIAL[2] / 2


# When each would be done


def test_where_sharing_gains_nothing_each_waits_for_all_before_it() -> None:
    line = [Work(10, 2), Work(5, 1), Work(20, 2)]
    spans = schedule(line, Profile(SERIAL), gain=0.05, coming=MANY)
    assert [end for _, end in spans] == pytest.approx(list(accumulate([0.2, 0.05, 0.4])))
    assert spans[-1][1] == pytest.approx(device_s(line, Profile(SERIAL)))


def test_where_sharing_is_free_each_takes_the_first_place_that_is_left() -> None:
    profile = Profile({2: 0.01, 4: 0.01})
    spans = schedule([Work(10, 2), Work(4, 2), Work(3, 2), Work(5, 2)], profile, gain=0.05, coming=MANY)
    assert [moment for span in spans for moment in span] == pytest.approx([0, 0.1, 0, 0.04, 0.04, 0.07, 0.07, 0.12])


def test_a_fixed_number_makes_as_many_places() -> None:
    spans = schedule([Work(10, 1)] * 4, Profile(SERIAL), gain=0.05, coming=MANY, fixed=2)
    assert [end for _, end in spans] == pytest.approx([0.2, 0.2, 0.4, 0.4])


def test_an_empty_line_takes_no_time() -> None:
    assert schedule([], Profile(FLAT), gain=0.05, coming=MANY) == []
    assert device_s([], Profile(FLAT)) == 0


@quick
@given(works, profiles)
def test_a_schedule_keeps_the_order_of_the_line_and_its_places(line: list[Work], profile: Profile) -> None:
    places = at_once(line, profile, 0.05, MANY)
    spans = schedule(line, profile, 0.05, MANY)
    assert len(spans) == len(line)
    begins = [begin for begin, _ in spans]
    assert begins == sorted(begins) and begins[:places] == [0.0] * places
    for moment in begins:
        assert sum(begin <= moment < end for begin, end in spans) <= places
    for begin in begins[places:]:  # nobody waits while a place is free
        assert begin in [end for _, end in spans]


# When to decode


def test_as_many_are_decoded_together_as_makes_each_cheapest() -> None:
    dear = Decoding({1: 0.03, 2: 0.06, 4: 0.12})
    assert [dear.bucket(images) for images in (1, 2, 3, 9)] == [1, 1, 1, 1]
    cheap = Decoding({4: 0.03, 1: 0.03, 2: 0.03})
    assert [cheap.bucket(images) for images in (1, 2, 3, 9)] == [1, 2, 4, 4]
    assert Decoding({2: 0.03, 4: 0.04}).bucket(1) == 2
    assert (dear.image_s(), cheap.image_s()) == (0.03, 0.03 / 4)


def test_nobody_waits_for_a_decode_that_gains_nothing_or_holds_up_nobody() -> None:
    assert Decoding({1: 0.03, 2: 0.06, 4: 0.12}).due(1, next_s=0.001, others=8)
    assert Decoding({1: 0.0}).due(1, next_s=0.001, others=8)
    cheap = Decoding({1: 0.03, 2: 0.03, 4: 0.03})
    assert cheap.due(1, next_s=0.001, others=0)
    assert cheap.due(1, next_s=math.inf, others=8)  # nobody is being denoised
    assert cheap.due(4, next_s=0.001, others=8)  # as many as there is a program for


def test_a_decode_is_put_off_if_those_who_wait_lose_less_than_sharing_saves_the_others() -> None:
    decoding = Decoding({1: 0.03, 2: 0.04, 4: 0.06})
    assert not decoding.due(1, next_s=0.0599, others=3)
    assert decoding.due(1, next_s=0.0601, others=3)  # two at once save 0.02 s for each of three
    assert not decoding.due(1, next_s=0.0601, others=4)
    assert decoding.due(2, next_s=0.0401, others=4)  # two wait, and a third saves 0.02 s for each of four


@quick
@given(st.integers(0, 100), st.lists(st.floats(0, 1), min_size=3, max_size=3), st.integers(1, 8))
def test_no_decode_is_put_off_for_longer_than_it_takes(images: int, seconds: list[float], others: int) -> None:
    decoding = Decoding(dict(zip((1, 2, 4), sorted(seconds), strict=True)))
    assert decoding.due(images + 1, next_s=decoding.decode_s[1] * others * (1 + 1e-9), others=others)
