"""The summary of a run's records."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadtest.records import Record, Run, Session
from loadtest.scenario import parse
from loadtest.summary import (
    between_95,
    distribution,
    errors,
    histogram_of,
    in_flight,
    merged,
    seconds,
    summarize,
    supported,
)
from tests.loadtest.test_display import record


def test_percentiles_are_within_a_thousandth_of_the_values_at_their_rank() -> None:
    values = np.sort(np.random.default_rng(0).lognormal(-1, 1, 20_000))
    latency = distribution(histogram_of(values))
    assert latency and latency["count"] == 20_000
    for name, rank in (("p50", 10_000), ("p90", 18_000), ("p95", 19_000), ("p99", 19_800), ("p99.9", 19_980)):
        assert values[rank - 2] * 0.999 <= latency[name] <= values[rank] * 1.001


def test_a_percentile_beyond_which_there_is_no_request_is_none() -> None:
    latency = distribution(histogram_of([1.0] * 50))
    assert (
        latency
        and latency["p95"] is not None
        and latency["p99"] is None
        and set(latency["between"]) == {"p50", "p90", "p95"}
    )
    assert supported(100, 99) and not supported(99, 99) and supported(1000, 99.9)
    assert distribution(histogram_of([])) is None


def test_the_interval_holds_the_true_percentile_in_19_of_20_samples() -> None:
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(300):
        low, high = between_95(histogram_of(rng.exponential(1, 400)), 90)
        held += low <= np.log(10) <= high
    assert 0.91 <= held / 300 <= 0.99


def test_histograms_of_several_runs_add_up() -> None:
    parts: list[dict[str, Any]] = [
        {"latency": distribution(histogram_of([0.1] * 90))},
        {"latency": distribution(histogram_of([1.0] * 10))},
        {"latency": None},
    ]
    whole = merged(parts)
    assert whole and whole["count"] == 100 and whole["p90"] == pytest.approx(0.1, rel=0.01)
    assert whole["p95"] == pytest.approx(1, rel=0.01)


def test_failures_whose_words_differ_only_in_numbers_are_one_kind() -> None:
    records = [record(i, "ok" if i < 2 else "shed") for i in range(6)]
    for i, each in enumerate(records):
        object.__setattr__(each, "error", f"in {i} s" if i < 5 else "never")
    assert [(error["count"], error["example"]) for error in errors(records)] == [(3, "in 2 s"), (1, "never")]


def test_requests_in_flight_are_those_sent_and_not_done() -> None:
    assert in_flight([record(i, "ok") for i in range(3)], [-1, 0.1, 0.3, 1.0, 9]) == [0, 1, 0, 1, 0]


def test_seconds_are_formatted_in_a_suitable_unit() -> None:
    texts = [seconds(value) for value in (None, 12e-6, 0.0123, 1.234, 123.4)]
    assert texts == ["–", "12 µs", "12.3 ms", "1.23 s", "123 s"]


def run_of(tmp_path: Path, scenario: dict[str, Any], timeline: list[dict[str, Any]]) -> Run:
    """A run of ten requests a second apart, answered after 0.1 to 1.0 s with two pictures each."""
    whole = parse({"arrivals": {"process": "constant", "stages": [{"rate": 1, "duration_s": 10}]}} | scenario, "t", {})
    head = {
        **{"name": "t", "url": "http://127.0.0.1:1", "started": "now", "planned": 10, "model": None},
        "scenario": whole.model_dump(mode="json", exclude_none=True),
    }
    request = {"prompt": "a"}
    records = [
        Record(i, "all", "generations", request, i, i, None, None, i + (i + 1) / 10, "ok", pictures=2)
        for i in range(10)
    ]
    samples = [sample | {"t": float(sample["unix"])} for sample in timeline]
    return Run(tmp_path, head, [Session(0.0, 0.0)], records, "complete", samples)


def test_goodput_counts_answers_within_the_objective(tmp_path: Path) -> None:
    summary = summarize(run_of(tmp_path, {"objective_s": 0.55}, []))
    assert summary["goodput_share"] == 0.5 and summary["goodput_per_s"] == pytest.approx(0.5)
    assert summary["images"] == 20 and summary["images_per_s"] == pytest.approx(2) and summary["failed"] == 0
    assert summary["images_per_chip_s"] is None and summary["most"] == {}


def test_chips_and_dollars_count_all_replicas_of_the_run(tmp_path: Path) -> None:
    replicas = {"a": {"state": "RUNNING", "node": "n", "since": -5.0}}
    sample = {"target": 1, "running": 1, "starting": 0, "stopping": 0, "chips": 4, "replicas": replicas}
    timeline: list[dict[str, Any]] = [sample | {"unix": unix} for unix in range(0, 11)] + [
        {"unix": 5, "nodes": {"ray_tpu": 1}}
    ]
    timeline.sort(key=lambda sample: sample["unix"])
    summary = summarize(run_of(tmp_path, {"price": {"chip_hour_usd": 9.0}}, timeline))
    chip_seconds = 4 * 10
    assert summary["images_per_chip_s"] == pytest.approx(20 / chip_seconds)
    assert summary["usd_per_1000_images"] == pytest.approx(chip_seconds / 3600 * 9.0 / 20 * 1000)
    assert summary["most"] == {"replicas": 1, "replicas_at_end": 1, "nodes": 1, "nodes_at_end": 1}
