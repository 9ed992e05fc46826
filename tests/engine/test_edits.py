"""How the engine makes pictures that begin from others: one encode for a request, between two steps of its neighbours.

An image of the fake pipeline shows its seed plus one for each step, in its first pixels.
"""

from typing import Any

import numpy as np
import pytest

from app.engine.errors import DeadlineUnmeetable
from app.engine.virtual import number_of
from app.types import DispatchCost, Edit, Generation
from tests.engine.driver import Driver, wide
from tests.fake_pipeline import LARGE, SMALL, FakePipeline, flat, numbers, request, serial

PIXELS = np.full((8, 8, 3), 77, np.uint8)


def edit(strength: float | None = 0.5, *, mask: Any = None, **other: Any) -> Generation:
    return request(edit=Edit(PIXELS, mask, strength), **other)


def verbs(driver: Driver) -> list[str]:
    return [call.verb for call in driver.fake.of("encode", "encode_image", "insert", "step", "decode")]


def test_a_request_encodes_its_image_once_and_takes_its_share_of_the_steps() -> None:
    driver = Driver()
    (generated,) = driver.finish(driver.submit(edit(0.5, steps=6, seed=10, n=2)))
    assert numbers(generated) == [13, 14]
    assert verbs(driver)[:3] == ["encode", "encode_image", "insert"]
    assert len(driver.fake.of("encode_image")) == 1
    (generated,) = driver.finish(driver.submit(request(steps=6, seed=10)))
    assert numbers(generated) == [16]
    assert len(driver.fake.of("encode_image")) == 1


def test_edits_share_steps_with_other_requests() -> None:
    driver = Driver(images_at_once=2)
    futures = [driver.submit(edit(0.5, steps=8, seed=10)), driver.submit(request(steps=4, seed=20))]
    assert [numbers(generated) for generated in driver.finish(*futures)] == [[14], [24]]
    assert {call.seeds for call in driver.fake.of("step")} == {(10, 20)}


@pytest.mark.parametrize("blocks", [False, True])
def test_an_encode_is_device_time_of_its_request_alone(blocks: bool) -> None:
    cost = DispatchCost(blocks=True) if blocks else DispatchCost(host_s=1e-4)
    driver = Driver(FakePipeline(encode_image_s=0.5, dispatch_cost=cost))
    edited, plain = driver.finish(driver.submit(edit(1.0, steps=4)), driver.submit(request(steps=4, size=LARGE)))
    assert edited.device_s == pytest.approx(0.5 + 4 * 0.02, abs=0.02)
    assert plain.device_s == pytest.approx(4 * 0.04, abs=0.02)
    assert driver.engine.stats()["device_busy_s"] == pytest.approx(0.5 + 4 * 0.06, abs=0.02)


def test_an_image_that_cannot_be_encoded_fails_its_request_alone() -> None:
    driver = Driver()
    driver.fake.fail("encode_image")
    failed, plain = driver.submit(edit(steps=4)), driver.submit(request(steps=4, seed=20))
    assert numbers(driver.finish(plain)[0]) == [24]
    with pytest.raises(RuntimeError, match="encode_image failed"):
        failed.result()
    (generated,) = driver.finish(driver.submit(edit(0.5, steps=4, seed=30)))
    assert numbers(generated) == [32]


def test_an_encode_that_fails_on_the_device_fails_what_has_begun_with_it() -> None:
    driver = Driver()
    driver.fake.fail("encode_image", later=True)
    failed = driver.submit(edit(steps=4))
    while not failed.done():
        driver.tick()
    assert isinstance(failed.exception(), RuntimeError)
    (generated,) = driver.finish(driver.submit(edit(0.5, steps=4, seed=30)))
    assert numbers(generated) == [32]


def test_outside_the_mask_the_pixels_are_those_of_the_image() -> None:
    mask = np.zeros((8, 8), bool)
    mask[:4] = True
    shown: list[np.ndarray] = []
    driver = Driver()
    future = driver.submit(
        edit(1.0, mask=mask, steps=4, seed=10), previews=1, on_preview=lambda number, pixels: shown.append(pixels)
    )
    (generated,) = driver.finish(future)
    for pixels, number in ((generated.pixels[0], 14), (shown[0], 12)):
        assert number_of(pixels) == number
        assert (pixels[4:] == 77).all() and not (pixels[:4] == 77).any()


def test_a_cancelled_edit_leaves_nothing_behind() -> None:
    driver = Driver(FakePipeline(encode_image_s=0.5))
    future = driver.submit(edit(1.0, steps=4, size=SMALL))
    driver.tick()
    future.cancel()
    driver.idle()
    assert driver.engine.stats()["active_slots"] == 0


def test_under_mixed_load_steps_are_as_full_as_under_generations_alone() -> None:
    """Edits at half strength have half the rows, so twice as many are as much work. What they add is their encodes."""
    encode_s = 0.03

    def rows_per_second(*generations: Generation) -> float:
        driver = Driver(wide(encode_image_s=encode_s, dispatch_cost=DispatchCost(host_s=1e-4)))
        began = driver.clock()
        driver.finish(*[driver.submit(generation) for generation in generations])
        rows = sum(2 * call.count * len(call.seeds) for call in driver.fake.of("step"))
        encodes = len(driver.fake.of("encode_image"))
        assert encodes == sum(generation.edit is not None for generation in generations)
        return rows / (driver.clock() - began - encodes * encode_s)

    plain = [request(steps=20, seed=100 * i) for i in range(24)]
    edits = [edit(0.5, steps=20, seed=100 * i) for i in range(100, 124)]
    alone, mixed = rows_per_second(*plain), rows_per_second(*plain[:12], *edits)
    assert mixed == pytest.approx(alone, rel=0.03)


def test_steps_with_images_that_look_at_others_have_a_cost_of_their_own() -> None:
    """Three times as long as others, and no other step is predicted by them."""
    driver = Driver(FakePipeline(reference_time=lambda size, rows: 3 * serial(size, rows)))
    looks = request(steps=4, seed=10, edit=Edit(references=(PIXELS,)), references=1)
    looking, plain = driver.finish(driver.submit(looks), driver.submit(request(steps=4, size=LARGE, seed=20)))
    assert looking.device_s == pytest.approx(3 * 4 * serial(SMALL, 2))
    assert plain.device_s == pytest.approx(4 * serial(LARGE, 2))
    costs = driver.engine.stats()["sizes"]["8x8"]
    assert costs["step_s"]["2"] == pytest.approx(serial(SMALL, 2))
    assert costs["reference_step_s"]["2"] == pytest.approx(3 * serial(SMALL, 2))


def test_images_that_look_at_others_share_steps_among_themselves_alone() -> None:
    driver = Driver(wide(reference_time=lambda size, rows: 3 * flat(size, rows)), images_at_once=4)
    looks = [request(steps=4, seed=seed, edit=Edit(references=(PIXELS,)), references=1) for seed in (10, 20)]
    plain = [request(steps=6, seed=seed) for seed in (30, 40)]
    driver.finish(*map(driver.submit, [*looks, *plain]))
    assert {call.seeds for call in driver.fake.of("step")} == {(10, 20), (30, 40)}


@pytest.mark.parametrize("references", [0, 2])
def test_estimates_count_the_encodes_and_the_longer_steps_of_an_edit(references: int) -> None:
    driver = Driver(FakePipeline(encode_image_s=0.5, reference_time=lambda size, rows: 3 * serial(size, rows)))
    if references:
        generation = request(steps=4, edit=Edit(references=(PIXELS,) * references), references=references)
    else:
        generation = edit(1.0, steps=4)
    needed_s = 0.5 * max(references, 1) + 4 * serial(SMALL, 2) * (3 if references else 1)
    with pytest.raises(DeadlineUnmeetable) as refusal:
        driver.engine.submit(generation, timeout_s=0.99 * needed_s)
    assert refusal.value.estimate_s == pytest.approx(needed_s)
    future = driver.submit(generation, timeout_s=1.01 * needed_s)
    assert driver.engine.stats()["backlog_s"] == pytest.approx(needed_s)
    driver.finish(future)


def test_an_edit_that_has_been_encoded_needs_only_its_steps() -> None:
    driver = Driver(FakePipeline(encode_image_s=0.5))
    driver.submit(edit(1.0, steps=4))
    driver.tick()
    assert driver.engine.stats()["backlog_s"] < 4 * serial(SMALL, 2)
