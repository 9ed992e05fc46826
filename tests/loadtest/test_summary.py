"""The summary of a run's records."""

from pathlib import Path
from typing import Any

import pytest

from loadtest.records import Record, Run, Session
from loadtest.scenario import parse
from loadtest.summary import errors, in_flight, seconds, summarize
from tests.loadtest.test_display import record


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
