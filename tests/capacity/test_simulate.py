"""The simulated engine: latencies follow from the table of times alone."""

import time

import numpy as np
import pytest

from capacity.simulate import Load, Simulated, Timings, simulate
from loadtest.arrivals import poisson

# Sharing a step costs nothing (flat), or gains nothing (serial).
FLAT = Timings({1: 0.01, 2: 0.01, 4: 0.01, 8: 0.01}, {1: 0.1, 2: 0.1, 4: 0.1})
SERIAL = Timings({1: 0.01, 2: 0.02, 4: 0.04, 8: 0.08}, {1: 0.1, 2: 0.2, 4: 0.4})


def simulated(timings: Timings, arrivals: list[float], evaluations: int = 10, max_waiting: int = 100) -> Simulated:
    return simulate(timings, Load(np.array(arrivals), evaluations), gain=0.05, max_waiting=max_waiting)


def test_a_lone_image_takes_its_steps_and_its_decode() -> None:
    outcome = simulated(SERIAL, [5.0])
    assert outcome.latencies == pytest.approx([10 * 0.02 + 0.1])
    assert outcome.makespan_s == pytest.approx(5.3)


def test_texts_are_encoded_before_the_first_step() -> None:
    timings = Timings(FLAT.step_s, FLAT.decode_s, encode_s=0.05)
    assert simulated(timings, [0.0]).latencies == pytest.approx([2 * 0.05 + 10 * 0.01 + 0.1])
    # The negative prompt is in the cache after the first request.
    assert simulated(timings, [0.0, 9.0]).latencies[1] == pytest.approx(0.05 + 10 * 0.01 + 0.1)


def test_where_sharing_costs_nothing_requests_that_come_together_end_together() -> None:
    assert simulated(FLAT, [0.0, 0.0, 0.0, 0.0]).latencies == pytest.approx([0.2] * 4)


def test_where_sharing_gains_nothing_requests_end_one_after_the_other() -> None:
    first, second = simulated(SERIAL, [0.0, 0.0]).latencies
    assert first < second
    assert second == pytest.approx(2 * 10 * 0.02 + 2 * 0.1, abs=0.03)


def test_a_newcomer_joins_the_next_step_and_not_the_next_batch() -> None:
    alone, late = simulated(FLAT, [0.0, 0.035], evaluations=50).latencies
    assert alone == pytest.approx(50 * 0.01 + 0.1, abs=0.05)
    assert late == pytest.approx(50 * 0.01 + 0.1, abs=0.15)  # a decode may come between


def test_a_full_queue_refuses_and_accepted_requests_are_answered() -> None:
    outcome = simulated(SERIAL, [0.0] * 10, max_waiting=3)
    assert outcome.refused > 0
    assert len(outcome.latencies) + outcome.refused == 10


@pytest.mark.slow
def test_latency_rises_with_the_load_and_is_reproducible() -> None:
    def p95(rate: float) -> float:
        load = Load(poisson(round(200 * rate), np.random.default_rng(0)) / rate, 10)
        return simulate(SERIAL, load, gain=0.05, max_waiting=1000).percentile(95)

    assert p95(0.5) < p95(2.0) < p95(3.0)
    assert p95(2.0) == p95(2.0)


@pytest.mark.slow
def test_a_queue_of_one_server_is_what_theory_says() -> None:
    """M/D/1 at 60 %: the mean wait is 0.6 / (2 * 0.4) of a service time (Pollaczek and Khinchin)."""
    service_s = 10 * 0.02 + 0.1
    timings = Timings({1: 0.01, 2: 0.02}, {1: 0.1})
    load = Load(poisson(2000, np.random.default_rng(3)) * service_s / 0.6, 10)
    outcome = simulate(timings, load, gain=0.05, max_waiting=1000)
    assert outcome.latencies.mean() / service_s == pytest.approx(1.75, rel=0.1)


def test_simulated_time_does_not_pass_in_reality() -> None:
    began = time.monotonic()
    outcome = simulated(SERIAL, list(np.arange(100) * 36.0))
    assert outcome.makespan_s > 3500
    assert time.monotonic() - began < 30
