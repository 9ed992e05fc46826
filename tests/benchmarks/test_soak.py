"""The soak test's load, records and verdict, on made-up records. Durations are not tested."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.api.errors import ApiError, api_error
from app.api.protocol import parse_body, parse_query
from app.api.settings import Limits, Service
from app.types import InvalidField
from benchmarks.soak.clients import code_of, refusal_of
from benchmarks.soak.load import (
    BAD_REQUESTS,
    BURST_REQUESTS,
    EQUAL_REQUESTS,
    GENERATIONS,
    KILLING,
    WEIGHTS,
    equal_requests,
    plan,
)
from benchmarks.soak.records import Kill, Process, Result, Run, Sample, read
from benchmarks.soak.verdict import LEAST_LIFE_S, WARMUP_S, Verdict, judge, slope_of
from benchmarks.soak.watch import kind_of
from cluster.cli import UsageError
from loadtest.checks import identity
from loadtest.records import Journal

SAMPLERS = ("ddim", "euler", "pndm")
SERVICE = Service("demo-model", ("128x128",), Limits())
HOUR = 3600.0
MB = 1 << 20


# The load


def test_the_seed_determines_the_load() -> None:
    first = plan(1, HOUR, 1.2, SAMPLERS)
    assert plan(1, HOUR, 1.2, SAMPLERS) == first
    assert plan(2, HOUR, 1.2, SAMPLERS) != first
    assert [planned.at for planned in first.requests] == sorted(planned.at for planned in first.requests)
    assert [planned.id for planned in first.requests] == [*range(len(first.requests))]


def test_an_hour_has_every_kind_in_its_share_and_bursts_and_kills() -> None:
    load = plan(1, HOUR, 1.2, SAMPLERS)
    counts = Counter(planned.kind for planned in load.requests)
    assert counts.pop("burst") == 8 * BURST_REQUESTS
    assert set(counts) == {*WEIGHTS} and 3900 < counts.total() < 4700
    for kind, weight in WEIGHTS.items():
        assert counts[kind] / counts.total() == pytest.approx(weight / sum(WEIGHTS.values()), rel=0.3)
    assert {planned.request["bad"] for planned in load.requests if planned.kind == "bad request"} == {*BAD_REQUESTS}
    gaps = np.diff([0.0, *load.kills])
    assert len(load.kills) >= 8 and gaps.min() > 60 and gaps.max() <= 300 and load.kills[-1] < KILLING * HOUR


def test_five_minutes_have_a_kill_too() -> None:
    load = plan(1, 300.0, 1.2, SAMPLERS)
    assert len(load.kills) == 1 and {planned.kind for planned in load.requests} == {*WEIGHTS}


def test_the_api_takes_every_request_for_a_picture_and_equal_requests_are_few() -> None:
    load, alone = plan(3, 1200.0, 1.2, SAMPLERS), {identity(request) for request in equal_requests(SAMPLERS)}
    assert len(alone) == EQUAL_REQUESTS
    for planned in load.requests:
        if planned.kind == "bad request":
            continue
        if planned.endpoint == "imagine":
            parse_query("&".join(f"{name}={value}" for name, value in planned.request.items()).encode(), SERVICE)
        else:
            parse_body(json.dumps(planned.request).encode(), SERVICE)
        if planned.kind in ("equal", "burst"):
            assert identity(planned.request) in alone


@pytest.mark.parametrize("name", [name for name, bad in BAD_REQUESTS.items() if bad.path == GENERATIONS])
def test_this_api_refuses_each_bad_request_with_its_status(name: str) -> None:
    bad = BAD_REQUESTS[name]
    if bad.status in (413, 415):  # refused by the ingress before it is read
        assert len(bad.body or b"") > SERVICE.limits.body_bytes or bad.headers != {"Content-Type": "application/json"}
        return
    with pytest.raises((ApiError, InvalidField)) as caught:
        parse_body(bad.body or b"", SERVICE)
    assert isinstance(caught.value, ApiError | InvalidField)
    assert api_error(caught.value).status == bad.status


# Clients and processes


def test_the_code_of_an_error_is_read_from_an_answer_and_from_a_stream() -> None:
    assert code_of("503 queue_full: Every replica's queue is full; try again later.") == "queue_full"
    assert code_of('an error in the stream: {"type": "error", "error": {"code": "replica_lost"}}') == "replica_lost"
    assert code_of("ServerDisconnectedError: Server disconnected") is None and code_of(None) is None


def test_a_refusal_has_openais_shape_and_no_traceback() -> None:
    error = {"message": "a", "type": "b", "param": None, "code": "c"}
    assert refusal_of(json.dumps({"error": error}))
    for other in (
        "",
        "Internal Server Error",
        "[]",
        '{"error": "x"}',
        json.dumps({"error": error | {"message": "Traceback"}}),
    ):
        assert not refusal_of(other)


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        (["ray::ServeReplica:text-to-image:StableDiffusion"], "replica"),
        (["ray::ServeReplica:text-to-image:APIIngress.handle_request_with_rejection"], "ingress"),
        (["ray::ProxyActor.receive_asgi_messages"], "proxy"),
        (["ray::ServeController"], "controller"),
        (["ray::IDLE"], "other workers"),
        (["ray::DashboardAgent"], "dashboard agent"),
        (["ray-dashboard-ServeHead-0 (python -c ...)"], "dashboard modules"),
        (["/x/ray/core/src/ray/raylet/raylet", "--log_dir=/tmp/gcs_server"], "raylet"),
        (["/x/ray/core/src/ray/gcs/gcs_server", "--log_dir=/tmp/raylet"], "gcs_server"),
        (["/x/bin/python", "-u", "/x/ray/autoscaler/v2/monitor.py", "--logs-dir=/tmp"], "autoscaler"),
        (["/x/bin/python", "-u", "/x/ray/_private/log_monitor.py"], "log monitor"),
        (["/x/bin/python", "/x/ray/dashboard/dashboard.py", "--host=127.0.0.1"], "dashboard"),
        (["/x/bin/python", "-m", "ray.util.client.server", "--mode=proxy"], "client server"),
        (["/x/bin/python", "-m", "cluster.node_watcher", "--raylet", "1"], "node watcher"),
        (["/x/bin/python", "-c", "from multiprocessing.forkserver import main"], "others"),
        ([], "others"),
    ],
)
def test_a_process_is_named_by_its_role_in_the_cluster(command: list[str], kind: str) -> None:
    assert kind_of(command) == kind


# The verdict


def process(kind: str, megabytes: float, **changes: Any) -> Process:
    pid = changes.pop("pid", sum(kind.encode()))
    return replace(Process(pid, 7.0, kind, round((50 + megabytes) * MB), 50 * MB, 30, 20), **changes)


def hour_of_samples(grow: dict[str, float], **changes: Any) -> list[Sample]:
    """An hour of samples of three processes with noise and jumps. `grow` is MB an hour by kind."""
    rng = np.random.default_rng(0)
    result = []
    for t in np.arange(0.0, HOUR, 5.0):
        phase = "before" if t == 0 else "load"
        noise = rng.normal(0, 3, 3) + 40 * (rng.random(3) < 0.02) + 30 * (t < 120)
        each = [
            process(kind, 200 + noise[i] + grow.get(kind, 0.0) * t / HOUR)
            for i, kind in enumerate(("proxy", "ingress", "gcs_server"))
        ]
        result.append(Sample(float(t), phase, tuple(each), float(t), 0, 1))
    after = [replace(each, **changes) for each in result[-1].processes]
    return [*result, Sample(HOUR, "after", tuple(after), HOUR, 0, 1)]


def ok(count: int = 100, **changes: Any) -> list[Result]:
    results = [Result(i, "equal", 30.0 * i, 30.0 * i + 2, "ok", 200, compared=True) for i in range(count)]
    return [*results, replace(results[0], id=count, **changes)] if changes else results


END = {"t": HOUR, "unfinished": 0, "active_slots": 0, "replicas": 1, "compiles_after_ready": 0}


def verdict(
    results: Sequence[Result] = (), kills: Sequence[Kill] = (), samples: Sequence[Sample] | None = None, **end: Any
) -> Verdict:
    run = Run({}, 1, results or ok(), hour_of_samples({}) if samples is None else samples, kills, END | end)
    return judge(run)


def test_a_good_run_passes_with_its_figures() -> None:
    good = verdict()
    assert good.passed and not good.notes
    assert good.figures["requests"] == good.figures["compared"] == 100
    assert set(good.figures["trends"]) == {"proxy", "ingress", "gcs_server"}
    assert all(abs(trend["mb_per_hour"]) < 5 for trend in good.figures["trends"].values())


@pytest.mark.parametrize(("kind", "mb_per_hour"), [("proxy", 60.0), ("ingress", 60.0), ("gcs_server", 90.0)])
def test_a_leak_is_found_and_names_the_process(kind: str, mb_per_hour: float) -> None:
    (reason,) = verdict(samples=hour_of_samples({kind: mb_per_hour})).reasons
    assert reason.startswith(f"the memory of {kind} grows by ") and "are allowed" in reason


def test_growth_within_the_bound_and_growth_of_shared_memory_are_no_leak() -> None:
    assert verdict(samples=hour_of_samples({"proxy": 25.0, "gcs_server": 40.0})).passed
    samples = [
        replace(
            sample,
            processes=tuple(
                replace(each, rss=each.rss + grown, shared=each.shared + grown) for each in sample.processes
            ),
        )
        for sample in hour_of_samples({})
        for grown in [round(sample.t) * MB]
    ]
    assert verdict(samples=samples).passed


def test_a_peak_or_a_jump_at_the_start_is_no_trend() -> None:
    times = np.arange(0.0, 100.0)
    values = 3.0 * times
    values[40:50] += 1e6
    assert slope_of(times, values) == pytest.approx(3.0, rel=0.05)
    assert slope_of(np.arange(5000.0), 2.0 * np.arange(5000.0)) == pytest.approx(2.0)


def test_a_leak_shows_in_the_last_replica_although_earlier_ones_are_killed() -> None:
    def sample(t: float) -> Sample:
        pid = int(min(t, 2000) // 250)  # eight processes with short lives, then one until the end
        born = 250.0 * pid
        return Sample(t, "load", (process("replica", 900 + 600 * (t - born) / HOUR, pid=pid),), t, 0, 1)

    reasons = verdict(samples=[sample(t) for t in np.arange(0.0, HOUR, 5.0)]).reasons
    assert [reason for reason in reasons if reason.startswith("the memory of replica grows by 600 MB")]
    short = verdict(samples=[sample(t) for t in np.arange(0.0, 1990.0, 5.0)])
    assert not short.reasons and short.notes == ["memory of replica is not judged: no process lived long enough"]


def test_five_minutes_are_too_short_to_judge_memory() -> None:
    samples = [sample for sample in hour_of_samples({"proxy": 5000.0}) if sample.t < min(WARMUP_S + LEAST_LIFE_S, 400)]
    short = verdict(samples=samples)
    assert short.passed
    assert short.notes == ["memory of gcs_server, ingress, proxy is not judged: no process lived long enough"]


def test_a_wrong_picture_fails_even_while_a_replica_is_dead() -> None:
    wrong = ok(outcome="bad_image", error="up to 90 grey levels apart")
    (reason,) = verdict(wrong, [Kill(0.0, 7, 20.0)]).reasons
    assert reason.startswith("1 wrong pictures, such as equal at 0 s: bad_image, up to 90 grey levels apart")


def test_a_hang_fails_even_while_a_replica_is_dead() -> None:
    (reason,) = verdict(ok(outcome="timeout", error="no answer within 150 s"), [Kill(0.0, 7, 20.0)]).reasons
    assert reason.startswith("1 requests without any answer")


LOSS: dict[str, Any] = {"outcome": "shed", "status": 503, "code": "replica_lost", "error": "503 replica_lost: ..."}


@pytest.mark.parametrize(
    ("result", "kills", "explained"),
    [
        (LOSS, [Kill(999.0, 7, 1020.0)], True),
        (LOSS | {"outcome": "server_error", "status": 200}, [Kill(999.0, 7, 1020.0)], True),  # in a stream
        (LOSS | {"code": "model_not_ready"}, [Kill(980.0, 7, 990.0)], True),
        (LOSS | {"at": 1030.0, "done": 1031.0}, [Kill(999.0, 7, 1020.0)], True),
        (LOSS | {"at": 1040.0, "done": 1041.0}, [Kill(999.0, 7, 1020.0)], False),  # long after it
        (LOSS, [Kill(1003.0, 7, 1020.0)], False),  # before it
        (LOSS, [], False),
        (LOSS | {"code": "queue_full"}, [], True),
        (LOSS | {"code": "deadline_unmeetable"}, [], True),
        (LOSS | {"code": None}, [Kill(999.0, 7, 1020.0)], False),
        (LOSS | {"outcome": "server_error", "status": 500, "code": "internal_error"}, [Kill(999.0, 7, 1020.0)], False),
        ({"outcome": "reset", "error": "ServerDisconnectedError"}, [Kill(999.0, 7, 1020.0)], False),
        ({"outcome": "wrong_answer", "status": 200, "error": "must get 400"}, [], False),
        ({"outcome": "left"}, [], True),
        ({"outcome": "unread"}, [], True),
    ],
)
def test_an_error_needs_a_kill_that_explains_it(result: dict[str, Any], kills: list[Kill], explained: bool) -> None:
    reasons = verdict(ok(**{"at": 1000.0, "done": 1002.0} | result), kills).reasons
    assert [reason.partition(",")[0] for reason in reasons] == ([] if explained else ["1 unexplained errors"])


def test_unfinished_requests_and_late_compiles_fail() -> None:
    assert "3 requests were still unfinished" in verdict(unfinished=3).reasons[0]
    assert "None requests were still unfinished" in verdict(unfinished=None).reasons[0]
    assert "2 programs were compiled" in verdict(compiles_after_ready=2).reasons[0]


def test_a_server_that_sheds_most_requests_fails() -> None:
    busy = [replace(result, outcome="shed", code="queue_full") for result in ok(60)]
    assert verdict(ok(40) + busy).reasons == ["only 40 of 100 requests for pictures were answered"]


def test_a_kill_without_recovery_fails() -> None:
    assert "after the kill at 500 s no other replica answered" in verdict(kills=[Kill(500.0, 7, None)]).reasons[0]


def test_more_open_files_or_threads_than_before_fail() -> None:
    (first, *_) = reasons = verdict(samples=hour_of_samples({}, fds=500)).reasons
    assert len(reasons) == 3 and "has 470 open files more than before the load" in first
    assert "has 80 threads more" in verdict(samples=hour_of_samples({}, threads=100)).reasons[0]
    assert verdict(samples=hour_of_samples({}, fds=60, threads=40)).passed


# The records


def test_a_stopped_test_continues_from_its_records_and_fails_until_then(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not the folder of a soak test"):
        read(tmp_path)
    (tmp_path / "soak.json").write_text(json.dumps({"seed": 1, "duration_s": HOUR}))
    assert (read(tmp_path).reached_s, read(tmp_path).sessions) == (0.0, 0)
    results, samples = ok(3), hour_of_samples({})[:10]
    with Journal(tmp_path / "results.jsonl") as file:
        for result in results:
            file.write(asdict(result))
    with Journal(tmp_path / "events.jsonl") as file:
        file.write({"event": "session", "t": 0.0})
        for sample in samples:
            file.write(
                {"event": "sample", "t": sample.t, "phase": sample.phase, "position": sample.position}
                | {"processes": [[*vars(each).values()] for each in sample.processes], "unfinished": 0, "replicas": 1}
            )
        file.write({"event": "kill", "t": 20.0, "pid": 7})
        file.write({"event": "kill", "t": 30.0, "pid": 8})
        file.write({"event": "recovered", "t": 25.5, "kill": 20.0})
    with (tmp_path / "events.jsonl").open("a") as torn:
        torn.write('{"event": "sam')
    run = read(tmp_path)
    assert (run.results, run.samples, run.reached_s) == (results, samples, 45.0)
    assert run.kills == [Kill(20.0, 7, 25.5), Kill(30.0, 8, None)]
    assert judge(run).reasons == [
        "the test was stopped early; it can continue",
    ]
    with Journal(tmp_path / "events.jsonl") as file:
        file.write({"event": "session", "t": 45.0})
        file.write({"event": "end"} | END)
    run = read(tmp_path)
    assert run.sessions == 2 and run.ends == END
