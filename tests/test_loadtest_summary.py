"""The numbers that are made of a run's records."""

from typing import Any

import numpy as np
import pytest

from loadtest.summary import between_95, errors, histogram, in_flight, merged, seconds, supported, told
from tests.test_loadtest_display import record


def test_percentiles_are_within_a_thousandth_of_their_rank_or_its_neighbours() -> None:
    values = np.sort(np.random.default_rng(0).lognormal(-1, 1, 20_000))
    found = told(histogram(values))
    assert found and found["count"] == 20_000
    for name, rank in (("p50", 10_000), ("p90", 18_000), ("p95", 19_000), ("p99", 19_800), ("p99.9", 19_980)):
        assert values[rank - 2] * 0.999 <= found[name] <= values[rank] * 1.001


def test_a_percentile_that_no_request_lies_beyond_is_left_out() -> None:
    found = told(histogram([1.0] * 50))
    assert (
        found and found["p95"] is not None and found["p99"] is None and set(found["between"]) == {"p50", "p90", "p95"}
    )
    assert supported(100, 99) and not supported(99, 99) and supported(1000, 99.9)
    assert told(histogram([])) is None


def test_the_interval_holds_the_true_percentile_in_19_of_20_samples() -> None:
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(300):
        low, high = between_95(histogram(rng.exponential(1, 400)), 90)
        held += low <= np.log(10) <= high
    assert 0.91 <= held / 300 <= 0.99


def test_histograms_of_several_runs_add_up() -> None:
    parts: list[dict[str, Any]] = [
        {"latency": told(histogram([0.1] * 90))},
        {"latency": told(histogram([1.0] * 10))},
        {"latency": None},
    ]
    whole = merged(parts)
    assert whole and whole["count"] == 100 and whole["p90"] == pytest.approx(0.1, rel=0.01)
    assert whole["p95"] == pytest.approx(1, rel=0.01)


def test_failures_whose_words_differ_only_in_numbers_are_one_kind() -> None:
    records = [record(i, "ok" if i < 2 else "shed") for i in range(6)]
    for i, one in enumerate(records):
        object.__setattr__(one, "error", f"in {i} s" if i < 5 else "never")
    assert [(one["count"], one["example"]) for one in errors(records)] == [(3, "in 2 s"), (1, "never")]


def test_requests_in_flight_are_those_sent_and_not_done() -> None:
    assert in_flight([record(i, "ok") for i in range(3)], [-1, 0.1, 0.3, 1.0, 9]) == [0, 1, 0, 1, 0]


def test_seconds_are_told_in_a_unit_that_suits() -> None:
    told = [seconds(one) for one in (None, 12e-6, 0.0123, 1.234, 123.4)]
    assert told == ["–", "12 µs", "12.3 ms", "1.23 s", "123 s"]
