"""What is measured at warm-up, on a clock that stands still between the calls."""

import itertools
from collections.abc import Callable, Iterable

import pytest

from app.diffusion.timing import MOST_STEPS, Timed, several, timed
from app.engine.virtual import FREE_DISPATCH, VirtualClock
from app.types import DispatchCost

ROWS, IMAGES = (1, 2, 8), (1, 2)


def measured(
    step_s: Callable[[int], float],
    *,
    launch_s: float = 0.0,
    cost: DispatchCost = FREE_DISPATCH,
    pace: Iterable[float] = (),
    budget_s: float = 1.0,
) -> tuple[Timed, list[tuple[int, int]]]:
    """What is measured of a device, and the steps that it was asked for: rows and count."""
    clock, asked_for, paces = VirtualClock(), list[tuple[int, int]](), itertools.chain(pace, itertools.repeat(1.0))

    def dispatch(seconds: float) -> float:
        clock.now += cost.host_s
        done = clock.now + seconds * next(paces)
        if cost.blocks:
            clock.now = done
        return done

    def step(rows: int, count: int) -> float:
        asked_for.append((rows, count))
        return dispatch(launch_s + count * step_s(rows))

    times = timed(
        step, lambda images: dispatch(0.03 * images), clock.reach, ROWS, IMAGES, budget_s=budget_s, clock=clock
    )
    return times, asked_for


def test_a_dispatch_that_blocks_is_told_from_one_that_takes_the_host_long() -> None:
    blocking, _ = measured(lambda rows: 0.001, cost=DispatchCost(True, 0.01))
    assert blocking.dispatch_cost == (True, 0.0) and blocking.launch_s == pytest.approx(dict.fromkeys(ROWS, 0.01))
    slow_host, _ = measured(lambda rows: 0.001, cost=DispatchCost(False, 0.01))
    assert slow_host.dispatch_cost == pytest.approx((False, 0.01)) and slow_host.launch_s == pytest.approx(
        dict.fromkeys(ROWS, 0.0)
    )
    for times in (blocking, slow_host):
        assert times.step_s == pytest.approx(dict.fromkeys(ROWS, 0.001))


def test_launches_and_decodes_are_measured_apart_from_steps() -> None:
    times, _ = measured(lambda rows: 0.01 * rows, launch_s=0.004, cost=DispatchCost(False, 0.002))
    assert times.step_s == pytest.approx({rows: 0.01 * rows for rows in ROWS})
    assert times.launch_s == pytest.approx(dict.fromkeys(ROWS, 0.004))
    assert times.decode_s == pytest.approx({1: 0.032, 2: 0.062})


def test_measuring_ends_once_two_rounds_agree_and_clocks_that_ramp_up_have_settled() -> None:
    _, asked_for = measured(lambda rows: 0.01)
    assert asked_for.count((1, 1)) == 3  # the first does not count
    ramp = [2 * 0.99**i for i in range(70)]
    times, _ = measured(lambda rows: 0.01, pace=ramp, budget_s=60.0)
    assert times.step_s == pytest.approx(dict.fromkeys(ROWS, 0.01), rel=0.1)


def test_measuring_is_bounded_where_no_two_rounds_agree() -> None:
    times, asked_for = measured(lambda rows: 0.01, pace=itertools.cycle([1.0, 2.0, 1.5]), budget_s=2.0)
    assert 3 < asked_for.count((1, 1)) < 20 and min(times.step_s.values()) > 0


@pytest.mark.parametrize(("step_s", "budget_s"), [(0.6, 100.0), (0.3, 1.0)])
def test_slow_steps_are_timed_once_and_singly(step_s: float, budget_s: float) -> None:
    times, asked_for = measured(lambda rows: step_s, cost=DispatchCost(False, 0.1), budget_s=budget_s)
    assert all(count == 1 for rows, count in asked_for if rows > ROWS[0])
    assert times.step_s == pytest.approx(dict.fromkeys(ROWS, step_s)) and times.launch_s == pytest.approx(
        dict.fromkeys(ROWS, 0.0)
    )
    assert times.dispatch_cost == pytest.approx((False, 0.1))
    assert asked_for.count((1, 1)) <= 3


def test_more_short_steps_than_long_ones_make_a_dispatch_of_several() -> None:
    assert [several(seconds) for seconds in (0.0, 1e-6, 0.005, 0.01, 0.1)] == [MOST_STEPS, MOST_STEPS, 10, 5, 2]
