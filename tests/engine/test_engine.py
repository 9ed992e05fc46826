"""What the engine decides and delivers, tick by tick on a virtual clock. Its threads are tested beside this file.

An image of the fake pipeline shows its seed plus one for each step, so the expected images are computed by hand.
"""

import itertools
import logging
import random
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from functools import partial
from typing import Any

import numpy as np
import pytest

from app.engine.errors import DeadlineUnmeetable, EngineStopped, QueueFull
from app.engine.failures import MOST_FAILURES
from app.engine.request import Generated
from app.engine.scheduler import AGEING
from app.engine.virtual import LONGEST_TEXT, Pixels, number_of
from app.types import DispatchCost, Generation, InvalidField, Size
from tests.engine.driver import Driver, wide
from tests.fake_pipeline import LARGE, SMALL, FakePipeline, Fault, Seconds, flat, numbers, request, serial


def serial_decode(size: Size, images: int) -> float:
    """Each image takes as long as one and a half guided steps of `serial`."""
    return 0.03 * images * size[0] / SMALL[0]


def flat_decode(size: Size, images: int) -> float:
    """Two images take as long as one, so that it pays to wait for another."""
    return 0.03 * size[0] / SMALL[0]


BOTH = [
    (serial, serial_decode),
    (flat, flat_decode),
]  # sharing gains nothing, or costs nothing


def shared(driver: Driver) -> list[tuple[int, ...]]:
    """The seeds of the images that share each dispatch."""
    return [call.seeds for call in driver.fake.of("step")]


def ends(driver: Driver, futures: list["Future[Generated]"]) -> list[float]:
    """Ticks until all are done; returns when each was."""
    moments: dict[Future[Generated], float] = {}
    for future in futures:
        future.add_done_callback(lambda done: moments.__setitem__(done, driver.clock()))
    driver.finish(*futures)
    return [moments[future] for future in futures]


def assert_empty(driver: Driver) -> None:
    driver.idle()
    stats = driver.engine.stats()
    keys = ("waiting", "unfinished", "active_slots", "backlog_s")
    assert [stats[key] for key in keys] == [0, 0, 0, 0], stats
    assert stats["num_slots"] == driver.fake.num_slots * len(driver.fake.sizes)


# Images


def test_each_row_of_the_sampler_table_is_a_step_and_the_image_is_returned() -> None:
    driver = Driver()
    (generated,) = driver.finish(driver.submit(request(steps=5, seed=100)))
    assert numbers(generated) == [105]
    assert generated.pixels.shape == (1, 8, 8, 3) and generated.pixels.dtype == np.uint8
    assert (generated.seeds, generated.sampler) == ((100,), "ddim")
    (generated,) = driver.finish(driver.submit(request(steps=5, seed=100, sampler="pndm")))
    assert (numbers(generated), generated.sampler) == ([106], "pndm")


def test_n_images_have_consecutive_seeds_that_wrap() -> None:
    driver = Driver()
    (generated,) = driver.finish(driver.submit(request(steps=3, seed=2**32 - 2, n=5)))
    assert generated.seeds == (2**32 - 2, 2**32 - 1, 0, 1, 2)
    assert numbers(generated) == [seed + 3 for seed in generated.seeds]


@pytest.mark.parametrize("step_time", [serial, flat])
@pytest.mark.parametrize("images_at_once", [None, 1, 3])
def test_any_mix_gives_each_request_its_own_images(step_time: Seconds, images_at_once: int | None) -> None:
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


def test_prompts_seed_and_guidance_reach_the_device() -> None:
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


def test_what_the_checkpoint_cannot_follow_is_refused_before_it_queues(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(generation: Generation) -> Generation:
        raise InvalidField("negative_prompt", f"negative_prompt must be empty, got {generation.negative_prompt}.")

    driver = Driver()
    monkeypatch.setattr(driver.fake, "check", check)
    with pytest.raises(InvalidField, match="negative_prompt must be empty"):
        driver.submit(request())
    assert driver.engine.stats()["unfinished"] == 0


# Prompts


def test_repeated_and_empty_prompts_are_encoded_once() -> None:
    driver = Driver(wide())
    driver.finish(*[driver.submit(request(prompt, n=2)) for prompt in ("cat", "dog", "cat")])
    driver.finish(driver.submit(request("dog", negative_prompt="cat")), driver.submit(request("", size=LARGE)))
    assert sorted(text for call in driver.fake.of("encode") for text in call.texts) == ["", "cat", "dog"]
    assert driver.engine.stats()["prompt_cache"] == {"entries": 3, "hits": 7, "misses": 3}


def test_prompts_of_requests_that_join_together_are_encoded_together() -> None:
    driver = Driver(wide())
    for prompt in ("a", "b", "c"):
        driver.submit(request(prompt))
    driver.tick()
    assert [sorted(call.texts) for call in driver.fake.of("encode")] == [["", "a", "b", "c"]]


def test_a_slot_that_a_failed_encoding_leaves_free_is_taken_at_the_next_dispatch() -> None:
    driver = Driver(FakePipeline(step_time=flat, row_buckets=(1, 2, 4, 8), num_slots=3))
    long = [driver.submit(request("", steps=12, seed=100 * i)) for i in range(2)]
    driver.tick()
    driver.fake.fail("encode")
    failed, waiting = driver.submit(request("b", steps=1, seed=200)), driver.submit(request("", steps=2, seed=300))
    driver.tick()
    assert isinstance(failed.exception(0), Fault) and shared(driver)[-1] == (0, 100)
    driver.tick()
    assert shared(driver)[-1] == (300, 0, 100)
    driver.finish(waiting, *long)
    assert_empty(driver)


@pytest.mark.parametrize("prompt_cache", [0, 1, 3])
def test_the_prompt_cache_is_bounded_and_drops_the_least_recently_used(prompt_cache: int) -> None:
    driver = Driver(wide(), prompt_cache=prompt_cache)
    for prompt in ("a", "b", "c", "a", "d", "a"):
        assert numbers(driver.finish(driver.submit(request(prompt)))[0]) == [13]
        assert driver.engine.stats()["prompt_cache"]["entries"] <= prompt_cache
    encoded = [text for call in driver.fake.of("encode") for text in call.texts]
    if prompt_cache == 3:  # "" is in every request; of the others two are kept
        assert encoded == ["a", "", "b", "c", "a", "d"]


def test_prompts_that_fail_to_encode_fail_their_requests_and_no_others() -> None:
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


# Batch size


def test_where_sharing_gains_nothing_equal_requests_are_served_in_turn() -> None:
    driver = Driver(wide(serial))
    futures = [driver.submit(request(steps=4, seed=100 * i)) for i in range(6)]
    finished = ends(driver, futures)
    assert finished == sorted(finished)
    order = [seeds[0] for seeds in shared(driver)]
    assert all(len(seeds) == 1 for seeds in shared(driver)) and order == sorted(order)
    assert finished[0] == pytest.approx(1000 + 4 * 0.02, abs=0.021)  # the requests behind it do not delay it


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
def test_a_fixed_batch_size_overrides_the_cost_model(step_time: Seconds, images_at_once: int) -> None:
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


def test_measured_step_times_follow_the_device_and_ignore_an_outlier() -> None:
    driver = Driver()
    driver.fake.pace = 3.0
    driver.finish(driver.submit(request(steps=300)))
    measured = driver.engine.stats()["sizes"]["8x8"]["step_s"]
    assert measured["2"] == pytest.approx(0.06, rel=0.02)
    assert measured["4"] == 0.04, "a bucket that has not run is not corrected by a single other one"
    driver.fake.pace = 3000.0
    future = driver.submit(request(steps=40))
    for _ in range(3):
        driver.tick()
    assert driver.engine.stats()["sizes"]["8x8"]["step_s"]["2"] < 4 * 0.06  # one step took a minute
    assert future.cancel()


# Order


def test_shorter_work_overtakes_and_the_interrupted_request_keeps_its_slot() -> None:
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
    """Only a request that comes less than (long_s - short_s) / AGEING later overtakes."""
    driver = Driver(wide(serial))
    submitted = driver.clock()
    long_s, short_s = 20 * 0.02, 2 * 0.02
    bound = submitted + (long_s - short_s) / AGEING
    long = driver.submit(request(steps=20, seed=0))
    overtaking: list[float] = []
    unfinished: set[Future[Generated]] = set()

    def note(since: float, short: "Future[Generated]") -> None:
        if not long.done():
            overtaking.append(since)

    for seed in itertools.count(1000, 1000):
        while len(unfinished) == 2:  # a shorter one always waits: without ageing the long one would never run
            driver.tick()
        if long.done() or driver.clock() > submitted + 60:
            break
        short = driver.submit(request(steps=2, seed=seed))
        unfinished.add(short)
        short.add_done_callback(unfinished.discard)
        short.add_done_callback(partial(note, driver.clock()))
    first_step = next(call.at for call in driver.fake.of("step") if call.seeds == (0,))
    assert submitted + 1 < max(overtaking) <= bound + short_s  # they do overtake, but not after the bound
    assert first_step <= bound + 3 * short_s
    assert driver.clock() <= bound + long_s + 4 * short_s


def test_equal_work_is_served_in_order_of_arrival_however_many_wait() -> None:
    driver = Driver(wide(flat))
    futures = []
    for i in range(40):
        futures.append(driver.submit(request(steps=5, seed=100 * i)))
        driver.tick()
    finished = ends(driver, futures)
    assert finished == sorted(finished)


def test_the_images_of_a_request_are_made_one_after_the_other_where_sharing_gains_nothing() -> None:
    driver = Driver(wide(serial))
    driver.finish(driver.submit(request(steps=3, n=3, seed=0)))
    order = [seeds[0] for seeds in shared(driver)]
    assert order == sorted(order)


# Sizes


def share_s(driver: Driver, size: Size, since: float) -> float:
    return sum(call.seconds for call in driver.fake.of("step") if call.size == size and call.at >= since)


@pytest.mark.parametrize(("small", "large"), [(3, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("step_time", [serial, flat])
def test_sizes_share_device_time_in_proportion_to_their_queued_images(
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
    submitted = driver.clock()
    other = driver.submit(request(steps=4, seed=10**6, size=lone))
    while not other.done():
        stream()
        driver.tick()
        assert driver.clock() < submitted + 10, "the lone request starves"
    # It has a seventh of the device.
    assert driver.clock() - submitted < 8 * 4 * step_time(lone, 2) + 0.2
    assert numbers(other.result()) == [10**6 + 4]


@pytest.mark.parametrize(("busy", "new"), [(LARGE, SMALL), (SMALL, LARGE)])
def test_a_size_owes_nothing_for_time_that_no_other_size_wanted(busy: Size, new: Size) -> None:
    driver = Driver(wide(serial))
    driver.finish(driver.submit(request(steps=2000, size=busy)))
    driver.idle()
    driver.submit(request(steps=2000, seed=10**6, size=new))
    driver.tick()
    submitted = driver.clock()
    driver.finish(driver.submit(request(steps=10, seed=2 * 10**6, size=busy)))
    assert driver.clock() - submitted < 3 * 10 * serial(busy, 2) + 0.1


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
    """Each of its requests is a single long step, after which the other size has its share of time."""

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


def slow(size: Size, rows: int) -> float:
    return 0.1


@pytest.mark.parametrize(
    ("launch_s", "dispatch_cost", "step_time", "count"),
    [
        (0.0, DispatchCost(), flat, 1),
        (0.0, DispatchCost(host_s=0.001), flat, 1),  # of the host, which keeps up with the device
        (0.0, DispatchCost(host_s=0.01), flat, 6),  # at first it expects that a call may take three times as long
        (0.002, DispatchCost(), flat, 7),  # the launch is 3 % of the steps
        (0.002, DispatchCost(), serial, 7),  # 1.5 % where no newcomer would join
        (0.5, DispatchCost(), flat, 20),
        (0.5, DispatchCost(), slow, 10),  # a newcomer waits a second at most, whatever was measured
        (0.0, DispatchCost(host_s=0.5), slow, 10),
        (0.002, DispatchCost(blocks=True), flat, 7),
    ],
)
def test_a_dispatch_has_as_few_steps_as_what_it_costs_beside_them_allows(
    launch_s: float, dispatch_cost: DispatchCost, step_time: Seconds, count: int
) -> None:
    driver = Driver(FakePipeline(step_time=step_time, launch_s=launch_s, dispatch_cost=dispatch_cost))
    driver.finish(driver.submit(request(steps=20)))
    counts = [call.count for call in driver.fake.of("step")]
    assert counts[0] == count and sum(counts) == 20


def test_a_dispatch_ends_where_an_image_ends_or_is_previewed() -> None:
    driver = Driver(FakePipeline(step_time=lambda size, rows: 0.001, launch_s=1.0))
    first, second = driver.submit(request(steps=4, seed=0)), driver.submit(request(steps=15, seed=100))
    third = driver.submit(request(steps=18, seed=200, size=LARGE), previews=2, on_preview=lambda *_: None)
    driver.finish(first, second, third)
    calls = driver.fake.of("step")
    assert [(call.seeds, call.count) for call in calls if call.size == SMALL] == [
        ((0, 100), 4),
        ((100,), 11),
    ]
    assert [call.count for call in calls if call.size == LARGE] == [6, 6, 6]


def test_backfill_gives_the_rows_that_a_bucket_has_left_to_the_next_image_that_fits() -> None:
    driver = Driver(wide())
    kinds = [(9, 1.0), (10, 2.0), (11, 2.0), (12, 2.0), (13, 2.0), (60, 1.0), (61, 1.0)]
    driver.finish(*[driver.submit(request(steps=s, seed=100 * i, guidance_scale=g)) for i, (s, g) in enumerate(kinds)])
    assert set(shared(driver)[0]) == {0, 100, 200, 300, 500}  # 7 of 8 rows, and the first image with one row
    fixed = Driver(wide(), images_at_once=4)
    fixed.finish(*[fixed.submit(request(steps=s, seed=100 * i, guidance_scale=g)) for i, (s, g) in enumerate(kinds)])
    assert set(shared(fixed)[0]) == {0, 100, 200, 300}


def test_the_device_never_idles_and_at_most_one_more_dispatch_is_in_flight() -> None:
    driver = Driver(FakePipeline(step_time=lambda size, rows: 0.05))
    driver.submit(request(steps=30))
    driver.tick()
    for _ in range(28):
        assert driver.tick()
        ahead = driver.fake.idle_at - driver.clock()
        assert 0 < ahead <= 2 * 0.05 + 1e-9


# Previews


def test_previews_need_a_callback() -> None:
    with pytest.raises(ValueError, match="previews must be 0 without on_preview, got 2."):
        Driver().submit(request(), previews=2)


@pytest.mark.parametrize(
    ("steps", "previews", "due"),
    [(8, 1, [4]), (9, 2, [3, 6]), (20, 3, [5, 10, 15]), (4, 3, [1, 2, 3]), (3, 3, [1, 2]), (2, 3, [1]), (1, 3, [])],
)
def test_previews_show_the_image_at_even_steps_in_order_and_before_it_is_done(
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


def test_previews_slow_no_request() -> None:
    def run(previews: int) -> list[float]:
        driver = Driver(wide(flat))
        futures = [
            driver.submit(request(steps=12, seed=100 * i), previews=previews * (not i), on_preview=lambda *_: None)
            for i in range(4)
        ]
        return ends(driver, futures)

    assert run(3) == run(0)


@pytest.mark.parametrize("later", [False, True])
def test_a_preview_that_fails_costs_no_image(later: bool) -> None:
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


def test_a_callback_that_fails_costs_no_image() -> None:
    def refuse(index: int, pixels: np.ndarray) -> None:
        raise ValueError("gone")

    driver = Driver()
    assert numbers(driver.finish(driver.submit(request(steps=8), previews=3, on_preview=refuse))[0]) == [18]


def test_a_cancelled_image_is_not_previewed() -> None:
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


MIX = ((0, 6, 1, SMALL), (1, 5, 2, LARGE), (2, 4, 3, SMALL), (3, 9, 1, LARGE), (4, 2, 2, SMALL))


def submit_mix(driver: Driver) -> list["Future[Generated]"]:
    """Requests of both sizes, which share steps and slots."""
    return [driver.submit(request(f"{i}", steps=steps, seed=100 * i, n=n, size=size)) for i, steps, n, size in MIX]


def expected(i: int) -> list[int]:
    """What the images of request i of the mix show."""
    _, steps, n, _ = MIX[i]
    return [100 * i + j + steps for j in range(n)]


@pytest.mark.parametrize(("step_time", "decode"), BOTH)
@pytest.mark.parametrize("cancelled", range(len(MIX)))
def test_a_request_cancelled_at_any_moment_is_gone_by_the_next_tick_and_affects_no_other(
    step_time: Seconds, decode: Seconds, cancelled: int
) -> None:
    seeds = set(range(100 * cancelled, 100 * cancelled + 3))
    landed = 0
    for moment in itertools.count():
        driver = Driver(wide(step_time, decode_time=decode))
        futures = submit_mix(driver)
        for _ in range(moment):
            driver.tick()
        if not futures[cancelled].cancel():
            break
        landed += 1
        calls = len(driver.fake.calls)
        driver.idle()
        others = [(i, future) for i, future in enumerate(futures) if i != cancelled]
        assert [numbers(future.result(0)) for _, future in others] == [expected(i) for i, _ in others]
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


def test_a_cancelled_waiting_request_never_runs_and_makes_room_at_once() -> None:
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


def test_cancelling_a_completed_request_changes_nothing() -> None:
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
    """Submits some requests; returns a function that draws another."""
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


def in_flight_s(driver: Driver) -> float:
    """What no estimate counts: two dispatches in flight, and the decodes of the images that they end."""
    fake = driver.fake
    return max(2 * max(fake.step_s[size, 4], 0.05) + 4 * fake.decode_s[size, 1] for size in fake.sizes)


@pytest.mark.slow
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
def test_an_estimate_is_the_time_that_the_request_then_takes(
    step_time: Seconds, mixed: bool, sizes: int, n: int, low: float, high: float, decode: Seconds
) -> None:
    for seed in range(20):
        driver = Driver(wide(step_time, decode_time=decode))
        generation = crowd(driver, seed, mixed=mixed, sizes=sizes, n=n)()
        estimate, submitted = estimate_s(driver, generation), driver.clock()
        driver.finish(driver.submit(generation))
        took = driver.clock() - submitted
        assert low * took - in_flight_s(driver) <= estimate <= high * took + in_flight_s(driver), seed


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
    assert driver.engine.stats()["unfinished"] == 5  # the refused ones were not queued
    driver.finish(*futures)
    assert_empty(driver)


def test_estimates_follow_the_pace_of_the_device() -> None:
    driver = Driver()
    before = estimate_s(driver, request(steps=50))
    driver.fake.pace = 4.0
    driver.finish(driver.submit(request(steps=60)))
    assert estimate_s(driver, request(steps=50)) == pytest.approx(4 * before, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("step_time", [serial, flat])
@pytest.mark.parametrize(("mixed", "sizes", "n"), [(False, 1, 1), (False, 1, 4), (True, 1, 1), (False, 2, 4)])
def test_a_request_refused_for_its_deadline_is_accepted_after_retry_after(
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
            driver.until(driver.clock() + 1.05 * refusal.retry_after_s + in_flight_s(driver))
            driver.submit(generation, timeout_s=timeout_s)
    assert refused > 3


@pytest.mark.slow
@pytest.mark.parametrize("step_time", [serial, flat])
@pytest.mark.parametrize(("mixed", "sizes", "n"), [(False, 1, 1), (False, 1, 4), (True, 1, 4), (False, 2, 4)])
def test_a_full_queue_has_room_after_retry_after(step_time: Seconds, mixed: bool, sizes: int, n: int) -> None:
    for seed in range(20):
        driver = Driver(wide(step_time, decode_time=serial_decode), max_waiting=12)
        another = crowd(driver, seed, mixed=mixed, sizes=sizes, n=n, equal=60)
        with pytest.raises(QueueFull) as refusal:
            for _ in range(20):
                driver.submit(generation := another())
        stats = driver.engine.stats()
        assert (stats["requests"]["queue_full"], stats["waiting"]) == (1, 12)
        late = 1.05 if sizes == 1 else 1.5
        driver.until(driver.clock() + late * refusal.value.retry_after_s + in_flight_s(driver))
        driver.submit(generation)


# Failures


@pytest.mark.parametrize(("step_time", "decode"), BOTH)
@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("verb", ["encode", "insert", "step", "decode"])
def test_a_verb_that_fails_at_any_moment_fails_the_requests_it_spoils_and_no_others(
    verb: str, later: bool, step_time: Seconds, decode: Seconds
) -> None:
    spoilt = 0
    for moment in itertools.count():
        driver = Driver(wide(step_time, decode_time=decode))
        driver.fake.fail(verb, after=moment, later=later)
        futures = submit_mix(driver)
        driver.idle()
        if not driver.fake.faults:
            break
        (fault,) = driver.fake.faults
        for i, future in enumerate(futures):
            seeds = set(range(100 * i, 100 * i + MIX[i][2]))
            if seeds & fault.touched or f"{i}" in fault.texts:
                assert future.exception(0) is fault, (moment, i)
                spoilt += 1
            else:
                assert numbers(future.result(0)) == expected(i), (moment, i)
        assert driver.engine.healthy
        assert numbers(driver.finish(driver.submit(request(seed=10**6)))[0]) == [10**6 + 3]
        assert_empty(driver)
    assert spoilt >= moment > 1


class Wrong(Pixels):
    """What no decode should return."""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        images = super().__array__()
        return {101: images[:0], 201: images[0], 301: images[:, :4]}[self.numbers[0]]


@pytest.mark.parametrize("seed", [100, 200, 300], ids=["too few", "one without a batch", "another shape"])
def test_pixels_of_a_wrong_shape_fail_their_request_and_no_other(seed: int, caplog: pytest.LogCaptureFixture) -> None:
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


def test_a_drain_refuses_no_request_that_has_begun() -> None:
    """The callback of the first refusal makes the engine go on before the others are refused."""
    driver = Driver(wide(flat))
    futures = [driver.submit(request(steps=2, seed=100 * i)) for i in range(5)]
    for future in futures:
        future.add_done_callback(lambda _: driver.engine.tick())
    driver.engine.drain(0.0)
    begun = {seed for call in driver.fake.of("insert") for seed in call.seeds}
    refused = {100 * i for i, future in enumerate(futures) if isinstance(future.exception(0), EngineStopped)}
    assert refused == {0, 100, 200, 300, 400} and not begun & refused
    assert driver.engine.stats()["active_slots"] == 0


def test_only_failures_in_a_row_end_the_engine() -> None:
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
    futures = submit_mix(driver)
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
@pytest.mark.parametrize("launch_s", [0.0, 0.004])
def test_device_seconds_of_requests_add_up_to_those_of_the_device(
    step_time: Seconds, decode: Seconds, launch_s: float
) -> None:
    driver = Driver(FakePipeline(step_time=step_time, decode_time=decode, launch_s=launch_s))
    results = driver.finish(*submit_mix(driver))
    driver.idle()
    assert sum(generated.device_s for generated in results) == pytest.approx(driver.fake.busy_s)
    assert driver.engine.stats()["device_busy_s"] == pytest.approx(driver.fake.busy_s, rel=0.02)
    assert driver.engine.stats()["device_busy_s"] <= driver.engine.stats()["uptime_s"] * 1.001


def test_backlog_is_the_work_that_is_left_in_device_seconds() -> None:
    driver = Driver(FakePipeline(step_time=serial, decode_time=serial_decode))
    submit_mix(driver)
    submitted, backlog_s = driver.clock(), driver.engine.stats()["backlog_s"]
    driver.idle()
    assert backlog_s == pytest.approx(driver.clock() - submitted)


def test_times_of_a_request_add_up_to_its_latency() -> None:
    driver = Driver(FakePipeline(step_time=serial, decode_time=serial_decode))
    futures = submit_mix(driver)
    latencies = [moment - 1000 for moment in ends(driver, futures)]
    results = [future.result(0) for future in futures]
    assert [g.queue_s + g.denoise_s + g.decode_s for g in results] == pytest.approx(latencies)
    assert min(min(g.denoise_s, g.decode_s) for g in results) > 0
    assert [g.queue_s > 0 for g in results].count(False) <= 2  # the first of each size


def test_denoising_ends_when_the_device_ends_the_last_step() -> None:
    driver = Driver(FakePipeline(step_time=lambda size, rows: 0.002, decode_time=lambda size, images: 0.006))
    (generated,) = driver.finish(driver.submit(request(steps=4)))
    times = (generated.queue_s, generated.denoise_s, generated.decode_s)
    assert times == pytest.approx((0.0, 0.008, 0.006))


@pytest.mark.parametrize(("step_time", "decode"), BOTH)
def test_denoising_that_shares_the_device_is_from_the_first_step_to_the_last_on_the_device(
    step_time: Seconds, decode: Seconds
) -> None:
    driver = Driver(FakePipeline(step_time=step_time, decode_time=decode))
    results = driver.finish(*submit_mix(driver))
    idle_at, begins_at, ends_at = 1000.0, dict[int, float](), dict[int, float]()
    for call in driver.fake.of("step", "decode"):
        began = max(idle_at, call.at)
        idle_at = began + call.seconds
        if call.verb == "step":
            begins_at = dict.fromkeys(call.seeds, began) | begins_at
            ends_at |= dict.fromkeys(call.seeds, idle_at)
    for i, (_, _, n, _) in enumerate(MIX):
        seeds = range(100 * i, 100 * i + n)
        assert 1000 + results[i].queue_s == pytest.approx(min(begins_at[seed] for seed in seeds))
        denoised = max(ends_at[seed] for seed in seeds)
        assert 1000 + results[i].queue_s + results[i].denoise_s == pytest.approx(denoised)


@pytest.mark.parametrize("blocks", [False, True])
def test_device_seconds_are_measured_and_not_predicted(blocks: bool) -> None:
    driver = Driver(FakePipeline(step_time=flat, dispatch_cost=DispatchCost(blocks=blocks)))
    driver.fake.pace = 3.0
    (generated,) = driver.finish(driver.submit(request(steps=5)))
    assert generated.device_s == pytest.approx(3 * 5 * 0.01)
    assert driver.engine.stats()["device_busy_s"] == pytest.approx(3 * 5 * 0.01)


def test_a_step_that_the_device_blocks_for_is_measured_from_its_call() -> None:
    """The time after the call is the end of the steps, and not their beginning."""
    driver = Driver(FakePipeline(step_time=flat, dispatch_cost=DispatchCost(blocks=True)))
    future = driver.submit(request(steps=4))
    for _ in range(4):
        driver.engine.tick()
        assert driver.engine.pause_s() == 0, "the device has nothing left to do"
    (generated,) = driver.finish(future)
    assert generated.denoise_s == pytest.approx(4 * 0.01) and driver.clock() == pytest.approx(1000.04)


def test_bucket_fill_is_active_rows_over_computed_rows() -> None:
    driver = Driver(wide(flat, decode_time=serial_decode))
    driver.finish(*[driver.submit(request(steps=100, seed=1000 * i, guidance_scale=1.0)) for i in range(3)])
    assert driver.engine.stats()["bucket_fill"] == pytest.approx(3 / 4)


# Decoding


def test_denoised_images_share_decodes_and_leave_their_slots_before_they_are_decoded() -> None:
    driver = Driver(wide(flat, decode_time=flat_decode))
    future = driver.submit(request(steps=1, n=7, guidance_scale=1.0))
    driver.engine.tick()
    assert [len(call.seeds) for call in driver.fake.of("decode")] == [2, 2, 2, 1]
    assert not future.done() and driver.engine.stats()["active_slots"] == 0
    driver.finish(future)


def test_a_denoised_image_waits_for_another_only_as_long_as_sharing_a_decode_saves() -> None:
    for steps, together in ((3, True), (12, False)):  # one decode less, of 0.03 s, is worth three steps of 0.01 s
        driver = Driver(wide(flat, decode_time=flat_decode))
        first, second = driver.submit(request(steps=2, seed=0)), driver.submit(request(steps=steps, seed=100))
        finished = ends(driver, [first, second])
        assert [call.seeds for call in driver.fake.of("decode")] == ([(0, 100)] if together else [(0,), (100,)])
        assert finished[0] - 1000 <= (2 + 3) * 0.01 + 0.03 + 0.03
        assert_empty(driver)


def test_no_image_waits_for_another_where_shared_decodes_gain_nothing() -> None:
    driver = Driver(wide(flat, decode_time=serial_decode))
    driver.finish(driver.submit(request(steps=2, seed=0)), driver.submit(request(steps=3, seed=100)))
    assert [call.seeds for call in driver.fake.of("decode")] == [(0,), (100,)]


def test_a_lone_image_is_decoded_in_the_smallest_bucket() -> None:
    driver = Driver(FakePipeline(decode_buckets=(2, 4)))
    assert numbers(driver.finish(driver.submit(request(n=3)))[0]) == [13, 14, 15]
    assert {call.bucket for call in driver.fake.of("decode")} == {2}


# Progress


def test_a_request_can_be_followed_from_the_queue_to_its_pixels() -> None:
    driver = Driver(images_at_once=1)
    first, second, third = (driver.submit(request(steps=steps, seed=steps)) for steps in (4, 6, 8))
    waiting = [driver.engine.progress(future) for future in (first, second, third)]
    assert [
        (progress.status, progress.ahead, progress.steps, progress.total_steps) for progress in waiting if progress
    ] == [
        ("waiting", 0, 0, 4),
        ("waiting", 1, 0, 6),
        ("waiting", 2, 0, 8),
    ]
    assert [progress.left_s for progress in waiting if progress] == pytest.approx([0.08, 0.20, 0.36])
    driver.engine.tick()
    progress = driver.engine.progress(first)
    assert progress and progress.status == "running" and progress.ahead == 0 and 0 < progress.steps <= 4
    assert progress.left_s == pytest.approx(0.02 * (4 - progress.steps))
    driver.finish(first, second, third)
    assert [driver.engine.progress(future) for future in (first, second, third)] == [None] * 3


def test_shorter_work_counts_as_ahead_and_other_sizes_by_their_arrival() -> None:
    driver = Driver(images_at_once=1)
    futures = []
    for seed, (steps, size) in enumerate([(30, SMALL), (3, LARGE), (2, SMALL)]):
        futures.append(driver.submit(request(steps=steps, seed=100 * seed, size=size)))
        driver.clock.reach(driver.clock() + 0.001)
    long, other, short = (driver.engine.progress(future) for future in futures)
    assert long and other and short and [long.ahead, other.ahead, short.ahead] == [1, 1, 1]
    assert short.left_s < other.left_s < long.left_s
    driver.finish(*futures)
