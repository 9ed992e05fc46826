"""Requests that go from one engine to another: two engines, each over a virtual pipeline that adds one per step."""

import random
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest

from app.engine.errors import DeadlineUnmeetable, EngineStopped, HandedOver, NotResumable, QueueFull
from app.engine.request import Generated
from app.types import Resumed
from tests.engine.driver import Driver, wide
from tests.fake_pipeline import LARGE, SMALL, FakePipeline, Fault, flat, numbers, request, serial


def handed_over(driver: Driver, *futures: "Future[Generated]") -> list[Resumed | None]:
    """Ticks until the engine has let the requests go."""
    driver.engine.hand_over()
    driver.idle()
    errors = [future.exception(0) for future in futures]
    assert all(isinstance(error, HandedOver) for error in errors), errors
    return [error.resumed for error in errors if isinstance(error, HandedOver)]


def steps(driver: Driver) -> int:
    return sum(call.count for call in driver.fake.of("step"))


def ticks(driver: Driver, count: int) -> None:
    for _ in range(count):
        driver.tick()


def test_an_image_goes_on_elsewhere_at_the_step_where_it_was() -> None:
    source, target = Driver(wide()), Driver(wide())
    future = source.submit(request(steps=50, seed=10))
    ticks(source, 20)
    taken = steps(source)
    (resumed,) = handed_over(source, future)
    assert resumed and 0 < taken <= steps(source) < 50
    assert resumed.images[0].steps_left == 50 - steps(source)
    (generated,) = target.finish(target.submit(request(steps=50, seed=10), resumed=resumed))
    assert numbers(generated) == [10 + 50]
    assert steps(source) + steps(target) == 50
    assert not target.fake.of("encode", "insert"), "nothing is made again"
    source.check()
    target.check()
    assert source.engine.stats()["requests"]["moved"] == 1


def test_what_waits_leaves_at_once_and_new_requests_are_refused() -> None:
    driver = Driver(images_at_once=1)
    running, waiting = driver.submit(request(steps=50)), driver.submit(request(steps=50, seed=20))
    ticks(driver, 3)
    driver.engine.hand_over()
    error = waiting.exception(0)
    assert isinstance(error, HandedOver) and error.resumed is None
    assert not running.done()
    with pytest.raises(EngineStopped):
        driver.engine.submit(request())


def test_one_request_leaves_and_the_others_stay() -> None:
    source, target = Driver(images_at_once=2), Driver()
    running, stays, waiting, late = (source.submit(request(steps=20, seed=seed)) for seed in (100, 200, 300, 400))
    ticks(source, 5)
    for future in (running, waiting):
        source.engine.let_go(future)
    error = waiting.exception(0)
    assert isinstance(error, HandedOver) and error.resumed is None, "what waits leaves at once"
    assert [numbers(generated) for generated in source.finish(stays, late)] == [[220], [420]]
    moved = running.exception(0)
    assert isinstance(moved, HandedOver) and moved.resumed and 0 < moved.resumed.images[0].steps_left < 20
    (generated,) = target.finish(target.submit(request(steps=20, seed=100), resumed=moved.resumed))
    assert numbers(generated) == [120]
    source.engine.let_go(late)
    assert source.finish(source.submit(request(steps=3)))
    source.check()


@pytest.mark.parametrize("images_at_once", [1, 4])
def test_an_engine_is_empty_within_three_steps_time(images_at_once: int) -> None:
    """Of the steps that it takes: those in flight, and one that had just been chosen."""
    driver = Driver(wide(flat), images_at_once=images_at_once)
    futures = [driver.submit(request(steps=50, seed=10 * i, size=SMALL)) for i in range(6)]
    driver.until(driver.clock() + 0.2)
    began = driver.clock()
    handed_over(driver, *futures)
    assert driver.clock() - began <= 3 * flat(SMALL, 8)


def test_images_that_are_finished_running_and_waiting_leave_together() -> None:
    fake, target = FakePipeline(num_slots=2), Driver()
    source = Driver(fake, images_at_once=1)
    future = source.submit(request(steps=6, seed=10, n=4, size=LARGE))
    for _ in range(50):
        if len(source.fake.of("decode")) < 2:
            source.tick()
    ticks(source, 2)
    (resumed,) = handed_over(source, future)
    assert resumed
    states = [(image.number, image.steps_left, bool(image.slot)) for image in resumed.images]
    assert [number for number, _ in resumed.pixels] == [0, 1]
    assert states[0][0] == 2 and 0 < states[0][1] < 6 and states[0][2]
    assert states[1] == (3, 6, False)
    (generated,) = target.finish(target.submit(request(steps=6, seed=10, n=4, size=LARGE), resumed=resumed))
    assert numbers(generated) == [16, 17, 18, 19]
    assert steps(source) + steps(target) == 24 and len(target.fake.of("insert")) == 1


def test_a_denoised_image_leaves_as_pixels() -> None:
    """Also one whose decode was put off, to share it with the next image."""
    first = Driver(images_at_once=1)
    future = first.submit(request(steps=9, seed=10, n=2))
    ticks(first, 4)
    (resumed,) = handed_over(first, future)
    source = Driver(wide(flat, decode_time=lambda size, images: 0.5), images_at_once=2)
    future = source.submit(request(steps=9, seed=10, n=2), resumed=resumed)
    for _ in range(9 - steps(first)):
        source.tick()
    assert not source.fake.of("decode")
    (resumed,) = handed_over(source, future)
    assert resumed and [number for number, _ in resumed.pixels] == [0]
    assert [image.number for image in resumed.images] == [1] and 0 < resumed.images[0].steps_left <= steps(first)


def test_a_request_whose_images_are_all_denoised_completes() -> None:
    source = Driver(wide(decode_time=lambda size, images: 0.5))
    future = source.submit(request(steps=4, seed=10))
    for _ in range(20):
        if not source.fake.of("decode"):
            source.tick()
    source.engine.hand_over()
    source.idle()
    assert numbers(future.result(0)) == [14]


def test_previews_go_on_where_they_were() -> None:
    seen: list[int] = []
    source, target = Driver(), Driver()
    options: dict[str, Any] = {"previews": 4, "on_preview": lambda number, pixels: seen.append(number)}
    future = source.submit(request(steps=50), **options)
    for _ in range(100):
        if len(source.fake.of("preview")) < 2:
            source.tick()
    (resumed,) = handed_over(source, future)
    target.finish(target.submit(request(steps=50), resumed=resumed, **options))
    assert seen == [0, 1, 2, 3]
    assert (len(source.fake.of("preview")), len(target.fake.of("preview"))) == (2, 2)


def test_a_request_that_moves_again_before_it_has_a_slot_keeps_its_state() -> None:
    source, between, target = Driver(), Driver(), Driver()
    future = source.submit(request(steps=9))
    ticks(source, 4)
    (resumed,) = handed_over(source, future)
    (again,) = handed_over(between, between.submit(request(steps=9), resumed=resumed))
    assert again == resumed and not between.fake.of("import")
    (generated,) = target.finish(target.submit(request(steps=9), resumed=again))
    assert numbers(generated) == [19]


def test_times_cover_both_engines() -> None:
    source, target = Driver(images_at_once=1), Driver()
    before, future = source.submit(request(steps=2, seed=0)), source.submit(request(steps=20, seed=10))
    for _ in range(50):
        if steps(source) < 12:
            source.tick()
    began = 1000.0
    (resumed,) = handed_over(source, future)
    age_s = source.clock() - began
    (generated,) = target.finish(target.submit(request(steps=20), resumed=resumed, age_s=age_s))
    assert before.done() and generated.queue_s == pytest.approx(2 * 0.02), "the two steps of the request before it"
    assert generated.device_s == pytest.approx(20 * 0.02)
    assert generated.denoise_s == pytest.approx(20 * 0.02)


def test_a_moved_request_has_a_place_beyond_the_limits() -> None:
    source, target = Driver(), Driver(max_waiting=1, images_at_once=1)
    future = source.submit(request(steps=50, seed=10))
    ticks(source, 20)
    (resumed,) = handed_over(source, future)
    for seed in (100, 200):
        target.submit(request(steps=50, seed=seed))
        ticks(target, 2)
    with pytest.raises(QueueFull):
        target.submit(request(steps=50, seed=300))
    with pytest.raises(DeadlineUnmeetable):
        target.submit(request(steps=50, seed=300), beyond_limits=True, timeout_s=0.1)
    moved = target.submit(request(steps=50, seed=10), resumed=resumed, beyond_limits=True, timeout_s=0.1)
    assert numbers(target.finish(moved)[0]) == [60]


def test_the_work_of_another_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = Driver(), Driver()
    future = source.submit(request(steps=9))
    ticks(source, 4)
    (resumed,) = handed_over(source, future)
    assert resumed
    with pytest.raises(NotResumable, match="steps_left must be 1 to 3, got"):
        target.submit(request(steps=3), resumed=replace(resumed, images=(replace(resumed.images[0], steps_left=7),)))

    def refuse(size: Any, packed: bytes) -> Any:
        raise ValueError("An image that moves must have the model a, got b.")

    monkeypatch.setattr(target.fake, "unpacked", refuse)
    with pytest.raises(NotResumable, match="must have the model a, got b"):
        target.submit(request(steps=9), resumed=resumed)


@pytest.mark.parametrize("later", [False, True])
def test_an_image_that_cannot_be_exported_fails_and_the_others_leave(later: bool) -> None:
    driver = Driver(wide(), images_at_once=4)
    futures = [driver.submit(request(steps=50, seed=seed)) for seed in (10, 20)]
    ticks(driver, 5)
    driver.fake.fail("export", later=later)
    driver.engine.hand_over()
    driver.idle()
    assert isinstance(futures[0].exception(0), Fault)
    assert isinstance(futures[1].exception(0), HandedOver)
    driver.check()


def test_a_request_that_is_cancelled_as_it_leaves_is_gone() -> None:
    driver = Driver()
    future = driver.submit(request(steps=50))
    ticks(driver, 3)
    driver.engine.hand_over()
    future.cancel()
    driver.idle()
    assert driver.engine.stats()["active_slots"] == 0 and not driver.fake.of("export")


def test_an_engine_that_fails_hands_back_what_had_not_begun() -> None:
    source, target = Driver(images_at_once=1), Driver()
    moving = source.submit(request(steps=9))
    ticks(source, 4)
    (resumed,) = handed_over(source, moving)
    lost = target.submit(request(steps=50, seed=100))
    ticks(target, 3)
    waiting, arrived = target.submit(request(seed=200)), target.submit(request(steps=9), resumed=resumed)
    target.engine.close()
    assert isinstance(lost.exception(0), EngineStopped)
    errors = [future.exception(0) for future in (waiting, arrived)]
    assert [error.resumed for error in errors if isinstance(error, HandedOver)] == [None, resumed]


@pytest.mark.parametrize("seed", range(6))
def test_whatever_moves_when_every_image_is_the_one_that_it_would_have_been(seed: int) -> None:
    """Requests of all kinds pass through five engines, each of which is drained at some moment."""
    draw = random.Random(seed)
    drivers = [Driver(wide(draw.choice([flat, serial]), launch_s=0.001)) for _ in range(5)]
    generations = [
        request(
            f"{i}", steps=draw.randint(1, 30), seed=1000 * i, n=draw.randint(1, 4), size=draw.choice([SMALL, LARGE]),
            guidance_scale=draw.choice([1.0, 5.0]),
        )
        for i in range(12)
    ]  # fmt: skip
    states: dict[int, Resumed | None] = dict.fromkeys(range(12))
    results: dict[int, list[int]] = {}
    for driver in drivers:
        futures = {
            i: driver.submit(generations[i], resumed=resumed, beyond_limits=True) for i, resumed in states.items()
        }
        ticks(driver, draw.randint(0, 25))
        if driver is not drivers[-1]:
            driver.engine.hand_over()
        driver.idle()
        driver.check()
        states = {}
        for i, future in futures.items():
            error = future.exception(0)
            if isinstance(error, HandedOver):
                states[i] = error.resumed
            else:
                results[i] = numbers(future.result(0))
    assert results == {
        i: [generation.seed + k + generation.num_inference_steps for k in range(generation.n)]
        for i, generation in enumerate(generations)
    }
    assert sum(map(steps, drivers)) > 0
    taken = sum(call.count * len(call.seeds) for driver in drivers for call in driver.fake.of("step"))
    assert taken == sum(generation.n * generation.num_inference_steps for generation in generations), "none is repeated"
