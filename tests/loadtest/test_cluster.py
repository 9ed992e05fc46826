"""The timeline: samples of Serve, Ray and our statistics, and the phases of a scale-up."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cluster.dashboard import Dashboard
from loadtest.client import session
from loadtest.cluster import Sample, Watcher, queues, replicas
from loadtest.records import Journal, entries
from loadtest.scaling import backdated, chip_seconds, scale_ups

NODES = """Node status
----
Active:
 1 head
 2 ray_tpu
Idle:
 (no idle nodes)
Pending:
 ray_tpu, 1 launching

Resources
"""


def replica(name: str, state: str, node: str | None = "n1") -> dict[str, Any]:
    return {"replica_id": name, "state": state, "node_id": node, "start_time_s": 100.0}


DETAILS: dict[str, Any] = {
    "applications": {
        "app": {
            "deployments": {
                "Ingress": {"deployment_config": {}, "target_num_replicas": 1, "replicas": [replica("d", "RUNNING")]},
                "Model": {
                    "deployment_config": {
                        "autoscaling_config": {"target_ongoing_requests": 8},
                        "ray_actor_options": {"resources": {"TPU": 4}},
                    },
                    "target_num_replicas": 3,
                    "replicas": [
                        *(replica("a", "RUNNING"), replica("b", "STARTING", "n2"), replica("c", "STOPPING")),
                        replica("e", "UPDATING"),
                    ],
                },
            }
        }
    }
}
STATISTICS = {
    "replicas": {
        "a": {
            **{"waiting": 3, "unfinished": 5, "active_slots": 2, "num_slots": 8, "bucket_fill": 0.5},
            **{"device": "TPU v5 lite x4", "milestones": {"warm": 9.0}},
        },
        "b": {"error": "It does not answer."},
    }
}
RAYLETS = [
    {"nodeId": "h", "nodeTypeName": "head", "isHeadNode": True, "startTimeMs": "1000", "state": "ALIVE"},
    {"nodeId": "n2", "nodeTypeName": "ray_tpu", "isHeadNode": False, "startTimeMs": "90000", "state": "ALIVE"},
    {"nodeId": "gone", "nodeTypeName": "ray_tpu", "isHeadNode": False, "startTimeMs": "2000", "state": "DEAD"},
]
ANSWERS: dict[str, Any] = {
    "/v1/stats": STATISTICS,
    "/api/serve/applications/": DETAILS,
    "/api/cluster_status": {"data": {"clusterStatus": NODES}},
    "/nodes": {"data": {"summary": [{"raylet": raylet} for raylet in RAYLETS]}},
}


@contextmanager
def cluster(answers: dict[str, Any]) -> Iterator[str]:
    """An API and a dashboard that answer from a table."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = answers.get(self.path.partition("?")[0])
            body = json.dumps(known).encode()
            self.send_response(200 if known is not None else 500)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def samples_of(url: str, folder: Path, dashboard: bool = True) -> list[Sample]:
    async def work() -> list[Sample]:
        with Journal(folder / "timeline.jsonl") as journal:
            async with session({}) as opened:
                watcher = Watcher(url, opened, Dashboard(url) if dashboard else None, journal)
                await watcher.sample_once()
                return watcher.samples

    return asyncio.run(work())


def test_a_sample_has_replicas_nodes_and_queues_and_is_written_down(tmp_path: Path) -> None:
    with cluster(ANSWERS) as url:
        samples = samples_of(url, tmp_path)
    assert [*entries(tmp_path / "timeline.jsonl")] == samples
    serve = next(sample for sample in samples if "target" in sample)
    assert {name: serve[name] for name in ("deployment", "target", "running", "starting", "stopping")} == {
        **{"deployment": "app/Model", "target": 3, "running": 1, "starting": 2, "stopping": 1}
    }
    assert (serve["chips"], serve["target_ongoing"]) == (4.0, 8)
    nodes = next(sample for sample in samples if "nodes" in sample)
    assert (nodes["nodes"], nodes["pending"]) == ({"ray_tpu": 2}, 1)
    assert nodes["node_starts"]["n2"] == {"type": "ray_tpu", "since": 90.0} and "gone" not in nodes["node_starts"]
    stats = next(sample for sample in samples if "waiting" in sample)
    assert (stats["waiting"], stats["unfinished"], stats["bucket_fill"]) == (3, 5, 0.5)
    assert stats["milestones"] == {"a": {"warm": 9.0}}


@pytest.mark.parametrize("broken", ["/v1/stats", "/api/serve/applications/", "/api/cluster_status", "/nodes"])
def test_what_cannot_be_read_is_noted_and_the_rest_is_sampled(tmp_path: Path, broken: str) -> None:
    with cluster(ANSWERS | {broken: None}) as url:
        samples = samples_of(url, tmp_path)
    assert len([sample for sample in samples if "errors" in sample]) == 1
    assert len([sample for sample in samples if {"target", "waiting", "nodes"} & set(sample)]) == 2


def test_a_server_without_an_answer_is_noted_in_the_samples(tmp_path: Path) -> None:
    samples = samples_of("http://127.0.0.1:9", tmp_path)
    assert len(samples) == 3 and all(sample["errors"] for sample in samples)


def test_without_a_dashboard_only_the_servers_statistics_are_read(tmp_path: Path) -> None:
    with cluster({"/v1/stats": STATISTICS}) as url:
        (sample,) = samples_of(url, tmp_path, dashboard=False)
    assert sample["waiting"] == 3


def test_without_autoscaling_the_deployment_with_the_chips_counts() -> None:
    details = json.loads(json.dumps(DETAILS))
    del details["applications"]["app"]["deployments"]["Model"]["deployment_config"]["autoscaling_config"]
    assert replicas(details)["deployment"] == "app/Model" and replicas(details)["target_ongoing"] is None
    assert replicas({"applications": {}}) == {"errors": ["Serve has no deployment"]}


def test_there_is_no_batch_fill_while_all_replicas_start() -> None:
    assert queues({"replicas": {"a": {"error": "x"}}})["bucket_fill"] is None


def watcher(tmp_path: Path, samples: list[Sample]) -> Any:
    watcher: Any = Watcher.__new__(Watcher)
    watcher.samples = samples
    return watcher


def state(unix: float, running: int, nodes: int, **more: int) -> Sample:
    quiet = {"starting": 0, "stopping": 0, "pending": 0}
    return {"unix": unix, "target": running, "running": running, "nodes": {"ray_tpu": nodes}, **quiet, **more}


def test_the_cluster_has_settled_when_it_has_been_as_before_for_a_moment(tmp_path: Path) -> None:
    before = state(0, 1, 1)
    assert not watcher(tmp_path, [before, state(50, 1, 2)]).settled(before)
    assert not watcher(tmp_path, [before, state(50, 1, 1, stopping=1)]).settled(before)
    assert not watcher(tmp_path, [before, state(49, 1, 2), state(50, 1, 1)]).settled(before), "only just"
    assert watcher(tmp_path, [before, state(40, 1, 2), state(45, 1, 1), state(50, 1, 1)]).settled(before)
    assert watcher(tmp_path, []).settled(None), "without samples there is nothing to wait for"


# Scale-ups


def seen(t: float, target: int, in_flight: int, states: dict[str, str], **more: Any) -> Sample:
    replicas = {
        name: {"state": state, "node": "n2" if name == "b" else "n1", "since": 1012.0} for name, state in states.items()
    }
    counts = {"running": [*states.values()].count("RUNNING"), "starting": [*states.values()].count("STARTING")}
    return {
        "t": t,
        "target": target,
        "target_ongoing": 8,
        "in_flight": in_flight,
        "replicas": replicas,
        **counts,
        **more,
    }


NODE = {"node_starts": {"n1": {"type": "ray_tpu", "since": 1000.0}, "n2": {"type": "ray_tpu", "since": 1018.0}}}
MILESTONES = {"process": 1019.0, "constructor": 1021.0, "weights": 1024.0, "warm": 1034.0, "first_image": 1036.5}
STORY = [
    seen(0, 1, 3, {"a": "RUNNING"}, stopping=0, chips=4),
    seen(5, 1, 20, {"a": "RUNNING"}, stopping=0, chips=4),
    seen(10, 1, 20, {"a": "RUNNING"}, stopping=0, chips=4),
    seen(15, 2, 20, {"a": "RUNNING", "b": "STARTING"}, stopping=0, chips=4, **NODE),
    {"t": 30.0, "milestones": {"b": {"constructor": 1021.0}}},
    seen(35, 2, 20, {"a": "RUNNING", "b": "RUNNING"}, stopping=0, chips=4, **NODE),
    {"t": 40.0, "milestones": {"b": MILESTONES}},
]


def test_a_scale_up_is_broken_down_from_overload_to_the_first_image() -> None:
    """The decision is at 12, when Serve started the replica, not at 15, when it was first seen."""
    (scale_up,) = scale_ups(STORY, lambda unix: unix - 1000)
    assert (scale_up.replica, scale_up.node_type, scale_up.new_node, scale_up.began) == ("b", "ray_tpu", True, 5)
    assert scale_up.phases == {
        **{"decision": 7, "node": 6, "process": 3, "weights": 3, "compile": 10, "ready": 1, "first image": 1.5}
    }
    assert scale_up.began + scale_up.total == 36.5


def test_a_replica_on_an_existing_node_has_no_wait_for_a_node() -> None:
    story = json.loads(json.dumps(STORY))
    for sample in story:
        if "node_starts" in sample:
            sample["node_starts"]["n2"]["since"] = 1001.0
    (scale_up,) = scale_ups(story, lambda unix: unix - 1000)
    assert not scale_up.new_node and scale_up.phases["node"] == 0 and scale_up.phases["process"] == 9


def test_a_replica_that_replaces_another_is_no_scale_up() -> None:
    story = [seen(0, 1, 3, {"a": "RUNNING"}), seen(5, 1, 3, {"b": "STARTING"}), seen(9, 1, 3, {"b": "RUNNING"})]
    assert scale_ups(story, lambda unix: unix - 1000) == []
    assert scale_ups([], lambda unix: unix) == []


def test_phases_that_were_not_seen_are_unknown() -> None:
    story = [sample for sample in STORY if "milestones" not in sample]
    (scale_up,) = scale_ups(story, lambda unix: unix - 1000)
    assert (
        scale_up.phases["weights"] is None
        and scale_up.phases["ready"] == 35 - 18
        and scale_up.phases["first image"] is None
    )


def test_chips_are_paid_for_while_a_replica_exists_in_any_state() -> None:
    assert chip_seconds(STORY, 4, 0, 35) == 4 * (15 * 1 + 20 * 2)
    assert chip_seconds(STORY, 4, 10, 50) == 4 * (5 * 1 + 35 * 2)


def test_a_replica_counts_from_its_start_according_to_serve() -> None:
    samples = backdated(STORY, lambda unix: unix - 1000)
    counts = [(sample["t"], sample["target"], sample["starting"]) for sample in samples if "target" in sample]
    assert counts == [(0, 1, 0), (5, 1, 0), (10, 1, 0), (12.0, 2, 1), (15, 2, 1), (35, 2, 0)]
    assert scale_ups(samples, lambda unix: unix - 1000) == scale_ups(STORY, lambda unix: unix - 1000)
