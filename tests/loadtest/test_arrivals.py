"""The plan of a scenario: which requests are sent, and when."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import ROOT
from cluster.cli import UsageError
from loadtest.arrivals import Span, evenly, gamma, through, with_bursts
from loadtest.plan import Planned, plan
from loadtest.scenario import load, names, parse

QUICK = "configs/quick-scaling.yaml"


def planned(arrivals: dict[str, Any], **scenario: Any) -> list[Planned]:
    return plan(parse({"arrivals": arrivals, **scenario}, "test", {}))


def times(arrivals: dict[str, Any], **scenario: Any) -> list[float]:
    return [request.at for request in planned(arrivals, **scenario)]


def test_a_constant_rate_is_evenly_spaced() -> None:
    assert times({"process": "constant", "stages": [{"rate": 4, "duration_s": 2}]}) == [i / 4 for i in range(8)]


def test_stages_and_pauses_follow_one_another() -> None:
    stages = [{"rate": 2, "duration_s": 2}, {"rate": 0, "duration_s": 3}, {"rate": 1, "duration_s": 2}]
    assert times({"process": "constant", "stages": stages}) == [0, 0.5, 1, 1.5, 5, 6]


def test_a_ramp_has_the_count_of_its_mean_rate_and_shrinking_gaps() -> None:
    arrivals = np.array(times({"process": "constant", "stages": [{"rate": 0, "to": 10, "duration_s": 10}]}))
    assert len(arrivals) == 50
    assert np.allclose(arrivals**2 / 2, np.arange(50)), "the integral of a rate of t"


def test_a_burst_adds_simultaneous_requests_to_the_stages() -> None:
    stages = [{"rate": 1, "duration_s": 3}]
    arrivals = times({"process": "constant", "stages": stages, "bursts": [{"at_s": 1.5, "requests": 3}]})
    assert arrivals == [0, 1, 1.5, 1.5, 1.5, 2]


@pytest.mark.slow
@pytest.mark.parametrize(("process", "cv"), [("poisson", 1.0), ("gamma", 3.0), ("gamma", 0.3)])
def test_gaps_have_the_coefficient_of_variation_of_the_process(process: str, cv: float) -> None:
    shape = {} if process == "poisson" else {"cv": cv}
    arrivals = times({"process": process, "stages": [{"rate": 50, "duration_s": 400}], **shape}, max_requests=50_000)
    gaps = np.diff(arrivals)
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.1) and gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1)


spans = st.builds(Span, st.floats(0, 50), st.floats(0.5, 50), st.floats(0.1, 5))


@settings(deadline=None)
@given(st.lists(spans, min_size=1, max_size=5), st.floats(0.2, 4), st.integers(0, 2**32 - 1))
def test_arrivals_are_in_order_and_within_their_spans(spans: list[Span], cv: float, seed: int) -> None:
    count = sum(span.count for span in spans)
    for arrived in (evenly(count, 10_000), gamma(count, 10_000, cv, np.random.default_rng(seed))):
        arrivals = through(spans, arrived)
        assert len(arrivals) == len(arrived)
        assert np.all(np.diff(arrivals) >= -1e-9) and np.all(arrivals >= 0)
        assert np.all(arrivals <= sum(span.duration_s for span in spans) + 1e-6)


def test_bursts_alone_need_no_stage_with_a_rate() -> None:
    assert list(with_bursts(np.empty(0), [(2.0, 2), (1.0, 1)])) == [1.0, 2.0, 2.0]


def test_the_seed_determines_the_plan() -> None:
    arrivals = {"process": "poisson", "stages": [{"rate": 5, "duration_s": 10}]}
    assert planned(arrivals, seed=3) == planned(arrivals, seed=3) != planned(arrivals, seed=4)


def test_weights_are_the_shares_of_the_kinds() -> None:
    mix = [{"weight": 3, "size": "16x16"}, {"weight": 1, "kind": "big", "size": "32x32", "n": 2}]
    requests = planned({"process": "closed", "concurrency": 1, "requests": 4000}, mix=mix, checks={"repeat": 0})
    big = [request for request in requests if request.kind == "big"]
    assert len(big) / len(requests) == pytest.approx(0.25, abs=0.03)
    assert all(request.request["n"] == 2 for request in big)
    assert {request.kind for request in requests} == {"size=16x16", "big"}


def test_some_requests_repeat_an_earlier_request_with_its_seed() -> None:
    requests = planned({"process": "closed", "concurrency": 1, "requests": 2000}, checks={"repeat": 0.2})
    different = {json.dumps(request.request, sort_keys=True) for request in requests}
    assert 1 - len(different) / len(requests) == pytest.approx(0.2, abs=0.04)


def test_prompts_come_from_a_file_of_text_or_of_fields(tmp_path: Path) -> None:
    text, fields = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    text.write_text("a fox\n\n")
    fields.write_text('{"prompt": "a hen", "seed": 7, "num_inference_steps": 3}\n')
    closed = {"process": "closed", "concurrency": 1, "requests": 3}
    assert {request.request["prompt"] for request in planned(closed, prompts=str(text))} == {"a fox"}
    mix = [{"num_inference_steps": 9}]
    assert planned(closed, prompts=str(fields), mix=mix)[0].request == {
        **{"prompt": "a hen", "seed": 7, "num_inference_steps": 3}
    }


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.jsonl", '{"seed": 7}', 'p.jsonl:1 must have a "prompt" that is a string.'),
        ("p.jsonl", '{"prompt": "a"}\nno', "p.jsonl:2: it is not JSON"),
        ("p.jsonl", "[1]", "p.jsonl:1: it must be a JSON object."),
        ("p.txt", "\n", "holds no prompt."),
    ],
)
def test_a_mistake_in_a_prompt_file_is_reported_with_its_line(
    tmp_path: Path, name: str, content: str, words: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError) as caught:
        planned({"process": "closed", "concurrency": 1, "requests": 1}, prompts=str(tmp_path / name))
    assert words in str(caught.value)


def test_a_trace_is_replayed_from_its_first_time(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    later = {"timestamp": 12.0, "body": {"prompt": "b"}, "endpoint": "imagine"}
    trace.write_text("\n".join(map(json.dumps, [later, {"at": 10, "request": {"prompt": "a", "seed": 1}}])))
    requests = planned({"process": "replay", "trace": str(trace), "speed": 4})
    assert [(request.at, request.endpoint, request.request["prompt"]) for request in requests] == [
        (0.0, "generations", "a"),
        (0.5, "imagine", "b"),
    ]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"request": {"prompt": "a"}}', ':1 must have a time, "at", in seconds, got None.'),
        ('{"at": 1, "request": {}}', ':1 must have a "request", fields of the API with a prompt, got {}.'),
        (
            '{"at": 1, "request": {"prompt": "a"}, "endpoint": "x"}',
            "must be one of generations, edits, imagine, got 'x'.",
        ),
        ("", "holds no request."),
    ],
)
def test_a_mistake_in_a_trace_is_reported_with_its_line(tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "t.jsonl").write_text(line)
    with pytest.raises(UsageError) as caught:
        planned({"process": "replay", "trace": str(tmp_path / "t.jsonl")})
    assert words in str(caught.value)


def test_a_run_has_a_cap_on_its_requests(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="more than max_requests = 10 requests"):
        planned({"process": "constant", "stages": [{"rate": 1000, "duration_s": 80_000}]}, max_requests=10)
    assert len(planned({"process": "closed", "concurrency": 2, "duration_s": 60}, max_requests=50)) == 50
    (tmp_path / "t.jsonl").write_text('{"at": 1, "request": {"prompt": "a"}}\n' * 11)
    with pytest.raises(UsageError, match="holds 11 requests, more than max_requests = 10"):
        planned({"process": "replay", "trace": str(tmp_path / "t.jsonl")}, max_requests=10)


@pytest.mark.slow
def test_the_shipped_scenarios_can_be_planned_and_have_descriptions() -> None:
    assert names() == ["burst", "edits", "scale-up", "smoke", "soak", "steady"]
    for name in names():
        scenario = load(name, {})
        assert scenario.description and 0 < len(plan(scenario)) <= scenario.max_requests


def test_a_scenarios_burst_has_all_its_requests_at_the_same_time() -> None:
    at_once = [request for request in plan(load("burst", {})) if request.at == 30]
    assert len(at_once) == 40


def test_the_quick_config_is_the_shipped_one_with_shorter_delays() -> None:
    """A YAML file cannot include another, so this test compares the two."""
    shipped, quick = (yaml.safe_load((ROOT / name).read_text()) for name in ("serve_config.yaml", QUICK))
    different: dict[str, tuple[float, float]] = {}
    for ours, quicker in zip(*(config["applications"][0]["deployments"] for config in (shipped, quick)), strict=True):
        before, after = (scaled_by(deployment) for deployment in (ours, quicker))
        different |= {name: (before[name], after[name]) for name in before if before[name] != after[name]}
        quicker["autoscaling_config"] = ours.get("autoscaling_config")
        ours.setdefault("autoscaling_config", None)
    assert shipped == quick
    delays = {"metrics_interval_s", "look_back_period_s", "objective_s", "hold_s", "start_s"}
    assert set(different) == delays and all(after < before for before, after in different.values())


def scaled_by(deployment: dict[str, Any]) -> dict[str, Any]:
    """The autoscaling_config with the arguments of its policy beside the rest."""
    scaling = dict(deployment.get("autoscaling_config", {}))
    return {**scaling, **scaling.pop("policy", {}).get("policy_kwargs", {}), "policy": None}
