"""The engine over a fake pipeline whose pictures can be worked out by driver: seed plus one for each step. Most tests
drive it by driver on a fake clock; those at the end are about its threads."""

import itertools
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import pytest

from app.engine.engine import Engine
from app.engine.errors import DeadlineUnmeetable, EngineStopped, QueueFull
from app.engine.failures import MOST_FAILURES
from app.engine.request import Generated
from app.engine.scheduler import AGEING, CLOSED_DISPATCH_S, DISPATCH_S
from app.engine.virtual import LONGEST_TEXT, Call, Pixels, number_of
from app.types import Generation, Size
from tests.engine.driver import Driver
from tests.fake_pipeline import LARGE, SMALL, WAIT_S, FakePipeline, Fault, Seconds, flat, numbers, request, serial


def serial_decode(size: Size, images: int) -> float:
    """As much as one and a half guided steps of the serial step_time for each picture."""
    return 0.03 * images * size[0] / SMALL[0]


def flat_decode(size: Size, images: int) -> float:
    """Where two cost what one does, so that it pays to wait for another."""
    return 0.03 * size[0] / SMALL[0]


BOTH = [(serial, serial_decode), (flat, flat_decode)]  # neither steps nor decodes are better shared, or both


def wide(step_time: Seconds = flat, **facts: Any) -> FakePipeline:
    """Up to four guided pictures share a step, and eight have slots."""
    return FakePipeline(step_time=step_time, row_buckets=(1, 2, 4, 8), num_slots=8, **facts)


def shared(driver: Driver) -> list[tuple[int, ...]]:
    """Whose seeds were in each dispatch of steps."""
    return [call.seeds for call in driver.fake.of("step")]


def ends(driver: Driver, futures: list["Future[Generated]"]) -> list[float]:
    """Ticks until all are done; when each was."""
    found: dict[Future[Generated], float] = {}
    for future in futures:
        future.add_done_callback(lambda done: found.__setitem__(done, driver.clock()))
    driver.finish(*futures)
    return [found[future] for future in futures]


def assert_empty(driver: Driver) -> None:
    driver.idle()
    stats = driver.engine.stats()
    keys = ("waiting", "unfinished", "active_slots", "backlog_s")
    assert [stats[key] for key in keys] == [0, 0, 0, 0], stats
    assert stats["num_slots"] == driver.fake.num_slots * len(driver.fake.sizes)


# Pictures


def test_every_row_of_the_table_is_a_step_and_the_picture_comes_back() -> None:
    driver = Driver()
    (generated,) = driver.finish(driver.submit(request(steps=5, seed=100)))
    assert numbers(generated) == [105]
    assert generated.pixels.shape == (1, 8, 8, 3) and generated.pixels.dtype == np.uint8
    assert (generated.seeds, generated.sampler) == ((100,), "ddim")
    (generated,) = driver.finish(driver.submit(request(steps=5, seed=100, sampler="pndm")))
    assert (numbers(generated), generated.sampler) == ([106], "pndm")


def test_n_pictures_have_consecutive_seeds_that_wrap() -> None:
    driver = Driver()
    (generated,) = driver.finish(driver.submit(request(steps=3, seed=2**32 - 2, n=5)))
    assert generated.seeds == (2**32 - 2, 2**32 - 1, 0, 1, 2)
    assert numbers(generated) == [seed + 3 for seed in generated.seeds]


@pytest.mark.parametrize("step_time", [serial, flat])
@pytest.mark.parametrize("images_at_once", [None, 1, 3])
def test_any_mix_gives_each_request_its_own_pictures(step_time: Seconds, images_at_once: int | None) -> None:
    driver = Driver(wide(step_time, decode_time=flat_decode), images_at_once=images_at_once)
    draw = random.Random(0)
    wanted = []
    for i in range(60):
        steps, n, scale, size = draw.randint(1, 9), draw.randint(1, 5), draw.choice([1.0, 7.5]), draw.choice([0, 1])
        generation = request(
            f"{i % 7}", steps=steps, n=n, seed=1000 * i, guidance_scale=scale, size=(SMALL, LARGE)[size]
        )
        wanted.append(([1000 * i + j + steps for j in range(n)], driver.submit(generation)))
        for _ in range(draw.randint(0, 4)):
            driver.tick()
    results = driver.finish(*[future for _, future in wanted])
    assert [numbers(generated) for generated in results] == [expected for expected, _ in wanted]
    assert driver.engine.stats()["requests"]["completed"] == 60
    assert_empty(driver)


def test_what_a_picture_was_made_of_reaches_the_device() -> None:
    driver = Driver()
    driver.finish(driver.submit(request("a cat", negative_prompt="a dog", seed=5, guidance_scale=1.0)))
    assert [(call.texts, call.seeds) for call in driver.fake.of("insert")] == [(("a cat", "a dog"), (5,))]
    assert [call.bucket for call in driver.fake.of("step")] == [1] * len(driver.fake.of("step"))  # unguided: one row


def test_truncation_of_either_prompt_is_reported() -> None:
    driver = Driver()
    long = "x" * (LONGEST_TEXT + 1)
    first, second = driver.finish(
        driver.submit(request("a", negative_prompt=long)), driver.submit(request(long, negative_prompt=""))
    )
    assert (first.prompt_truncated, first.negative_prompt_truncated) == (False, True)
    assert (second.prompt_truncated, second.negative_prompt_truncated) == (True, False)


def test_an_undeclared_size_or_unsuited_sampler_is_refused_before_it_queues() -> None:
    driver = Driver()
    with pytest.raises(ValueError, match="size must be one of 8x8, 16x8, got 16x16"):
        driver.submit(request(size=(16, 16)))
    with pytest.raises(ValueError, match="sampler must be one of ddim, pndm, got lcm"):
        driver.submit(request(sampler="lcm"))
    assert driver.engine.stats()["unfinished"] == 0


# Prompts


def test_repeated_and_empty_prompts_are_encoded_once() -> None:
    driver = Driver(wide())
    driver.finish(*[driver.submit(request(prompt, n=2)) for prompt in ("cat", "dog", "cat")])
    driver.finish(driver.submit(request("dog", negative_prompt="cat")), driver.submit(request("", size=LARGE)))
    assert sorted(text for call in driver.fake.of("encode") for text in call.texts) == ["", "cat", "dog"]
    assert driver.engine.stats()["prompt_cache"] == {"entries": 3, "hits": 7, "misses": 3}


def test_prompts_of_those_who_join_together_are_encoded_together() -> None:
    driver = Driver(wide())
    for prompt in ("a", "b", "c"):
        driver.submit(request(prompt))
    driver.tick()
    assert [sorted(call.texts) for call in driver.fake.of("encode")] == [["", "a", "b", "c"]]


@pytest.mark.parametrize("prompt_cache", [0, 1, 3])
def test_the_prompt_cache_is_bounded_and_forgets_what_was_not_used_longest(prompt_cache: int) -> None:
    driver = Driver(wide(), prompt_cache=prompt_cache)
    for prompt in ("a", "b", "c", "a", "d", "a"):
        assert numbers(driver.finish(driver.submit(request(prompt)))[0]) == [13]
        assert driver.engine.stats()["prompt_cache"]["entries"] <= prompt_cache
    encoded = [text for call in driver.fake.of("encode") for text in call.texts]
    if prompt_cache == 3:  # "" is in every request; of the others two are kept
        assert encoded == ["a", "", "b", "c", "a", "d"]


def test_prompts_that_fail_to_encode_fail_those_who_asked_and_nobody_who_did_not() -> None:
    driver = Driver(wide())
    driver.finish(driver.submit(request("known", negative_prompt="")))
    running = driver.submit(request("known", steps=9, seed=100))
    driver.tick()
    driver.fake.fail("encode")
    known, unseen, partly = (
        driver.submit(request(p, negative_prompt=q)) for p, q in (("known", ""), ("x", "y"), ("known", "z"))
    )
    for future in (unseen, partly):
        with pytest.raises(Fault, match="encode failed"):
            driver.finish(future)
    assert [numbers(generated) for generated in driver.finish(running, known)] == [[109], [13]]
    assert numbers(driver.finish(driver.submit(request("x", negative_prompt="y")))[0]) == [13]  # it was not kept
    assert_empty(driver)


# Who shares a step


def test_where_sharing_gains_nothing_equal_requests_are_served_in_turn() -> None:
    driver = Driver(wide(serial))
    futures = [driver.submit(request(steps=4, seed=100 * i)) for i in range(6)]
    finished = ends(driver, futures)
    assert finished == sorted(finished)
    order = [seeds[0] for seeds in shared(driver)]
    assert all(len(seeds) == 1 for seeds in shared(driver)) and order == sorted(order)
    assert finished[0] == pytest.approx(1000 + 4 * 0.02, abs=0.021)  # not kept waiting by those behind it


def test_where_sharing_is_free_all_share_up_to_the_largest_bucket() -> None:
    driver = Driver(wide(flat))
    for i in range(6):
        driver.submit(request(steps=8, seed=i))
    driver.tick()
    assert shared(driver) == [(0, 1, 2, 3)]
    assert driver.engine.stats()["sizes"]["8x8"]["images_at_once"] == 4
    assert_empty(driver)
    for i in range(9):
        driver.submit(request(steps=8, seed=i, guidance_scale=1.0))
    driver.tick()
    assert shared(driver)[-1] == tuple(range(8))  # of one row each
    assert_empty(driver)


def test_a_newcomer_joins_at_the_next_dispatch() -> None:
    driver = Driver(wide(flat))
    driver.submit(request(steps=50, seed=0))
    for _ in range(5):
        driver.tick()
    driver.submit(request(steps=50, seed=100))
    driver.tick()
    assert shared(driver)[-2:] == [(0,), (0, 100)]


@pytest.mark.parametrize(("step_time", "images_at_once"), [(serial, 3), (serial, 2), (flat, 2), (flat, 1), (flat, 99)])
def test_a_fixed_number_at_once_overrides_what_was_measured(step_time: Seconds, images_at_once: int) -> None:
    driver = Driver(wide(step_time), images_at_once=images_at_once)
    for i in range(8):
        driver.submit(request(steps=5, seed=100 * i))
    driver.tick()
    assert len(shared(driver)[0]) == min(images_at_once, 4)
    assert driver.engine.stats()["admission"] == "fixed"
    driver.idle()
    assert max(len(seeds) for seeds in shared(driver)) == min(images_at_once, 4)
    assert_empty(driver)


def test_a_gain_below_the_margin_is_no_reason_to_share() -> None:
    def nearly(size: Size, rows: int) -> float:
        return 0.01 * rows**0.9  # twice the rows: 7 % more of them a second

    for gain, together in ((0.05, 4), (0.2, 1)):
        driver = Driver(wide(nearly), gain=gain)
        for i in range(4):
            driver.submit(request(seed=i))
        driver.tick()
        assert len(shared(driver)[0]) == together
        assert driver.engine.stats()["gain"] == gain


def test_measured_step_times_follow_the_device_and_forgive_a_hiccup() -> None:
    driver = Driver()
    driver.fake.pace = 3.0
    driver.finish(driver.submit(request(steps=300)))
    measured = driver.engine.stats()["sizes"]["8x8"]["step_s"]
    assert measured["2"] == pytest.approx(0.06, rel=0.02)
    assert measured["4"] == pytest.approx(0.12, rel=0.3)  # has not run, but the machine is slower
    driver.fake.pace = 3000.0
    future = driver.submit(request(steps=40))
    for _ in range(3):
        driver.tick()
    assert driver.engine.stats()["sizes"]["8x8"]["step_s"]["2"] < 4 * 0.06  # one step took a minute
    assert future.cancel()


# Order


def test_shorter_work_overtakes_and_what_it_interrupts_goes_on_where_it_was() -> None:
    driver = Driver(wide(serial))
    long = driver.submit(request(steps=50, seed=0))
    driver.until(driver.clock() + 0.2)
    short = driver.submit(request(steps=4, seed=1000))
    driver.finish(short)
    assert not long.done()
    driver.finish(long)
    order = [seeds[0] for seeds in shared(driver)]
    first, last = order.index(1000), len(order) - 1 - order[::-1].index(1000)
    assert order == [0] * first + [1000] * (last - first + 1) + [0] * (len(order) - 1 - last)
    assert 0 < first and last < len(order) - 1
    assert len(driver.fake.of("insert")) == 2  # the long one kept its slot


def test_ageing_bounds_how_long_shorter_requests_overtake() -> None:
    """With work w_long and w_short (seconds), only those that come less than (w_long - w_short) / AGEING later may."""
    driver = Driver(wide(serial))
    asked = driver.clock()
    long_s, short_s = 20 * 0.02, 2 * 0.02
    bound = asked + (long_s - short_s) / AGEING
    long = driver.submit(request(steps=20, seed=0))
    overtaking: list[float] = []
    unfinished: set[Future[Generated]] = set()

    def note(since: float, short: "Future[Generated]") -> None:
        if not long.done():
            overtaking.append(since)

    for seed in itertools.count(1000, 1000):
        while len(unfinished) == 2:  # at every moment a shorter one waits: by work alone the long one would never run
            driver.tick()
        if long.done() or driver.clock() > asked + 60:
            break
        short = driver.submit(request(steps=2, seed=seed))
        unfinished.add(short)
        short.add_done_callback(unfinished.discard)
        short.add_done_callback(partial(note, driver.clock()))
    first_step = next(call.at for call in driver.fake.of("step") if call.seeds == (0,))
    assert asked + 1 < max(overtaking) <= bound + short_s  # they do overtake, and then no longer
    assert first_step <= bound + 3 * short_s
    assert driver.clock() <= bound + long_s + 4 * short_s


def test_equal_work_is_served_in_order_of_arrival_whatever_the_size_of_the_crowd() -> None:
    driver = Driver(wide(flat))
    futures = []
    for i in range(40):
        futures.append(driver.submit(request(steps=5, seed=100 * i)))
        driver.tick()
    finished = ends(driver, futures)
    assert finished == sorted(finished)


def test_the_pictures_of_a_request_are_made_one_after_the_other_where_sharing_gains_nothing() -> None:
    driver = Driver(wide(serial))
    driver.finish(driver.submit(request(steps=3, n=3, seed=0)))
    order = [seeds[0] for seeds in shared(driver)]
    assert order == sorted(order)


# Sizes


def share_s(driver: Driver, size: Size, since: float) -> float:
    return sum(call.seconds for call in driver.fake.of("step") if call.size == size and call.at >= since)


@pytest.mark.parametrize(("small", "large"), [(3, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("step_time", [serial, flat])
def test_sizes_have_device_time_in_proportion_to_their_pictures_in_line(
    step_time: Seconds, small: int, large: int
) -> None:
    driver = Driver(wide(step_time))
    for i in range(small):
        driver.submit(request(steps=10_000, seed=10_000 * i))
    for i in range(large):
        driver.submit(request(steps=10_000, seed=10**6 + 10_000 * i, size=LARGE))
    driver.until(driver.clock() + 0.5)
    since = driver.clock()
    driver.until(since + 8)
    had, other = share_s(driver, SMALL, since), share_s(driver, LARGE, since)
    assert had / (had + other) == pytest.approx(small / (small + large), abs=0.02)


@pytest.mark.parametrize(("crowd", "lone"), [(LARGE, SMALL), (SMALL, LARGE)])
@pytest.mark.parametrize("step_time", [serial, flat])
def test_a_stream_of_one_size_never_starves_another(step_time: Seconds, crowd: Size, lone: Size) -> None:
    driver = Driver(wide(step_time))
    seeds = itertools.count(0, 100)
    unfinished: set[Future[Generated]] = set()

    def stream() -> None:
        while len(unfinished) < 6:
            future = driver.submit(request(steps=4, seed=next(seeds), size=crowd))
            unfinished.add(future)
            future.add_done_callback(unfinished.discard)

    while driver.clock() < 1003:
        stream()
        driver.tick()
    asked = driver.clock()
    other = driver.submit(request(steps=4, seed=10**6, size=lone))
    while not other.done():
        stream()
        driver.tick()
        assert driver.clock() < asked + 10, "the lone request starves"
    # It has a seventh of the device.
    assert driver.clock() - asked < 8 * 4 * step_time(lone, 2) + 20 * DISPATCH_S
    assert numbers(other.result()) == [10**6 + 4]


@pytest.mark.parametrize(("busy", "new"), [(LARGE, SMALL), (SMALL, LARGE)])
def test_a_size_pays_nothing_for_time_that_it_had_while_nobody_else_wanted_it(busy: Size, new: Size) -> None:
    driver = Driver(wide(serial))
    driver.finish(driver.submit(request(steps=2000, size=busy)))
    driver.idle()
    driver.submit(request(steps=2000, seed=10**6, size=new))
    driver.tick()
    asked = driver.clock()
    driver.finish(driver.submit(request(steps=10, seed=2 * 10**6, size=busy)))
    assert driver.clock() - asked < 3 * 10 * serial(busy, 2) + 10 * DISPATCH_S


@pytest.mark.parametrize(("busy", "late"), [(LARGE, SMALL), (SMALL, LARGE)])
def test_a_size_has_no_claim_to_time_that_it_did_not_want(busy: Size, late: Size) -> None:
    driver = Driver(wide(serial))
    driver.submit(request(steps=10_000, size=busy))
    driver.until(driver.clock() + 10)
    driver.submit(request(steps=10_000, seed=10**6, size=late))
    since = driver.clock()
    driver.until(since + 5)
    assert share_s(driver, busy, since) == pytest.approx(2.5, abs=0.2)


def test_a_size_gains_nothing_by_leaving_and_coming_back() -> None:
    """Its requests are of one long step each: after each it owes the other size its turns."""

    def slow(size: Size, rows: int) -> float:
        return 1.0 if size == SMALL else 0.01

    driver = Driver(FakePipeline(step_time=slow))
    steady = driver.submit(request(steps=10_000, seed=10**6, size=LARGE))
    last: Future[Generated] | None = None
    since = driver.clock()
    while driver.clock() < since + 20:
        if last is None or last.done():
            last = driver.submit(request(steps=1, seed=0))
        driver.tick()
    assert not steady.done()
    assert share_s(driver, LARGE, since) > 0.4 * 20


# Several steps in a dispatch


def test_steps_share_a_dispatch_until_it_takes_its_time() -> None:
    driver = Driver(FakePipeline(step_time=lambda size, rows: 0.003))
    driver.finish(driver.submit(request(steps=20)))
    assert [call.count for call in driver.fake.of("step")] == [3] * 6 + [2]
    driver = Driver(FakePipeline(step_time=lambda size, rows: 0.5))
    driver.finish(driver.submit(request(steps=3)))
    assert [call.count for call in driver.fake.of("step")] == [1, 1, 1]


def test_a_dispatch_ends_where_anybody_in_it_ends_or_is_shown() -> None:
    driver = Driver(FakePipeline(step_time=lambda size, rows: 0.001))
    first, second = driver.submit(request(steps=4, seed=0)), driver.submit(request(steps=15, seed=100))
    third = driver.submit(request(steps=18, seed=200, size=LARGE), previews=2, on_preview=lambda *_: None)
    driver.finish(first, second, third)
    calls = driver.fake.of("step")
    assert [(call.seeds, call.count) for call in calls if call.size == SMALL] == [
        ((0, 100), 4),
        ((100,), 10),
        ((100,), 1),
    ]
    assert [call.count for call in calls if call.size == LARGE] == [6, 6, 6]


def test_no_dispatch_is_longer_than_a_newcomer_may_wait() -> None:
    draw = random.Random(1)
    driver = Driver(wide(lambda size, rows: 0.0007 * rows**0.7))
    for i in range(40):
        driver.submit(request(steps=draw.randint(1, 60), seed=1000 * i, guidance_scale=draw.choice([1.0, 2.0])))
        driver.until(driver.clock() + draw.random() * 0.05)
    driver.idle()
    calls = driver.fake.of("step")
    assert all(call.seconds <= CLOSED_DISPATCH_S * 1.001 for call in calls)
    assert max(call.count for call in calls) > 5


def test_rows_that_a_bucket_has_left_go_to_the_next_in_line_whom_they_suit() -> None:
    driver = Driver(wide())
    asked = [(9, 1.0), (10, 2.0), (11, 2.0), (12, 2.0), (13, 2.0), (60, 1.0), (61, 1.0)]
    driver.finish(*[driver.submit(request(steps=s, seed=100 * i, guidance_scale=g)) for i, (s, g) in enumerate(asked)])
    assert set(shared(driver)[0]) == {0, 100, 200, 300, 500}  # 7 of 8 rows, and the first of whom one row is enough
    fixed = Driver(wide(), images_at_once=4)
    fixed.finish(*[fixed.submit(request(steps=s, seed=100 * i, guidance_scale=g)) for i, (s, g) in enumerate(asked)])
    assert set(shared(fixed)[0]) == {0, 100, 200, 300}


def quick(step_time: Seconds) -> Seconds:
    return lambda size, rows: step_time(size, rows) / 10


@pytest.mark.parametrize(("step_time", "most_s"), [(flat, DISPATCH_S), (serial, CLOSED_DISPATCH_S)])
def test_a_dispatch_is_short_while_a_newcomer_would_share_the_next_one(step_time: Seconds, most_s: float) -> None:
    driver = Driver(wide(quick(step_time)))
    driver.finish(driver.submit(request(steps=100)))
    seconds = [call.seconds for call in driver.fake.of("step")]
    assert seconds[:-1] == pytest.approx([most_s] * (len(seconds) - 1), rel=0.1)


def test_the_device_is_never_left_idle_and_never_more_than_one_dispatch_ahead() -> None:
    driver = Driver(FakePipeline(step_time=lambda size, rows: 0.05))
    driver.submit(request(steps=30))
    driver.tick()
    for _ in range(28):
        assert driver.tick()
        ahead = driver.fake.idle_at - driver.clock()
        assert 0 < ahead <= 2 * 0.05 + 1e-9


# Previews


def test_previews_need_somebody_to_see_them() -> None:
    with pytest.raises(ValueError, match="previews must be 0 without on_preview, got 2."):
        Driver().submit(request(), previews=2)


@pytest.mark.parametrize(
    ("steps", "previews", "due"),
    [(8, 1, [4]), (9, 2, [3, 6]), (20, 3, [5, 10, 15]), (4, 3, [1, 2, 3]), (3, 3, [1, 2]), (2, 3, [1]), (1, 3, [])],
)
def test_previews_show_the_picture_at_even_steps_in_order_and_before_it_is_done(
    steps: int, previews: int, due: list[int]
) -> None:
    driver = Driver()
    seen: list[tuple[int, int, bool]] = []
    future: Future[Generated] = driver.submit(
        request(steps=steps, seed=100),
        previews=previews,
        on_preview=lambda index, pixels: seen.append((index, number_of(pixels), future.done())),
    )
    (generated,) = driver.finish(future)
    driver.idle()
    assert numbers(generated) == [100 + steps]
    assert [index for index, _, _ in seen] == list(range(len(seen)))
    assert [shown - 100 for _, shown, _ in seen] == due[: len(seen)] and len(seen) == len(due)
    assert not any(done for _, _, done in seen)


def test_previews_slow_nobody() -> None:
    def run(previews: int) -> list[float]:
        driver = Driver(wide(flat))
        futures = [
            driver.submit(request(steps=12, seed=100 * i), previews=previews * (not i), on_preview=lambda *_: None)
            for i in range(4)
        ]
        return ends(driver, futures)

    assert run(3) == run(0)


@pytest.mark.parametrize("later", [False, True])
def test_a_preview_that_fails_costs_nobody_a_picture(later: bool) -> None:
    driver = Driver(wide(flat))
    driver.fake.fail("preview", later=later)
    shown: list[int] = []
    future = driver.submit(
        request(steps=8, seed=100), previews=3, on_preview=lambda index, pixels: shown.append(number_of(pixels))
    )
    other = driver.submit(request(steps=9, seed=1000))
    assert [numbers(generated) for generated in driver.finish(future, other)] == [[108], [1009]]
    assert shown == [104, 106]
    assert_empty(driver)


def test_a_listener_that_fails_costs_nobody_a_picture() -> None:
    def refuse(index: int, pixels: np.ndarray) -> None:
        raise ValueError("gone")

    driver = Driver()
    assert numbers(driver.finish(driver.submit(request(steps=8), previews=3, on_preview=refuse))[0]) == [18]


def test_nobody_is_shown_a_picture_that_was_cancelled() -> None:
    driver = Driver()
    driver.fake.abandoned = lambda seed: True
    shown: list[int] = []
    future = driver.submit(request(steps=8), previews=1, on_preview=lambda index, pixels: shown.append(index))
    while not driver.fake.of("preview"):
        driver.engine.tick()
    assert future.cancel()
    driver.idle()
    assert shown == []


# Cancelling


EVERYBODY = ((0, 6, 1, SMALL), (1, 5, 2, LARGE), (2, 4, 3, SMALL), (3, 9, 1, LARGE), (4, 2, 2, SMALL))


def everybody(driver: Driver) -> list["Future[Generated]"]:
    """Requests that share steps, sizes, slots and turns."""
    return [
        driver.submit(request(f"{i}", steps=steps, seed=100 * i, n=n, size=size)) for i, steps, n, size in EVERYBODY
    ]


def theirs(i: int) -> list[int]:
    """Their pictures."""
    _, steps, n, _ = EVERYBODY[i]
    return [100 * i + j + steps for j in range(n)]


@pytest.mark.parametrize(("step_time", "decode"), BOTH)
@pytest.mark.parametrize("whom", range(len(EVERYBODY)))
def test_a_request_cancelled_at_any_moment_is_gone_by_the_next_tick_and_touches_nobody(
    step_time: Seconds, decode: Seconds, whom: int
) -> None:
    seeds = set(range(100 * whom, 100 * whom + 3))
    landed = 0
    for moment in itertools.count():
        driver = Driver(wide(step_time, decode_time=decode))
        futures = everybody(driver)
        for _ in range(moment):
            driver.tick()
        if not futures[whom].cancel():
            break
        landed += 1
        calls = len(driver.fake.calls)
        driver.idle()
        others = [(i, future) for i, future in enumerate(futures) if i != whom]
        assert [numbers(future.result(0)) for _, future in others] == [theirs(i) for i, _ in others]
        later = [call for call in driver.fake.calls[calls:] if call.verb in ("insert", "step", "decode")]
        assert not [call for call in later if seeds & set(call.seeds)]
        requests = driver.engine.stats()["requests"]
        assert (requests["cancelled"], requests["completed"], requests["failed"]) == (1, len(others), 0)
        assert_empty(driver)
    assert landed > 2


def test_a_cancelled_request_frees_its_slots_by_the_next_tick() -> None:
    driver = Driver(wide(flat))
    gone, other = driver.submit(request(steps=9, seed=0, n=3)), driver.submit(request(steps=9, seed=100))
    driver.tick()
    assert driver.engine.stats()["active_slots"] == 4
    assert gone.cancel()
    driver.tick()
    assert driver.engine.stats()["active_slots"] == 1
    assert [set(seeds) for seeds in shared(driver)[-2:]] == [{0, 1, 2, 100}, {100}]
    assert numbers(driver.finish(other)[0]) == [109]
    with pytest.raises(CancelledError):
        gone.result(0)


def test_a_cancelled_waiting_request_never_runs_and_frees_its_place_at_once() -> None:
    driver = Driver(max_waiting=2)
    running = driver.submit(request("running", seed=0))
    driver.tick()
    waiting, last = driver.submit(request("waiting", seed=100)), driver.submit(request("last", seed=200))
    with pytest.raises(QueueFull):
        driver.submit(request())
    assert waiting.cancel()
    replacement = driver.submit(request("replacement", seed=300))
    driver.finish(running, last, replacement)
    encoded = {text for call in driver.fake.of("encode") for text in call.texts}
    assert encoded == {"running", "last", "replacement", ""}


def test_cancelling_what_is_done_changes_nothing() -> None:
    driver = Driver()
    future = driver.submit(request())
    driver.finish(future)
    assert not future.cancel()
    assert driver.engine.stats()["requests"]["cancelled"] == 0
    assert_empty(driver)


# Deadlines and full queues


def estimate_s(driver: Driver, generation: Generation) -> float:
    with pytest.raises(DeadlineUnmeetable) as refusal:
        driver.submit(generation, timeout_s=0)
    return refusal.value.estimate_s


def crowd(driver: Driver, seed: int, *, mixed: bool, sizes: int, n: int, equal: int = 10) -> Callable[[], Generation]:
    """Some requests, in line or running; gives the next."""
    draw = random.Random(seed)
    seeds = itertools.count(0, 100)

    def another() -> Generation:
        steps, scale = (draw.choice([2, 10, 40]), draw.choice([1.0, 7.5])) if mixed else (equal, 7.5)
        size = draw.choice([SMALL, LARGE][:sizes])
        return request(steps=steps, seed=next(seeds), n=draw.randint(1, n), size=size, guidance_scale=scale)

    for _ in range(draw.randint(0, 12)):
        driver.submit(another())
        if draw.random() < 0.3:
            driver.until(driver.clock() + draw.random() * 0.1)
    return another


def underway_s(driver: Driver) -> float:
    """What no estimate counts: two dispatches on their way in the device, and the pictures that they ended."""
    fake = driver.fake
    return max(2 * max(fake.step_s[size, 4], CLOSED_DISPATCH_S) + 4 * fake.decode_s[size, 1] for size in fake.sizes)


@pytest.mark.parametrize("decode", [lambda size, images: 0.0, serial_decode])
@pytest.mark.parametrize(
    ("step_time", "mixed", "sizes", "n", "low", "high"),
    [
        (serial, False, 1, 1, 0.95, 1.01),
        (serial, False, 1, 4, 0.95, 1.01),
        (serial, True, 1, 4, 0.9, 1.01),
        (flat, False, 1, 4, 0.75, 1.01),
        (serial, False, 2, 4, 0.7, 1.25),
        (flat, False, 2, 4, 0.7, 1.25),
    ],
)
def test_an_estimate_is_what_it_then_takes(
    step_time: Seconds, mixed: bool, sizes: int, n: int, low: float, high: float, decode: Seconds
) -> None:
    for seed in range(20):
        driver = Driver(wide(step_time, decode_time=decode))
        generation = crowd(driver, seed, mixed=mixed, sizes=sizes, n=n)()
        estimate, asked = estimate_s(driver, generation), driver.clock()
        driver.finish(driver.submit(generation))
        took = driver.clock() - asked
        assert low * took - underway_s(driver) <= estimate <= high * took + underway_s(driver), seed


def test_a_deadline_that_can_be_met_is_accepted_and_one_that_cannot_is_refused_at_once() -> None:
    driver = Driver(wide(serial, decode_time=serial_decode))
    futures = [driver.submit(request(steps=10, seed=100 * i)) for i in range(4)]
    estimate = estimate_s(driver, request(steps=10))
    assert estimate == pytest.approx(5 * (10 * 0.02 + 0.03))
    with pytest.raises(DeadlineUnmeetable) as refusal:
        driver.submit(request(steps=10), timeout_s=estimate - 0.25)
    assert refusal.value.retry_after_s == pytest.approx(0.25)
    futures.append(driver.submit(request(steps=10, seed=1000), timeout_s=estimate + 1e-6))
    assert driver.engine.stats()["requests"]["deadline"] == 2
    assert driver.engine.stats()["unfinished"] == 5  # nothing was queued of those refused
    driver.finish(*futures)
    assert_empty(driver)


def test_estimates_follow_the_pace_of_the_device() -> None:
    driver = Driver()
    before = estimate_s(driver, request(steps=50))
    driver.fake.pace = 4.0
    driver.finish(driver.submit(request(steps=60)))
    assert estimate_s(driver, request(steps=50)) == pytest.approx(4 * before, rel=0.02)


@pytest.mark.parametrize("step_time", [serial, flat])
@pytest.mark.parametrize(("mixed", "sizes", "n"), [(False, 1, 1), (False, 1, 4), (True, 1, 1), (False, 2, 4)])
def test_what_was_refused_for_its_deadline_is_accepted_when_it_comes_back(
    step_time: Seconds, mixed: bool, sizes: int, n: int
) -> None:
    refused = 0
    for seed in range(20):
        driver = Driver(wide(step_time, decode_time=serial_decode))
        generation = crowd(driver, seed, mixed=mixed, sizes=sizes, n=n)()
        timeout_s = 1.1 * estimate_s(
            Driver(wide(step_time, decode_time=serial_decode)), generation
        ) + 2 * serial_decode(SMALL, 1)
        try:
            driver.submit(generation, timeout_s=timeout_s)
        except DeadlineUnmeetable as refusal:
            refused += 1
            driver.until(driver.clock() + 1.05 * refusal.retry_after_s + underway_s(driver))
            driver.submit(generation, timeout_s=timeout_s)
    assert refused > 3


@pytest.mark.parametrize("step_time", [serial, flat])
@pytest.mark.parametrize(("mixed", "sizes", "n"), [(False, 1, 1), (False, 1, 4), (True, 1, 4), (False, 2, 4)])
def test_a_full_queue_refuses_and_has_a_place_when_it_said(step_time: Seconds, mixed: bool, sizes: int, n: int) -> None:
    for seed in range(20):
        driver = Driver(wide(step_time, decode_time=serial_decode), max_waiting=12)
        another = crowd(driver, seed, mixed=mixed, sizes=sizes, n=n, equal=60)
        with pytest.raises(QueueFull) as refusal:
            for _ in range(20):
                driver.submit(generation := another())
        stats = driver.engine.stats()
        assert (stats["requests"]["queue_full"], stats["waiting"]) == (1, 12)
        late = 1.05 if sizes == 1 else 1.5
        driver.until(driver.clock() + late * refusal.value.retry_after_s + underway_s(driver))
        driver.submit(generation)


# Failures


@pytest.mark.parametrize(("step_time", "decode"), BOTH)
@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("verb", ["encode", "insert", "step", "decode"])
def test_a_verb_that_fails_at_any_moment_fails_those_it_spoils_and_nobody_else(
    verb: str, later: bool, step_time: Seconds, decode: Seconds
) -> None:
    spoilt = 0
    for moment in itertools.count():
        driver = Driver(wide(step_time, decode_time=decode))
        driver.fake.fail(verb, after=moment, later=later)
        futures = everybody(driver)
        driver.idle()
        if not driver.fake.faults:
            break
        (fault,) = driver.fake.faults
        for i, future in enumerate(futures):
            seeds = set(range(100 * i, 100 * i + EVERYBODY[i][2]))
            if seeds & fault.touched or f"{i}" in fault.texts:
                assert future.exception(0) is fault, (moment, i)
                spoilt += 1
            else:
                assert numbers(future.result(0)) == theirs(i), (moment, i)
        assert driver.engine.healthy
        assert numbers(driver.finish(driver.submit(request(seed=10**6)))[0]) == [10**6 + 3]
        assert_empty(driver)
    assert spoilt >= moment > 1


class Wrong(Pixels):
    """Not what a decode should have made."""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        images = super().__array__()
        return {101: images[:0], 201: images[0], 301: images[:, :4]}[self.numbers[0]]


@pytest.mark.parametrize("seed", [100, 200, 300], ids=["too few", "one without a batch", "another shape"])
def test_pixels_that_are_not_pictures_end_their_request_and_no_other(
    seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    driver = Driver(FakePipeline(decode_buckets=(1,)))
    decode = driver.fake.decode

    def wrong(state: Any, slots: Sequence[int]) -> Pixels:
        made = decode(state, slots)
        return Wrong(**vars(made)) if made.numbers == (seed + 1,) else made

    driver.fake.decode = wrong  # type: ignore[method-assign]
    other, spoilt = driver.submit(request(steps=2, seed=0)), driver.submit(request(steps=1, seed=seed, n=2))
    driver.idle()
    assert isinstance(spoilt.exception(0), ValueError)
    assert numbers(other.result(0)) == [2]
    assert len([record for record in caplog.records if record.exc_info]) == 1
    assert numbers(driver.finish(driver.submit(request(seed=1000)))[0]) == [1003]
    assert_empty(driver)


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("verb", ["encode", "insert", "step", "decode", "preview", "wait", "read"])
def test_every_failure_is_logged_once_with_its_traceback(
    verb: str, later: bool, caplog: pytest.LogCaptureFixture
) -> None:
    driver = Driver(wide(flat))
    driver.fake.fail(verb, later=later and verb not in ("wait", "read"))
    previews = int(verb == "preview")
    for i in range(3):
        driver.submit(request(f"{i}", steps=4, seed=100 * i), previews=previews, on_preview=lambda *_: None)
    driver.idle()
    assert all(future.done() for future in driver.owners.values())
    (fault,) = driver.fake.faults
    records = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert [record.exc_info[1] for record in records if record.exc_info] == [fault]
    assert len(records) == 1 and str(fault) in records[0].getMessage()


def test_a_drain_refuses_nobody_who_has_begun() -> None:
    """Whoever is told of the refusal first has the engine go on before the others are told."""
    driver = Driver(wide(flat))
    futures = [driver.submit(request(steps=2, seed=100 * i)) for i in range(5)]
    for future in futures:
        future.add_done_callback(lambda _: driver.engine.tick())
    driver.engine.drain(0.0)
    begun = {seed for call in driver.fake.of("insert") for seed in call.seeds}
    refused = {100 * i for i, future in enumerate(futures) if isinstance(future.exception(0), EngineStopped)}
    assert refused == {0, 100, 200, 300, 400} and not begun & refused
    assert driver.engine.stats()["active_slots"] == 0


def test_failures_that_are_not_in_a_row_are_forgiven() -> None:
    driver = Driver()
    for i in range(4 * MOST_FAILURES):
        driver.fake.fail("step", after=3 * (i % 2), later=i % 3 == 0)
        with pytest.raises(Fault):
            driver.finish(driver.submit(request(steps=9, seed=100 * i)))
        driver.finish(driver.submit(request(steps=9)))
    assert_empty(driver)


# Statistics


@pytest.mark.parametrize(("step_time", "decode"), BOTH)
def test_statistics_add_up_at_every_moment(step_time: Seconds, decode: Seconds) -> None:
    driver = Driver(FakePipeline(step_time=step_time, decode_time=decode))
    futures = everybody(driver)
    busy = True
    seen = set()
    while busy:
        driver.check()
        stats = driver.engine.stats()
        seen.add((stats["waiting"], stats["unfinished"], stats["active_slots"]))
        busy = driver.tick()
    assert len(seen) > 8 and all(future.done() for future in futures)
    assert driver.engine.stats()["uptime_s"] == pytest.approx(driver.clock() - 1000)
    assert_empty(driver)


@pytest.mark.parametrize(("step_time", "decode"), BOTH)
def test_device_seconds_of_requests_add_up_to_what_the_device_did(step_time: Seconds, decode: Seconds) -> None:
    driver = Driver(FakePipeline(step_time=step_time, decode_time=decode))
    results = driver.finish(*everybody(driver))
    driver.idle()
    assert sum(generated.device_s for generated in results) == pytest.approx(driver.fake.busy_s)
    assert driver.engine.stats()["device_busy_s"] == pytest.approx(driver.fake.busy_s, rel=0.02)
    assert driver.engine.stats()["device_busy_s"] <= driver.engine.stats()["uptime_s"] * 1.001


def test_backlog_is_what_the_device_has_yet_to_do() -> None:
    driver = Driver(FakePipeline(step_time=serial, decode_time=serial_decode))
    everybody(driver)
    asked, expected = driver.clock(), driver.engine.stats()["backlog_s"]
    driver.idle()
    assert expected == pytest.approx(driver.clock() - asked)


def test_times_of_a_request_add_up_to_its_latency() -> None:
    driver = Driver(FakePipeline(step_time=serial, decode_time=serial_decode))
    futures = everybody(driver)
    latencies = [moment - 1000 for moment in ends(driver, futures)]
    results = [future.result(0) for future in futures]
    assert [g.queue_s + g.denoise_s + g.decode_s for g in results] == pytest.approx(latencies)
    assert min(min(g.denoise_s, g.decode_s) for g in results) > 0
    assert [g.queue_s > 0 for g in results].count(False) <= 2  # the first of each size


def test_denoising_ends_where_the_device_does_its_last_step() -> None:
    driver = Driver(FakePipeline(step_time=lambda size, rows: 0.002, decode_time=lambda size, images: 0.006))
    (generated,) = driver.finish(driver.submit(request(steps=4)))
    times = (generated.queue_s, generated.denoise_s, generated.decode_s)
    assert times == pytest.approx((0.0, 0.008, 0.006))


@pytest.mark.parametrize(("step_time", "decode"), BOTH)
def test_denoising_that_shares_the_device_ends_where_the_device_does_its_last_step(
    step_time: Seconds, decode: Seconds
) -> None:
    driver = Driver(FakePipeline(step_time=step_time, decode_time=decode))
    results = driver.finish(*everybody(driver))
    idle_at, ends_at = 1000.0, dict[int, float]()
    for call in driver.fake.of("step", "decode"):
        idle_at = max(idle_at, call.at) + call.seconds
        if call.verb == "step":
            ends_at |= dict.fromkeys(call.seeds, idle_at)
    for i, (_, _, n, _) in enumerate(EVERYBODY):
        denoised = max(ends_at[100 * i + j] for j in range(n))
        assert 1000 + results[i].queue_s + results[i].denoise_s == pytest.approx(denoised)


def test_bucket_fill_is_rows_asked_over_rows_computed() -> None:
    driver = Driver(wide(flat, decode_time=serial_decode))
    driver.finish(*[driver.submit(request(steps=100, seed=1000 * i, guidance_scale=1.0)) for i in range(3)])
    assert driver.engine.stats()["bucket_fill"] == pytest.approx(3 / 4)


# Decoding


def test_finished_pictures_share_decodes_and_leave_their_slots_before_they_are_decoded() -> None:
    driver = Driver(wide(flat, decode_time=flat_decode))
    future = driver.submit(request(steps=1, n=7, guidance_scale=1.0))
    driver.engine.tick()
    assert [len(call.seeds) for call in driver.fake.of("decode")] == [2, 2, 2, 1]
    assert not future.done() and driver.engine.stats()["active_slots"] == 0
    driver.finish(future)


def test_a_finished_picture_waits_for_another_only_as_long_as_sharing_a_decode_saves() -> None:
    for steps, together in ((3, True), (12, False)):  # one of 0.03 s instead of two saves three steps of 0.01 s
        driver = Driver(wide(flat, decode_time=flat_decode))
        first, second = driver.submit(request(steps=2, seed=0)), driver.submit(request(steps=steps, seed=100))
        finished = ends(driver, [first, second])
        assert [call.seeds for call in driver.fake.of("decode")] == ([(0, 100)] if together else [(0,), (100,)])
        assert finished[0] - 1000 <= (2 + 3) * 0.01 + 0.03 + 3 * DISPATCH_S
        assert_empty(driver)


def test_nobody_waits_for_another_where_decodes_gain_nothing_by_it() -> None:
    driver = Driver(wide(flat, decode_time=serial_decode))
    driver.finish(driver.submit(request(steps=2, seed=0)), driver.submit(request(steps=3, seed=100)))
    assert [call.seeds for call in driver.fake.of("decode")] == [(0,), (100,)]


def test_a_lone_picture_is_decoded_in_the_smallest_bucket_that_there_is() -> None:
    driver = Driver(FakePipeline(decode_buckets=(2, 4)))
    assert numbers(driver.finish(driver.submit(request(n=3)))[0]) == [13, 14, 15]
    assert {call.bucket for call in driver.fake.of("decode")} == {2}


# Threads


@pytest.fixture
def fake() -> Iterator[FakePipeline]:
    pipeline = wide(flat)
    yield pipeline
    pipeline.open()
    assert not pipeline.broken


@pytest.fixture
def engine(fake: FakePipeline) -> Iterator[Engine]:
    engine = Engine(fake, max_waiting=20)
    fake.abandoned = lambda seed: True  # what a test cancels
    engine.start()
    yield engine
    fake.open()
    engine.close()


def stopped(futures: list["Future[Generated]"]) -> bool:
    return all(isinstance(future.exception(WAIT_S), EngineStopped) for future in futures)


def test_an_idle_thread_wakes_for_each_request(engine: Engine) -> None:
    for seed in range(50):
        assert numbers(engine.submit(request(seed=seed)).result(WAIT_S)) == [seed + 3]
    assert engine.healthy


def test_nobody_who_submits_or_asks_waits_for_the_device(engine: Engine, fake: FakePipeline) -> None:
    fake.gates["wait"].clear()
    futures = [engine.submit(request(steps=30))]
    assert fake.reached["wait"].wait(WAIT_S)
    futures += [engine.submit(request(seed=100 * i, steps=5)) for i in range(5)]
    with pytest.raises(DeadlineUnmeetable):
        engine.submit(request(), timeout_s=0)
    assert (engine.stats()["unfinished"], engine.stats()["waiting"]) == (6, 5)
    assert futures.pop().cancel()
    assert engine.stats()["waiting"] == 4
    fake.open()
    for future in futures:
        assert future.result(WAIT_S)


def test_steps_go_on_while_pixels_are_fetched(engine: Engine, fake: FakePipeline) -> None:
    fake.gates["read"].clear()
    first = engine.submit(request(steps=1, seed=100))
    assert fake.reached["read"].wait(WAIT_S)
    second = engine.submit(request(steps=9, seed=200))
    while len(fake.of("decode")) < 2:  # the second has been denoised
        assert not first.done()
    fake.open()
    assert [numbers(future.result(WAIT_S)) for future in (first, second)] == [[101], [209]]


def test_a_request_cancelled_while_the_device_is_at_it_stops_at_the_next_step(
    engine: Engine, fake: FakePipeline
) -> None:
    fake.gates["step"].clear()
    running = engine.submit(request(steps=1000, seed=0))
    assert fake.reached["step"].wait(WAIT_S)
    assert running.cancel()
    other = engine.submit(request(steps=3, seed=50))
    fake.open()
    assert numbers(other.result(WAIT_S)) == [53]
    assert sum(0 in call.seeds for call in fake.of("step")) == 1


def test_previews_come_from_another_thread_and_before_the_picture(engine: Engine) -> None:
    seen: list[tuple[int, int, bool, str]] = []
    future: Future[Generated]
    ready = threading.Event()

    def show(index: int, pixels: np.ndarray) -> None:
        assert ready.wait(WAIT_S)
        seen.append((index, number_of(pixels), future.done(), threading.current_thread().name))

    future = engine.submit(request(steps=8, seed=0), previews=3, on_preview=show)
    ready.set()
    assert numbers(future.result(WAIT_S)) == [8]
    assert [facts[:3] for facts in seen] == [(0, 2, False), (1, 4, False), (2, 6, False)]
    assert not {facts[3] for facts in seen} & {"engine", threading.current_thread().name}


def held(engine: Engine, fake: FakePipeline) -> tuple[list["Future[Generated]"], ...]:
    """Requests that are decoded, that run, and that wait; their pixels and the next steps are held."""
    all_run = threading.Event()

    def hold(call: Call) -> None:
        if len(call.seeds) == 4:
            fake.before_step = lambda call: None
            fake.gates["step"].clear()
            all_run.set()

    fake.gates["read"].clear()
    decoding = [engine.submit(request(steps=1, seed=0))]
    assert fake.reached["read"].wait(WAIT_S)
    fake.before_step = hold
    fake.gates["insert"].clear()
    running = [engine.submit(request(steps=50, seed=100 * i)) for i in range(1, 5)]
    fake.gates["insert"].set()
    assert all_run.wait(WAIT_S)
    waiting = [engine.submit(request(steps=90, seed=1000 * i)) for i in range(1, 4)]
    return decoding, running, waiting


def test_draining_refuses_what_waits_and_finishes_what_has_begun(engine: Engine, fake: FakePipeline) -> None:
    decoding, running, waiting = held(engine, fake)
    draining = threading.Thread(target=engine.drain, args=(WAIT_S,))
    draining.start()
    assert stopped(waiting)  # at once
    with pytest.raises(EngineStopped):
        engine.submit(request())
    assert draining.is_alive() and engine.healthy and not any(future.done() for future in decoding + running)
    fake.open()
    assert numbers(decoding[0].result(WAIT_S)) == [1]
    assert [numbers(future.result(WAIT_S)) for future in running] == [[100 * i + 50] for i in range(1, 5)]
    draining.join(WAIT_S)
    assert not draining.is_alive() and not engine.healthy
    assert engine.stats()["requests"] | {"completed": 5, "failed": 3} == engine.stats()["requests"]
    with pytest.raises(EngineStopped):
        engine.submit(request())


def test_draining_ends_after_its_timeout_even_if_the_device_hangs(engine: Engine, fake: FakePipeline) -> None:
    decoding, running, waiting = held(engine, fake)
    draining = threading.Thread(target=engine.drain, args=(0.01,))
    draining.start()
    assert stopped(decoding + running + waiting)
    fake.open()
    draining.join(WAIT_S)
    assert not draining.is_alive()


def test_draining_an_idle_engine_closes_it(engine: Engine) -> None:
    engine.drain(WAIT_S)
    assert not engine.healthy


def test_closing_fails_all_that_is_unfinished_and_then_refuses(engine: Engine, fake: FakePipeline) -> None:
    decoding, running, waiting = held(engine, fake)
    closing = threading.Thread(target=engine.close)
    closing.start()
    assert stopped(decoding + running + waiting)
    assert not engine.healthy
    with pytest.raises(EngineStopped):
        engine.submit(request())
    fake.open()
    closing.join(WAIT_S)
    assert not closing.is_alive()
    engine.close()  # once more is nothing
    assert engine.stats()["unfinished"] == 0


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("verb", ["insert", "step"])
def test_an_engine_whose_dispatches_all_fail_gives_up_and_leaves_nobody_waiting(
    engine: Engine, fake: FakePipeline, verb: str, later: bool
) -> None:
    fake.gates["encode"].clear()
    futures = [engine.submit(request(steps=9, seed=100 * i, n=2)) for i in range(12)]
    assert fake.reached["encode"].wait(WAIT_S)
    fake.fail(verb, times=10**6, later=later)
    fake.open()
    errors = [future.exception(WAIT_S) for future in futures]
    assert {type(error) for error in errors} == {Fault, EngineStopped}
    assert len(fake.faults) >= MOST_FAILURES
    with pytest.raises(EngineStopped):
        engine.submit(request())
    assert not engine.healthy
    assert engine.stats()["requests"]["failed"] == 12


@pytest.mark.parametrize(("verb", "later"), [("encode", False), ("decode", False), ("decode", True), ("read", False)])
def test_a_verb_that_always_fails_stops_the_engine(fake: FakePipeline, engine: Engine, verb: str, later: bool) -> None:
    """Steps in between, which succeed, are no excuse."""
    fake.fail(verb, times=100, later=later)
    errors = []
    for i in range(2 * MOST_FAILURES):
        try:
            errors.append(engine.submit(request(f"prompt {i}", seed=100 * i)).exception(WAIT_S))
        except EngineStopped as stopped:
            errors.append(stopped)
            break
    assert [type(error) for error in errors[: MOST_FAILURES - 1]] == [Fault] * (MOST_FAILURES - 1)
    assert type(errors[-1]) is EngineStopped and len(errors) <= MOST_FAILURES + 2
    assert not engine.healthy


def test_a_verb_that_fails_now_and_then_stops_nothing(fake: FakePipeline, engine: Engine) -> None:
    for i in range(3 * MOST_FAILURES):
        fake.fail("decode", times=1)
        assert isinstance(engine.submit(request(seed=1000 * i)).exception(WAIT_S), Fault)
        assert numbers(engine.submit(request(seed=1000 * i + 500)).result(WAIT_S)) == [1000 * i + 503]
    assert engine.healthy


def test_who_comes_while_nobody_waits_shares_the_next_step() -> None:
    """The thread does not commit a second step while the first one runs."""
    fake = FakePipeline(step_time=lambda size, rows: 2.0, row_buckets=(1, 2, 4, 8), num_slots=8)
    engine = Engine(fake, max_waiting=20)
    engine.start()
    first = engine.submit(request(steps=50, seed=0))
    assert fake.reached["step"].wait(WAIT_S)
    second = engine.submit(request(steps=50, seed=1000))
    began = time.monotonic()
    while not any(call.seeds == (0, 1000) for call in fake.of("step")):
        assert time.monotonic() - began < WAIT_S
        time.sleep(0.01)
    assert [call.seeds for call in fake.of("step")][:2] == [(0,), (0, 1000)]
    engine.close()
    assert stopped([first, second])


def test_closing_does_not_wait_for_the_next_step() -> None:
    fake = FakePipeline(step_time=lambda size, rows: 3600.0)
    engine = Engine(fake, max_waiting=20)
    engine.start()
    future = engine.submit(request())
    assert fake.reached["step"].wait(WAIT_S)
    began = time.monotonic()
    engine.close()
    assert time.monotonic() - began < WAIT_S and stopped([future])


def test_pixels_that_fail_leave_the_slots_to_the_thread_that_owns_them(fake: FakePipeline) -> None:
    """The first picture cannot be read while the second is on its way into its slot."""
    engine = Engine(fake, max_waiting=20, images_at_once=1)
    fake.abandoned = lambda seed: True

    def hold(call: Call) -> None:
        if call.seeds == (0,):
            fake.reached["insert"].clear()
            fake.gates["insert"].clear()

    fake.before_step = hold
    fake.gates["read"].clear()
    fake.fail("decode", later=True)
    engine.start()
    spoilt = engine.submit(request(steps=1, seed=0, n=2))
    assert fake.reached["read"].wait(WAIT_S) and fake.reached["insert"].wait(WAIT_S)
    fake.gates["read"].set()
    assert isinstance(spoilt.exception(WAIT_S), Fault)
    fake.open()
    assert numbers(engine.submit(request(steps=1, seed=100)).result(WAIT_S)) == [101]
    assert engine.stats()["active_slots"] == 0
    engine.close()


def test_a_thread_that_dies_leaves_nobody_waiting(engine: Engine, fake: FakePipeline) -> None:
    def die(call: Call) -> None:
        raise SystemExit

    fake.before_step = die
    assert stopped([engine.submit(request())])
    with pytest.raises(EngineStopped):
        engine.submit(request())
    assert not engine.healthy


def test_many_threads_submit_and_cancel_and_nothing_is_lost() -> None:
    fake = FakePipeline(step_time=lambda size, rows: 0.005, row_buckets=(1, 2, 4, 8), num_slots=8)
    engine = Engine(fake, max_waiting=30)
    owners: dict[int, Future[Generated]] = {}
    fake.abandoned = lambda seed: owners[seed].done()
    engine.start()
    clients, each = 4, 25
    refused = [0] * clients

    def settled(futures: list[Future[Generated]]) -> None:
        for future in futures:
            with suppress(CancelledError):
                future.exception(WAIT_S)

    def client(number: int) -> None:
        draw = random.Random(number)
        mine: list[Future[Generated]] = []
        for i in range(each):
            seed, n = 10**6 * number + 1000 * i, draw.randint(1, 3)
            size, steps = draw.choice([SMALL, LARGE]), draw.randint(1, 16)
            try:
                future = engine.submit(
                    request(f"{draw.randint(0, 9)}", steps=steps, seed=seed, n=n, size=size),
                    previews=3 * (n == 1),
                    on_preview=lambda index, pixels: None,
                )
            except QueueFull:
                refused[number] += 1
                settled(mine[-1:])
                continue
            owners.update(dict.fromkeys(range(seed, seed + n), future))
            expected = [seed + j + steps for j in range(n)]
            future.add_done_callback(partial(judge, expected))
            mine.append(future)
            if draw.random() < 0.4:
                draw.choice(mine).cancel()
        settled(mine)

    judged: list[bool] = []

    def judge(expected: list[int], future: "Future[Generated]") -> None:
        judged.append(future.cancelled() or numbers(future.result(0)) == expected)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    engine.drain(WAIT_S)
    stats = engine.stats()
    assert not fake.broken and all(judged)
    assert len(judged) == clients * each - sum(refused)
    assert stats["requests"]["completed"] + stats["requests"]["cancelled"] == len(judged)
    assert (stats["requests"]["failed"], stats["requests"]["queue_full"]) == (0, sum(refused))
    assert stats["requests"]["cancelled"] > 10 and stats["requests"]["completed"] > 10
    assert (stats["unfinished"], stats["waiting"]) == (0, 0)
