"""The metrics, by Ray's own classes; what they record is caught before it would leave the process."""

import re
from typing import Any

import pytest
from ray.util.metrics import Metric

from app.api.messages import ImageRequest
from app.api.parts import parts_of
from app.api.settings import Encoding
from app.serving.metrics import SECONDS, Metrics
from app.types import Generation

Recorded = list[tuple[str, float, dict[str, str]]]

STATS = {
    "waiting": 3,
    "unfinished": 5,
    "active_slots": 2,
    "num_slots": 8,
    "backlog_s": 1.5,
    "bucket_fill": 0.75,
    "sizes": {"128x128": {"step_s": {"1": 0.01, "2": 0.02}, "images_at_once": 2}},
    "device_busy_s": 4.0,
    "compiles_after_ready": 0,
}
REQUEST = ImageRequest(Generation("a", "", 128, 128, 12, 3.5, 40, None, 2), Encoding(), 20.0)
TIMINGS = {"queue_s": 0.5, "denoise_s": 2.0, "decode_s": 0.25, "encode_s": 0.125, "device_s": 1.0}


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    seen: Recorded = []

    def record(metric: Any, value: float, tags: dict[str, str] | None = None) -> None:
        metric._validate_tags(metric._get_final_tags(tags))
        assert set(tags or {}) <= set(metric.info["tag_keys"]), f"{metric.info['name']} has no tags {tags}"
        seen.append((metric.info["name"], value, tags or {}))

    monkeypatch.setattr(Metric, "_record", record)
    return seen


def test_each_metric_has_a_name_of_its_own_with_its_unit_and_says_what_it_is() -> None:
    infos = [metric.info for metric in vars(Metrics()).values() if isinstance(metric, Metric)]
    names = [info["name"] for info in infos]
    assert len(names) > 12 and len(set(names)) == len(names)
    for info in infos:
        assert re.fullmatch(r"imagine(_[a-z]+)+", info["name"])
        assert not info["name"].endswith(("_total", "_count", "_sum", "_bucket")), "what Prometheus appends by itself"
        assert re.fullmatch(r"[A-Z].{10,}\.", info["description"])
        assert ("boundaries" not in info) or info["name"].endswith("_seconds")
    assert sorted(SECONDS) == SECONDS


def test_a_finished_request_is_counted_and_its_phases_are_observed(recorded: Recorded) -> None:
    Metrics().finished(REQUEST, 3.0, TIMINGS)
    assert sorted(recorded, key=str) == sorted(
        [
            ("imagine_images", 2, {}),
            ("imagine_time_to_first_image_seconds", 3.0, {}),
            ("imagine_request_device_seconds", 1.0, {}),
            ("imagine_phase_seconds", 0.5, {"phase": "queue"}),
            ("imagine_phase_seconds", 2.0, {"phase": "denoise"}),
            ("imagine_phase_seconds", 0.25, {"phase": "decode"}),
            ("imagine_phase_seconds", 0.125, {"phase": "encode"}),
        ],
        key=str,
    )


def test_a_request_in_parts_is_observed_once_with_what_all_its_images_cost(recorded: Recorded) -> None:
    metrics = Metrics()
    for part in parts_of(REQUEST, 1):
        metrics.ended(part, "completed")
        metrics.finished(part, 3.0, TIMINGS)
    values = [(name, value) for name, value, tags in recorded if "phase" not in tags]
    assert sorted(values) == [
        ("imagine_images", 1),
        ("imagine_images", 1),
        ("imagine_request_device_seconds", 2 * TIMINGS["device_s"]),
        ("imagine_requests", 1.0),
        ("imagine_time_to_first_image_seconds", 3.0),
    ]
    assert len(recorded) - len(values) == 4


def test_the_engines_state_becomes_gauges_by_size_and_bucket(recorded: Recorded) -> None:
    Metrics().report(STATS)
    values = {(name, *tags.values()): value for name, value, tags in recorded}
    assert values == {
        ("imagine_waiting_requests",): 3,
        ("imagine_unfinished_requests",): 5,
        ("imagine_active_slots",): 2,
        ("imagine_slots",): 8,
        ("imagine_backlog_device_seconds",): 1.5,
        ("imagine_bucket_fill_ratio",): 0.75,
        ("imagine_step_seconds", "128x128", "1"): 0.01,
        ("imagine_step_seconds", "128x128", "2"): 0.02,
        ("imagine_images_at_once", "128x128"): 2,
        ("imagine_compiles_after_ready",): 0,
        ("imagine_device_busy_seconds",): 4.0,
    }


def test_a_total_is_counted_by_what_it_has_grown(recorded: Recorded) -> None:
    metrics = Metrics()
    for busy in (4.0, 4.0, 6.5):
        metrics.report(STATS | {"device_busy_s": busy})
    assert [value for name, value, _ in recorded if name == "imagine_device_busy_seconds"] == [4.0, 2.5]
