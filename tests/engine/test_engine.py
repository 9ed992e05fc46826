"""The engine over a fake pipeline whose pictures can be worked out by hand: seed plus one for each step. Most tests
drive it by hand on a fake clock; those at the end are about its threads."""

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
from app.types import Generation
from tests.fake_pipeline import (
    LARGE,
    LONG_TEXT,
    SMALL,
    WAIT_S,
    Call,
    FakePipeline,
    Fault,
    Hand,
    Pixels,
    Size,
    flat,
    number,
    numbers,
    request,
    serial,
)

Profile = Callable[[Size, int], float]


def decoding(size: Size, images: int) -> float:
    """As much as one and a half guided steps of the serial profile for each picture."""
    return 0.03 * images * size[0] / SMALL[0]


def shared_decoding(size: Size, images: int) -> float:
    """Where two cost what one does, so that it pays to wait for another."""
    return 0.03 * size[0] / SMALL[0]


BOTH = [(serial, decoding), (flat, shared_decoding)]  # neither steps nor decodes are better shared, or both


def wide(profile: Profile = flat, **facts: Any) -> FakePipeline:
    """Up to four guided pictures share a step, and eight have slots."""
    return FakePipeline(profile=profile, row_buckets=(1, 2, 4, 8), num_slots=8, **facts)


def shared(hand: Hand) -> list[tuple[int, ...]]:
    """Whose seeds were in each dispatch of steps."""
    return [call.seeds for call in hand.fake.of("step")]


def ends(hand: Hand, futures: list["Future[Generated]"]) -> list[float]:
    """Ticks until all are done; when each was."""
    found: dict[Future[Generated], float] = {}
    for future in futures:
        future.add_done_callback(lambda done: found.__setitem__(done, hand.clock()))
    hand.finish(*futures)
    return [found[future] for future in futures]


def assert_empty(hand: Hand) -> None:
    hand.idle()
    stats = hand.engine.stats()
    keys = ("waiting", "unfinished", "active_slots", "backlog_s")
    assert [stats[key] for key in keys] == [0, 0, 0, 0], stats
    assert stats["num_slots"] == hand.fake.num_slots * len(hand.fake.sizes)


# Pictures


def test_every_row_of_the_table_is_a_step_and_the_picture_comes_back() -> None:
    hand = Hand()
    (generated,) = hand.finish(hand.submit(request(steps=5, seed=100)))
    assert numbers(generated) == [105]
    assert generated.pixels.shape == (1, 8, 8, 3) and generated.pixels.dtype == np.uint8
    assert (generated.seeds, generated.sampler) == ((100,), "ddim")
    (generated,) = hand.finish(hand.submit(request(steps=5, seed=100, sampler="pndm")))
    assert (numbers(generated), generated.sampler) == ([106], "pndm")


def test_n_pictures_have_consecutive_seeds_that_wrap() -> None:
    hand = Hand()
    (generated,) = hand.finish(hand.submit(request(steps=3, seed=2**32 - 2, n=5)))
    assert generated.seeds == (2**32 - 2, 2**32 - 1, 0, 1, 2)
    assert numbers(generated) == [seed + 3 for seed in generated.seeds]


@pytest.mark.parametrize("profile", [serial, flat])
@pytest.mark.parametrize("images_at_once", [None, 1, 3])
def test_any_mix_gives_each_request_its_own_pictures(profile: Profile, images_at_once: int | None) -> None:
    hand = Hand(wide(profile, decoding=shared_decoding), images_at_once=images_at_once)
    draw = random.Random(0)
    wanted = []
    for i in range(60):
        steps, n, scale, size = draw.randint(1, 9), draw.randint(1, 5), draw.choice([1.0, 7.5]), draw.choice([0, 1])
        generation = request(
            f"{i % 7}", steps=steps, n=n, seed=1000 * i, guidance_scale=scale, size=(SMALL, LARGE)[size]
        )
        wanted.append(([1000 * i + j + steps for j in range(n)], hand.submit(generation)))
        for _ in range(draw.randint(0, 4)):
            hand.tick()
    results = hand.finish(*[future for _, future in wanted])
    assert [numbers(generated) for generated in results] == [expected for expected, _ in wanted]
    assert hand.engine.stats()["requests"]["completed"] == 60
    assert_empty(hand)


def test_what_a_picture_was_made_of_reaches_the_device() -> None:
    hand = Hand()
    hand.finish(hand.submit(request("a cat", negative_prompt="a dog", seed=5, guidance_scale=1.0)))
    assert [(call.texts, call.seeds) for call in hand.fake.of("insert")] == [(("a cat", "a dog"), (5,))]
    assert [call.bucket for call in hand.fake.of("step")] == [1] * len(hand.fake.of("step"))  # unguided: one row


def test_truncation_of_either_prompt_is_reported() -> None:
    hand = Hand()
    long = "x" * (LONG_TEXT + 1)
    first, second = hand.finish(
        hand.submit(request("a", negative_prompt=long)), hand.submit(request(long, negative_prompt=""))
    )
    assert (first.prompt_truncated, first.negative_prompt_truncated) == (False, True)
    assert (second.prompt_truncated, second.negative_prompt_truncated) == (True, False)


def test_an_undeclared_size_or_unsuited_sampler_is_refused_before_it_queues() -> None:
    hand = Hand()
    with pytest.raises(ValueError, match="size must be one of 8x8, 16x8, got 16x16"):
        hand.submit(request(size=(16, 16)))
    with pytest.raises(ValueError, match="sampler must be one of ddim, pndm, got lcm"):
        hand.submit(request(sampler="lcm"))
    assert hand.engine.stats()["unfinished"] == 0


# Prompts


def test_repeated_and_empty_prompts_are_encoded_once() -> None:
    hand = Hand(wide())
    hand.finish(*[hand.submit(request(prompt, n=2)) for prompt in ("cat", "dog", "cat")])
    hand.finish(hand.submit(request("dog", negative_prompt="cat")), hand.submit(request("", size=LARGE)))
    assert sorted(text for call in hand.fake.of("encode") for text in call.texts) == ["", "cat", "dog"]
    assert hand.engine.stats()["prompt_cache"] == {"entries": 3, "hits": 7, "misses": 3}


def test_prompts_of_those_who_join_together_are_encoded_together() -> None:
    hand = Hand(wide())
    for prompt in ("a", "b", "c"):
        hand.submit(request(prompt))
    hand.tick()
    assert [sorted(call.texts) for call in hand.fake.of("encode")] == [["", "a", "b", "c"]]


@pytest.mark.parametrize("prompt_cache", [0, 1, 3])
def test_the_prompt_cache_is_bounded_and_forgets_what_was_not_used_longest(prompt_cache: int) -> None:
    hand = Hand(wide(), prompt_cache=prompt_cache)
    for prompt in ("a", "b", "c", "a", "d", "a"):
        assert numbers(hand.finish(hand.submit(request(prompt)))[0]) == [13]
        assert hand.engine.stats()["prompt_cache"]["entries"] <= prompt_cache
    encoded = [text for call in hand.fake.of("encode") for text in call.texts]
    if prompt_cache == 3:  # "" is in every request; of the others two are kept
        assert encoded == ["a", "", "b", "c", "a", "d"]


def test_prompts_that_fail_to_encode_fail_those_who_asked_and_nobody_who_did_not() -> None:
    hand = Hand(wide())
    hand.finish(hand.submit(request("known", negative_prompt="")))
    running = hand.submit(request("known", steps=9, seed=100))
    hand.tick()
    hand.fake.fail("encode")
    known, unseen, partly = (
        hand.submit(request(p, negative_prompt=q)) for p, q in (("known", ""), ("x", "y"), ("known", "z"))
    )
    for future in (unseen, partly):
        with pytest.raises(Fault, match="encode failed"):
            hand.finish(future)
    assert [numbers(generated) for generated in hand.finish(running, known)] == [[109], [13]]
    assert numbers(hand.finish(hand.submit(request("x", negative_prompt="y")))[0]) == [13]  # it was not kept
    assert_empty(hand)


# Who shares a step


def test_where_sharing_gains_nothing_equal_requests_are_served_in_turn() -> None:
    hand = Hand(wide(serial))
    futures = [hand.submit(request(steps=4, seed=100 * i)) for i in range(6)]
    finished = ends(hand, futures)
    assert finished == sorted(finished)
    order = [seeds[0] for seeds in shared(hand)]
    assert all(len(seeds) == 1 for seeds in shared(hand)) and order == sorted(order)
    assert finished[0] == pytest.approx(1000 + 4 * 0.02, abs=0.021)  # not kept waiting by those behind it


def test_where_sharing_is_free_all_share_up_to_the_largest_bucket() -> None:
    hand = Hand(wide(flat))
    for i in range(6):
        hand.submit(request(steps=8, seed=i))
    hand.tick()
    assert shared(hand) == [(0, 1, 2, 3)]
    assert hand.engine.stats()["sizes"]["8x8"]["images_at_once"] == 4
    assert_empty(hand)
    for i in range(9):
        hand.submit(request(steps=8, seed=i, guidance_scale=1.0))
    hand.tick()
    assert shared(hand)[-1] == tuple(range(8))  # of one row each
    assert_empty(hand)


def test_a_newcomer_joins_at_the_next_dispatch() -> None:
    hand = Hand(wide(flat))
    hand.submit(request(steps=50, seed=0))
    for _ in range(5):
        hand.tick()
    hand.submit(request(steps=50, seed=100))
    hand.tick()
    assert shared(hand)[-2:] == [(0,), (0, 100)]


@pytest.mark.parametrize(("profile", "images_at_once"), [(serial, 3), (serial, 2), (flat, 2), (flat, 1), (flat, 99)])
def test_a_fixed_number_at_once_overrides_what_was_measured(profile: Profile, images_at_once: int) -> None:
    hand = Hand(wide(profile), images_at_once=images_at_once)
    for i in range(8):
        hand.submit(request(steps=5, seed=100 * i))
    hand.tick()
    assert len(shared(hand)[0]) == min(images_at_once, 4)
    assert hand.engine.stats()["admission"] == "fixed"
    hand.idle()
    assert max(len(seeds) for seeds in shared(hand)) == min(images_at_once, 4)
    assert_empty(hand)


def test_a_gain_below_the_margin_is_no_reason_to_share() -> None:
    def nearly(size: Size, rows: int) -> float:
        return 0.01 * rows**0.9  # twice the rows: 7 % more of them a second

    for gain, together in ((0.05, 4), (0.2, 1)):
        hand = Hand(wide(nearly), gain=gain)
        for i in range(4):
            hand.submit(request(seed=i))
        hand.tick()
        assert len(shared(hand)[0]) == together
        assert hand.engine.stats()["gain"] == gain


def test_measured_step_times_follow_the_device_and_forgive_a_hiccup() -> None:
    hand = Hand()
    hand.fake.pace = 3.0
    hand.finish(hand.submit(request(steps=300)))
    measured = hand.engine.stats()["sizes"]["8x8"]["step_s"]
    assert measured["2"] == pytest.approx(0.06, rel=0.02)
    assert measured["4"] == pytest.approx(0.12, rel=0.3)  # has not run, but the machine is slower
    hand.fake.pace = 3000.0
    future = hand.submit(request(steps=40))
    for _ in range(3):
        hand.tick()
    assert hand.engine.stats()["sizes"]["8x8"]["step_s"]["2"] < 4 * 0.06  # one step took a minute
    assert future.cancel()


# Order


def test_shorter_work_overtakes_and_what_it_interrupts_goes_on_where_it_was() -> None:
    hand = Hand(wide(serial))
    long = hand.submit(request(steps=50, seed=0))
    hand.until(hand.clock() + 0.2)
    short = hand.submit(request(steps=4, seed=1000))
    hand.finish(short)
    assert not long.done()
    hand.finish(long)
    order = [seeds[0] for seeds in shared(hand)]
    first, last = order.index(1000), len(order) - 1 - order[::-1].index(1000)
    assert order == [0] * first + [1000] * (last - first + 1) + [0] * (len(order) - 1 - last)
    assert 0 < first and last < len(order) - 1
    assert len(hand.fake.of("insert")) == 2  # the long one kept its slot


def test_ageing_bounds_how_long_shorter_requests_overtake() -> None:
    """With work w_long and w_short (seconds), only those that come less than (w_long - w_short) / AGEING later may."""
    hand = Hand(wide(serial))
    asked = hand.clock()
    long_s, short_s = 20 * 0.02, 2 * 0.02
    bound = asked + (long_s - short_s) / AGEING
    long = hand.submit(request(steps=20, seed=0))
    overtaking: list[float] = []
    unfinished: set[Future[Generated]] = set()

    def note(since: float, short: "Future[Generated]") -> None:
        if not long.done():
            overtaking.append(since)

    for seed in itertools.count(1000, 1000):
        while len(unfinished) == 2:  # at every moment a shorter one waits: by work alone the long one would never run
            hand.tick()
        if long.done() or hand.clock() > asked + 60:
            break
        short = hand.submit(request(steps=2, seed=seed))
        unfinished.add(short)
        short.add_done_callback(unfinished.discard)
        short.add_done_callback(partial(note, hand.clock()))
    first_step = next(call.at for call in hand.fake.of("step") if call.seeds == (0,))
    assert asked + 1 < max(overtaking) <= bound + short_s  # they do overtake, and then no longer
    assert first_step <= bound + 3 * short_s
    assert hand.clock() <= bound + long_s + 4 * short_s


def test_equal_work_is_served_in_order_of_arrival_whatever_the_size_of_the_crowd() -> None:
    hand = Hand(wide(flat))
    futures = []
    for i in range(40):
        futures.append(hand.submit(request(steps=5, seed=100 * i)))
        hand.tick()
    finished = ends(hand, futures)
    assert finished == sorted(finished)


def test_the_pictures_of_a_request_are_made_one_after_the_other_where_sharing_gains_nothing() -> None:
    hand = Hand(wide(serial))
    hand.finish(hand.submit(request(steps=3, n=3, seed=0)))
    order = [seeds[0] for seeds in shared(hand)]
    assert order == sorted(order)


# Sizes


def share_s(hand: Hand, size: Size, since: float) -> float:
    return sum(call.seconds for call in hand.fake.of("step") if call.size == size and call.at >= since)


@pytest.mark.parametrize(("small", "large"), [(3, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("profile", [serial, flat])
def test_sizes_have_device_time_in_proportion_to_their_pictures_in_line(
    profile: Profile, small: int, large: int
) -> None:
    hand = Hand(wide(profile))
    for i in range(small):
        hand.submit(request(steps=10_000, seed=10_000 * i))
    for i in range(large):
        hand.submit(request(steps=10_000, seed=10**6 + 10_000 * i, size=LARGE))
    hand.until(hand.clock() + 0.5)
    since = hand.clock()
    hand.until(since + 8)
    had, other = share_s(hand, SMALL, since), share_s(hand, LARGE, since)
    assert had / (had + other) == pytest.approx(small / (small + large), abs=0.02)


@pytest.mark.parametrize(("crowd", "lone"), [(LARGE, SMALL), (SMALL, LARGE)])
@pytest.mark.parametrize("profile", [serial, flat])
def test_a_stream_of_one_size_never_starves_another(profile: Profile, crowd: Size, lone: Size) -> None:
    hand = Hand(wide(profile))
    seeds = itertools.count(0, 100)
    unfinished: set[Future[Generated]] = set()

    def stream() -> None:
        while len(unfinished) < 6:
            future = hand.submit(request(steps=4, seed=next(seeds), size=crowd))
            unfinished.add(future)
            future.add_done_callback(unfinished.discard)

    while hand.clock() < 1003:
        stream()
        hand.tick()
    asked = hand.clock()
    other = hand.submit(request(steps=4, seed=10**6, size=lone))
    while not other.done():
        stream()
        hand.tick()
        assert hand.clock() < asked + 10, "the lone request starves"
    # It has a seventh of the device.
    assert hand.clock() - asked < 8 * 4 * profile(lone, 2) + 20 * DISPATCH_S
    assert numbers(other.result()) == [10**6 + 4]


@pytest.mark.parametrize(("busy", "new"), [(LARGE, SMALL), (SMALL, LARGE)])
def test_a_size_pays_nothing_for_time_that_it_had_while_nobody_else_wanted_it(busy: Size, new: Size) -> None:
    hand = Hand(wide(serial))
    hand.finish(hand.submit(request(steps=2000, size=busy)))
    hand.idle()
    hand.submit(request(steps=2000, seed=10**6, size=new))
    hand.tick()
    asked = hand.clock()
    hand.finish(hand.submit(request(steps=10, seed=2 * 10**6, size=busy)))
    assert hand.clock() - asked < 3 * 10 * serial(busy, 2) + 10 * DISPATCH_S


@pytest.mark.parametrize(("busy", "late"), [(LARGE, SMALL), (SMALL, LARGE)])
def test_a_size_has_no_claim_to_time_that_it_did_not_want(busy: Size, late: Size) -> None:
    hand = Hand(wide(serial))
    hand.submit(request(steps=10_000, size=busy))
    hand.until(hand.clock() + 10)
    hand.submit(request(steps=10_000, seed=10**6, size=late))
    since = hand.clock()
    hand.until(since + 5)
    assert share_s(hand, busy, since) == pytest.approx(2.5, abs=0.2)


def test_a_size_gains_nothing_by_leaving_and_coming_back() -> None:
    """Its requests are of one long step each: after each it owes the other size its turns."""

    def slow(size: Size, rows: int) -> float:
        return 1.0 if size == SMALL else 0.01

    hand = Hand(FakePipeline(profile=slow))
    steady = hand.submit(request(steps=10_000, seed=10**6, size=LARGE))
    last: Future[Generated] | None = None
    since = hand.clock()
    while hand.clock() < since + 20:
        if last is None or last.done():
            last = hand.submit(request(steps=1, seed=0))
        hand.tick()
    assert not steady.done()
    assert share_s(hand, LARGE, since) > 0.4 * 20


# Several steps in a dispatch


def test_steps_share_a_dispatch_until_it_takes_its_time() -> None:
    hand = Hand(FakePipeline(profile=lambda size, rows: 0.003))
    hand.finish(hand.submit(request(steps=20)))
    assert [call.count for call in hand.fake.of("step")] == [3] * 6 + [2]
    hand = Hand(FakePipeline(profile=lambda size, rows: 0.5))
    hand.finish(hand.submit(request(steps=3)))
    assert [call.count for call in hand.fake.of("step")] == [1, 1, 1]


def test_a_dispatch_ends_where_anybody_in_it_ends_or_is_shown() -> None:
    hand = Hand(FakePipeline(profile=lambda size, rows: 0.001))
    first, second = hand.submit(request(steps=4, seed=0)), hand.submit(request(steps=15, seed=100))
    third = hand.submit(request(steps=18, seed=200, size=LARGE), previews=2, on_preview=lambda *_: None)
    hand.finish(first, second, third)
    calls = hand.fake.of("step")
    assert [(call.seeds, call.count) for call in calls if call.size == SMALL] == [
        ((0, 100), 4),
        ((100,), 10),
        ((100,), 1),
    ]
    assert [call.count for call in calls if call.size == LARGE] == [6, 6, 6]


def test_no_dispatch_is_longer_than_a_newcomer_may_wait() -> None:
    draw = random.Random(1)
    hand = Hand(wide(lambda size, rows: 0.0007 * rows**0.7))
    for i in range(40):
        hand.submit(request(steps=draw.randint(1, 60), seed=1000 * i, guidance_scale=draw.choice([1.0, 2.0])))
        hand.until(hand.clock() + draw.random() * 0.05)
    hand.idle()
    calls = hand.fake.of("step")
    assert all(call.seconds <= CLOSED_DISPATCH_S * 1.001 for call in calls)
    assert max(call.count for call in calls) > 5


def test_rows_that_a_bucket_has_left_go_to_the_next_in_line_whom_they_suit() -> None:
    hand = Hand(wide())
    asked = [(9, 1.0), (10, 2.0), (11, 2.0), (12, 2.0), (13, 2.0), (60, 1.0), (61, 1.0)]
    hand.finish(*[hand.submit(request(steps=s, seed=100 * i, guidance_scale=g)) for i, (s, g) in enumerate(asked)])
    assert set(shared(hand)[0]) == {0, 100, 200, 300, 500}  # 7 of 8 rows, and the first of whom one row is enough
    fixed = Hand(wide(), images_at_once=4)
    fixed.finish(*[fixed.submit(request(steps=s, seed=100 * i, guidance_scale=g)) for i, (s, g) in enumerate(asked)])
    assert set(shared(fixed)[0]) == {0, 100, 200, 300}


def quick(profile: Profile) -> Profile:
    return lambda size, rows: profile(size, rows) / 10


@pytest.mark.parametrize(("profile", "most_s"), [(flat, DISPATCH_S), (serial, CLOSED_DISPATCH_S)])
def test_a_dispatch_is_short_while_a_newcomer_would_share_the_next_one(profile: Profile, most_s: float) -> None:
    hand = Hand(wide(quick(profile)))
    hand.finish(hand.submit(request(steps=100)))
    seconds = [call.seconds for call in hand.fake.of("step")]
    assert seconds[:-1] == pytest.approx([most_s] * (len(seconds) - 1), rel=0.1)


def test_the_device_is_never_left_idle_and_never_more_than_one_dispatch_ahead() -> None:
    hand = Hand(FakePipeline(profile=lambda size, rows: 0.05))
    hand.submit(request(steps=30))
    hand.tick()
    for _ in range(28):
        assert hand.tick()
        ahead = hand.fake.idle_at - hand.clock()
        assert 0 < ahead <= 2 * 0.05 + 1e-9


# Previews


def test_previews_need_somebody_to_see_them() -> None:
    with pytest.raises(ValueError, match="previews must be 0 without on_preview, got 2."):
        Hand().submit(request(), previews=2)


@pytest.mark.parametrize(
    ("steps", "previews", "due"),
    [(8, 1, [4]), (9, 2, [3, 6]), (20, 3, [5, 10, 15]), (4, 3, [1, 2, 3]), (3, 3, [1, 2]), (2, 3, [1]), (1, 3, [])],
)
def test_previews_show_the_picture_at_even_steps_in_order_and_before_it_is_done(
    steps: int, previews: int, due: list[int]
) -> None:
    hand = Hand()
    seen: list[tuple[int, int, bool]] = []
    future: Future[Generated] = hand.submit(
        request(steps=steps, seed=100),
        previews=previews,
        on_preview=lambda index, pixels: seen.append((index, number(pixels), future.done())),
    )
    (generated,) = hand.finish(future)
    hand.idle()
    assert numbers(generated) == [100 + steps]
    assert [index for index, _, _ in seen] == list(range(len(seen)))
    assert [shown - 100 for _, shown, _ in seen] == due[: len(seen)] and len(seen) == len(due)
    assert not any(done for _, _, done in seen)


def test_previews_slow_nobody() -> None:
    def run(previews: int) -> list[float]:
        hand = Hand(wide(flat))
        futures = [
            hand.submit(request(steps=12, seed=100 * i), previews=previews * (not i), on_preview=lambda *_: None)
            for i in range(4)
        ]
        return ends(hand, futures)

    assert run(3) == run(0)


@pytest.mark.parametrize("later", [False, True])
def test_a_preview_that_fails_costs_nobody_a_picture(later: bool) -> None:
    hand = Hand(wide(flat))
    hand.fake.fail("preview", later=later)
    shown: list[int] = []
    future = hand.submit(
        request(steps=8, seed=100), previews=3, on_preview=lambda index, pixels: shown.append(number(pixels))
    )
    other = hand.submit(request(steps=9, seed=1000))
    assert [numbers(generated) for generated in hand.finish(future, other)] == [[108], [1009]]
    assert shown == [104, 106]
    assert_empty(hand)


def test_a_listener_that_fails_costs_nobody_a_picture() -> None:
    def refuse(index: int, pixels: np.ndarray) -> None:
        raise ValueError("gone")

    hand = Hand()
    assert numbers(hand.finish(hand.submit(request(steps=8), previews=3, on_preview=refuse))[0]) == [18]


def test_nobody_is_shown_a_picture_that_was_cancelled() -> None:
    hand = Hand()
    hand.fake.abandoned = lambda seed: True
    shown: list[int] = []
    future = hand.submit(request(steps=8), previews=1, on_preview=lambda index, pixels: shown.append(index))
    while not hand.fake.of("preview"):
        hand.engine.tick()
    assert future.cancel()
    hand.idle()
    assert shown == []


# Cancelling


EVERYBODY = ((0, 6, 1, SMALL), (1, 5, 2, LARGE), (2, 4, 3, SMALL), (3, 9, 1, LARGE), (4, 2, 2, SMALL))


def everybody(hand: Hand) -> list["Future[Generated]"]:
    """Requests that share steps, sizes, slots and turns."""
    return [hand.submit(request(f"{i}", steps=steps, seed=100 * i, n=n, size=size)) for i, steps, n, size in EVERYBODY]


def theirs(i: int) -> list[int]:
    """Their pictures."""
    _, steps, n, _ = EVERYBODY[i]
    return [100 * i + j + steps for j in range(n)]


@pytest.mark.parametrize(("profile", "decode"), BOTH)
@pytest.mark.parametrize("whom", range(len(EVERYBODY)))
def test_a_request_cancelled_at_any_moment_is_gone_by_the_next_tick_and_touches_nobody(
    profile: Profile, decode: Profile, whom: int
) -> None:
    seeds = set(range(100 * whom, 100 * whom + 3))
    landed = 0
    for moment in itertools.count():
        hand = Hand(wide(profile, decoding=decode))
        futures = everybody(hand)
        for _ in range(moment):
            hand.tick()
        if not futures[whom].cancel():
            break
        landed += 1
        calls = len(hand.fake.calls)
        hand.idle()
        others = [(i, future) for i, future in enumerate(futures) if i != whom]
        assert [numbers(future.result(0)) for _, future in others] == [theirs(i) for i, _ in others]
        later = [call for call in hand.fake.calls[calls:] if call.verb in ("insert", "step", "decode")]
        assert not [call for call in later if seeds & set(call.seeds)]
        requests = hand.engine.stats()["requests"]
        assert (requests["cancelled"], requests["completed"], requests["failed"]) == (1, len(others), 0)
        assert_empty(hand)
    assert landed > 2


def test_a_cancelled_request_frees_its_slots_by_the_next_tick() -> None:
    hand = Hand(wide(flat))
    gone, other = hand.submit(request(steps=9, seed=0, n=3)), hand.submit(request(steps=9, seed=100))
    hand.tick()
    assert hand.engine.stats()["active_slots"] == 4
    assert gone.cancel()
    hand.tick()
    assert hand.engine.stats()["active_slots"] == 1
    assert [set(seeds) for seeds in shared(hand)[-2:]] == [{0, 1, 2, 100}, {100}]
    assert numbers(hand.finish(other)[0]) == [109]
    with pytest.raises(CancelledError):
        gone.result(0)


def test_a_cancelled_waiting_request_never_runs_and_frees_its_place_at_once() -> None:
    hand = Hand(max_waiting=2)
    running = hand.submit(request("running", seed=0))
    hand.tick()
    waiting, last = hand.submit(request("waiting", seed=100)), hand.submit(request("last", seed=200))
    with pytest.raises(QueueFull):
        hand.submit(request())
    assert waiting.cancel()
    replacement = hand.submit(request("replacement", seed=300))
    hand.finish(running, last, replacement)
    encoded = {text for call in hand.fake.of("encode") for text in call.texts}
    assert encoded == {"running", "last", "replacement", ""}


def test_cancelling_what_is_done_changes_nothing() -> None:
    hand = Hand()
    future = hand.submit(request())
    hand.finish(future)
    assert not future.cancel()
    assert hand.engine.stats()["requests"]["cancelled"] == 0
    assert_empty(hand)


# Deadlines and full queues


def estimate_s(hand: Hand, generation: Generation) -> float:
    with pytest.raises(DeadlineUnmeetable) as refusal:
        hand.submit(generation, timeout_s=0)
    return refusal.value.estimate_s


def crowd(hand: Hand, seed: int, *, mixed: bool, sizes: int, n: int, equal: int = 10) -> Callable[[], Generation]:
    """Some requests, in line or running; gives the next."""
    draw = random.Random(seed)
    seeds = itertools.count(0, 100)

    def another() -> Generation:
        steps, scale = (draw.choice([2, 10, 40]), draw.choice([1.0, 7.5])) if mixed else (equal, 7.5)
        size = draw.choice([SMALL, LARGE][:sizes])
        return request(steps=steps, seed=next(seeds), n=draw.randint(1, n), size=size, guidance_scale=scale)

    for _ in range(draw.randint(0, 12)):
        hand.submit(another())
        if draw.random() < 0.3:
            hand.until(hand.clock() + draw.random() * 0.1)
    return another


def underway_s(hand: Hand) -> float:
    """What no estimate counts: two dispatches on their way in the device, and the pictures that they ended."""
    fake = hand.fake
    return max(2 * max(fake.profile(size, 4), CLOSED_DISPATCH_S) + 4 * fake.decoding(size, 1) for size in fake.sizes)


@pytest.mark.parametrize("decode", [lambda size, images: 0.0, decoding])
@pytest.mark.parametrize(
    ("profile", "mixed", "sizes", "n", "low", "high"),
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
    profile: Profile, mixed: bool, sizes: int, n: int, low: float, high: float, decode: Profile
) -> None:
    for seed in range(20):
        hand = Hand(wide(profile, decoding=decode))
        generation = crowd(hand, seed, mixed=mixed, sizes=sizes, n=n)()
        estimate, asked = estimate_s(hand, generation), hand.clock()
        hand.finish(hand.submit(generation))
        took = hand.clock() - asked
        assert low * took - underway_s(hand) <= estimate <= high * took + underway_s(hand), seed


def test_a_deadline_that_can_be_met_is_accepted_and_one_that_cannot_is_refused_at_once() -> None:
    hand = Hand(wide(serial, decoding=decoding))
    futures = [hand.submit(request(steps=10, seed=100 * i)) for i in range(4)]
    estimate = estimate_s(hand, request(steps=10))
    assert estimate == pytest.approx(5 * (10 * 0.02 + 0.03))
    with pytest.raises(DeadlineUnmeetable) as refusal:
        hand.submit(request(steps=10), timeout_s=estimate - 0.25)
    assert refusal.value.retry_after_s == pytest.approx(0.25)
    futures.append(hand.submit(request(steps=10, seed=1000), timeout_s=estimate + 1e-6))
    assert hand.engine.stats()["requests"]["deadline"] == 2
    assert hand.engine.stats()["unfinished"] == 5  # nothing was queued of those refused
    hand.finish(*futures)
    assert_empty(hand)


def test_estimates_follow_the_pace_of_the_device() -> None:
    hand = Hand()
    before = estimate_s(hand, request(steps=50))
    hand.fake.pace = 4.0
    hand.finish(hand.submit(request(steps=60)))
    assert estimate_s(hand, request(steps=50)) == pytest.approx(4 * before, rel=0.02)


@pytest.mark.parametrize("profile", [serial, flat])
@pytest.mark.parametrize(("mixed", "sizes", "n"), [(False, 1, 1), (False, 1, 4), (True, 1, 1), (False, 2, 4)])
def test_what_was_refused_for_its_deadline_is_accepted_when_it_comes_back(
    profile: Profile, mixed: bool, sizes: int, n: int
) -> None:
    refused = 0
    for seed in range(20):
        hand = Hand(wide(profile, decoding=decoding))
        generation = crowd(hand, seed, mixed=mixed, sizes=sizes, n=n)()
        timeout_s = 1.1 * estimate_s(Hand(wide(profile, decoding=decoding)), generation) + 2 * decoding(SMALL, 1)
        try:
            hand.submit(generation, timeout_s=timeout_s)
        except DeadlineUnmeetable as refusal:
            refused += 1
            hand.until(hand.clock() + 1.05 * refusal.retry_after_s + underway_s(hand))
            hand.submit(generation, timeout_s=timeout_s)
    assert refused > 3


@pytest.mark.parametrize("profile", [serial, flat])
@pytest.mark.parametrize(("mixed", "sizes", "n"), [(False, 1, 1), (False, 1, 4), (True, 1, 4), (False, 2, 4)])
def test_a_full_queue_refuses_and_has_a_place_when_it_said(profile: Profile, mixed: bool, sizes: int, n: int) -> None:
    for seed in range(20):
        hand = Hand(wide(profile, decoding=decoding), max_waiting=12)
        another = crowd(hand, seed, mixed=mixed, sizes=sizes, n=n, equal=60)
        with pytest.raises(QueueFull) as refusal:
            for _ in range(20):
                hand.submit(generation := another())
        stats = hand.engine.stats()
        assert (stats["requests"]["queue_full"], stats["waiting"]) == (1, 12)
        late = 1.05 if sizes == 1 else 1.5
        hand.until(hand.clock() + late * refusal.value.retry_after_s + underway_s(hand))
        hand.submit(generation)


# Failures


@pytest.mark.parametrize(("profile", "decode"), BOTH)
@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("verb", ["encode", "insert", "step", "decode"])
def test_a_verb_that_fails_at_any_moment_fails_those_it_spoils_and_nobody_else(
    verb: str, later: bool, profile: Profile, decode: Profile
) -> None:
    spoilt = 0
    for moment in itertools.count():
        hand = Hand(wide(profile, decoding=decode))
        hand.fake.fail(verb, after=moment, later=later)
        futures = everybody(hand)
        hand.idle()
        if not hand.fake.faults:
            break
        (fault,) = hand.fake.faults
        for i, future in enumerate(futures):
            seeds = set(range(100 * i, 100 * i + EVERYBODY[i][2]))
            if seeds & fault.touched or f"{i}" in fault.texts:
                assert future.exception(0) is fault, (moment, i)
                spoilt += 1
            else:
                assert numbers(future.result(0)) == theirs(i), (moment, i)
        assert hand.engine.healthy
        assert numbers(hand.finish(hand.submit(request(seed=10**6)))[0]) == [10**6 + 3]
        assert_empty(hand)
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
    hand = Hand(FakePipeline(decode_buckets=(1,)))
    decode = hand.fake.decode

    def wrong(state: Any, slots: Sequence[int]) -> Pixels:
        made = decode(state, slots)
        return Wrong(**vars(made)) if made.numbers == (seed + 1,) else made

    hand.fake.decode = wrong  # type: ignore[method-assign]
    other, spoilt = hand.submit(request(steps=2, seed=0)), hand.submit(request(steps=1, seed=seed, n=2))
    hand.idle()
    assert isinstance(spoilt.exception(0), ValueError)
    assert numbers(other.result(0)) == [2]
    assert len([record for record in caplog.records if record.exc_info]) == 1
    assert numbers(hand.finish(hand.submit(request(seed=1000)))[0]) == [1003]
    assert_empty(hand)


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("verb", ["encode", "insert", "step", "decode", "preview", "wait", "read"])
def test_every_failure_is_logged_once_with_its_traceback(
    verb: str, later: bool, caplog: pytest.LogCaptureFixture
) -> None:
    hand = Hand(wide(flat))
    hand.fake.fail(verb, later=later and verb not in ("wait", "read"))
    previews = int(verb == "preview")
    for i in range(3):
        hand.submit(request(f"{i}", steps=4, seed=100 * i), previews=previews, on_preview=lambda *_: None)
    hand.idle()
    assert all(future.done() for future in hand.owners.values())
    (fault,) = hand.fake.faults
    records = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert [record.exc_info[1] for record in records if record.exc_info] == [fault]
    assert len(records) == 1 and str(fault) in records[0].getMessage()


def test_a_drain_refuses_nobody_who_has_begun() -> None:
    """Whoever is told of the refusal first has the engine go on before the others are told."""
    hand = Hand(wide(flat))
    futures = [hand.submit(request(steps=2, seed=100 * i)) for i in range(5)]
    for future in futures:
        future.add_done_callback(lambda _: hand.engine.tick())
    hand.engine.drain(0.0)
    begun = {seed for call in hand.fake.of("insert") for seed in call.seeds}
    refused = {100 * i for i, future in enumerate(futures) if isinstance(future.exception(0), EngineStopped)}
    assert refused == {0, 100, 200, 300, 400} and not begun & refused
    assert hand.engine.stats()["active_slots"] == 0


def test_failures_that_are_not_in_a_row_are_forgiven() -> None:
    hand = Hand()
    for i in range(4 * MOST_FAILURES):
        hand.fake.fail("step", after=3 * (i % 2), later=i % 3 == 0)
        with pytest.raises(Fault):
            hand.finish(hand.submit(request(steps=9, seed=100 * i)))
        hand.finish(hand.submit(request(steps=9)))
    assert_empty(hand)


# Statistics


@pytest.mark.parametrize(("profile", "decode"), BOTH)
def test_statistics_add_up_at_every_moment(profile: Profile, decode: Profile) -> None:
    hand = Hand(FakePipeline(profile=profile, decoding=decode))
    futures = everybody(hand)
    busy = True
    seen = set()
    while busy:
        hand.check()
        stats = hand.engine.stats()
        seen.add((stats["waiting"], stats["unfinished"], stats["active_slots"]))
        busy = hand.tick()
    assert len(seen) > 8 and all(future.done() for future in futures)
    assert hand.engine.stats()["uptime_s"] == pytest.approx(hand.clock() - 1000)
    assert_empty(hand)


@pytest.mark.parametrize(("profile", "decode"), BOTH)
def test_device_seconds_of_requests_add_up_to_what_the_device_did(profile: Profile, decode: Profile) -> None:
    hand = Hand(FakePipeline(profile=profile, decoding=decode))
    results = hand.finish(*everybody(hand))
    hand.idle()
    assert sum(generated.device_s for generated in results) == pytest.approx(hand.fake.busy_s)
    assert hand.engine.stats()["device_busy_s"] == pytest.approx(hand.fake.busy_s, rel=0.02)
    assert hand.engine.stats()["device_busy_s"] <= hand.engine.stats()["uptime_s"] * 1.001


def test_backlog_is_what_the_device_has_yet_to_do() -> None:
    hand = Hand(FakePipeline(profile=serial, decoding=decoding))
    everybody(hand)
    asked, expected = hand.clock(), hand.engine.stats()["backlog_s"]
    hand.idle()
    assert expected == pytest.approx(hand.clock() - asked)


def test_times_of_a_request_add_up_to_its_latency() -> None:
    hand = Hand(FakePipeline(profile=serial, decoding=decoding))
    futures = everybody(hand)
    latencies = [moment - 1000 for moment in ends(hand, futures)]
    results = [future.result(0) for future in futures]
    assert [g.queue_s + g.denoise_s + g.decode_s for g in results] == pytest.approx(latencies)
    assert min(min(g.denoise_s, g.decode_s) for g in results) > 0
    assert [g.queue_s > 0 for g in results].count(False) <= 2  # the first of each size


def test_denoising_ends_where_the_device_does_its_last_step() -> None:
    hand = Hand(FakePipeline(profile=lambda size, rows: 0.002, decoding=lambda size, images: 0.006))
    (generated,) = hand.finish(hand.submit(request(steps=4)))
    times = (generated.queue_s, generated.denoise_s, generated.decode_s)
    assert times == pytest.approx((0.0, 0.008, 0.006))


@pytest.mark.parametrize(("profile", "decode"), BOTH)
def test_denoising_that_shares_the_device_ends_where_the_device_does_its_last_step(
    profile: Profile, decode: Profile
) -> None:
    hand = Hand(FakePipeline(profile=profile, decoding=decode))
    results = hand.finish(*everybody(hand))
    idle_at, ends_at = 1000.0, dict[int, float]()
    for call in hand.fake.of("step", "decode"):
        idle_at = max(idle_at, call.at) + call.seconds
        if call.verb == "step":
            ends_at |= dict.fromkeys(call.seeds, idle_at)
    for i, (_, _, n, _) in enumerate(EVERYBODY):
        denoised = max(ends_at[100 * i + j] for j in range(n))
        assert 1000 + results[i].queue_s + results[i].denoise_s == pytest.approx(denoised)


def test_bucket_fill_is_rows_asked_over_rows_computed() -> None:
    hand = Hand(wide(flat, decoding=decoding))
    hand.finish(*[hand.submit(request(steps=100, seed=1000 * i, guidance_scale=1.0)) for i in range(3)])
    assert hand.engine.stats()["bucket_fill"] == pytest.approx(3 / 4)


# Decoding


def test_finished_pictures_share_decodes_and_leave_their_slots_before_they_are_decoded() -> None:
    hand = Hand(wide(flat, decoding=shared_decoding))
    future = hand.submit(request(steps=1, n=7, guidance_scale=1.0))
    hand.engine.tick()
    assert [len(call.seeds) for call in hand.fake.of("decode")] == [2, 2, 2, 1]
    assert not future.done() and hand.engine.stats()["active_slots"] == 0
    hand.finish(future)


def test_a_finished_picture_waits_for_another_only_as_long_as_sharing_a_decode_saves() -> None:
    for steps, together in ((3, True), (12, False)):  # one of 0.03 s instead of two saves three steps of 0.01 s
        hand = Hand(wide(flat, decoding=shared_decoding))
        first, second = hand.submit(request(steps=2, seed=0)), hand.submit(request(steps=steps, seed=100))
        finished = ends(hand, [first, second])
        assert [call.seeds for call in hand.fake.of("decode")] == ([(0, 100)] if together else [(0,), (100,)])
        assert finished[0] - 1000 <= (2 + 3) * 0.01 + 0.03 + 3 * DISPATCH_S
        assert_empty(hand)


def test_nobody_waits_for_another_where_decodes_gain_nothing_by_it() -> None:
    hand = Hand(wide(flat, decoding=decoding))
    hand.finish(hand.submit(request(steps=2, seed=0)), hand.submit(request(steps=3, seed=100)))
    assert [call.seeds for call in hand.fake.of("decode")] == [(0,), (100,)]


def test_a_lone_picture_is_decoded_in_the_smallest_bucket_that_there_is() -> None:
    hand = Hand(FakePipeline(decode_buckets=(2, 4)))
    assert numbers(hand.finish(hand.submit(request(n=3)))[0]) == [13, 14, 15]
    assert {call.bucket for call in hand.fake.of("decode")} == {2}


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
        seen.append((index, number(pixels), future.done(), threading.current_thread().name))

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
    fake = FakePipeline(profile=lambda size, rows: 2.0, row_buckets=(1, 2, 4, 8), num_slots=8)
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
    fake = FakePipeline(profile=lambda size, rows: 3600.0)
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
    fake = FakePipeline(profile=lambda size, rows: 0.005, row_buckets=(1, 2, 4, 8), num_slots=8)
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
