"""Percentiles and their confidence intervals."""

import numpy as np
import pytest

from loadtest.percentiles import between_95, distribution, histogram_of, merged, supported


def test_percentiles_are_within_a_thousandth_of_the_values_at_their_rank() -> None:
    values = np.sort(np.random.default_rng(0).lognormal(-1, 1, 20_000))
    latency = distribution(histogram_of(values))
    assert latency and latency["count"] == 20_000
    for name, rank in (("p50", 10_000), ("p90", 18_000), ("p95", 19_000), ("p99", 19_800), ("p99.9", 19_980)):
        assert values[rank - 2] * 0.999 <= latency[name] <= values[rank] * 1.001


def test_a_percentile_beyond_which_there_is_no_request_is_none() -> None:
    latency = distribution(histogram_of([1.0] * 50))
    assert latency and latency["p95"] is not None and latency["p99"] is None
    assert set(latency["between"]) == {"p50", "p90", "p95"}
    assert supported(100, 99) and not supported(99, 99) and supported(1000, 99.9)
    assert distribution(histogram_of([])) is None


@pytest.mark.slow
def test_the_interval_holds_the_true_percentile_in_19_of_20_samples() -> None:
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(300):
        low, high = between_95(histogram_of(rng.exponential(1, 400)), 90)
        held += low <= np.log(10) <= high
    assert 0.91 <= held / 300 <= 0.99


def test_histograms_of_several_runs_add_up() -> None:
    parts = [distribution(histogram_of(values)) for values in ([0.1] * 90, [1.0] * 10, [])]
    whole = merged(parts)
    assert whole and whole["count"] == 100 and whole["p90"] == pytest.approx(0.1, rel=0.01)
    assert whole["p95"] == pytest.approx(1, rel=0.01)
