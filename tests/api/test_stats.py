"""The statistics of all replicas, from a fake handle."""

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve.exceptions import DeploymentUnavailableError

from app.api.stats import SILENT, SUMMED, replica_ids, stats_of_all, total, with_queue

COUNTED = {"waiting": 1, "unfinished": 2, "active_slots": 1, "num_slots": 4, "backlog_s": 0.5, "device_busy_s": 9.0}
STATS: dict[str, Any] = COUNTED | {"compiles_after_ready": 0, "requests": {"completed": 3}}


class Handle:
    """A DeploymentHandle whose replicas answer, fail or are silent."""

    app_name, deployment_name = "text-to-image", "StableDiffusion"

    def __init__(self, *replies: Any) -> None:
        self.replies = replies

    def broadcast(self, method: str) -> "Handle":
        assert method == "stats"
        return self

    async def _fetch_replica_results_async(self) -> list[Any]:
        if not self.replies:
            raise DeploymentUnavailableError(DeploymentID("StableDiffusion"))
        return [SimpleNamespace(get_async=lambda reply=reply: answer(reply)) for reply in self.replies]


async def answer(reply: Any) -> Any:
    if reply is None:
        await asyncio.Event().wait()
    if isinstance(reply, Exception):
        raise reply
    return reply


def stats_of(replica: str) -> dict[str, Any]:
    """The statistics that a replica sends, with its id."""
    return STATS | {"replica": replica}


def named(monkeypatch: pytest.MonkeyPatch, *ids: str) -> None:
    actors = [ReplicaID(name, DeploymentID("StableDiffusion", "text-to-image")).to_full_id_str() for name in ids]
    actors += [ReplicaID("x", DeploymentID("APIIngress", "text-to-image")).to_full_id_str(), "SERVE_CONTROLLER_ACTOR"]
    listed = [{"name": name, "namespace": "serve"} for name in actors]
    monkeypatch.setattr("ray.util.list_named_actors", lambda all_namespaces: listed)


def test_replica_ids_come_from_the_names_of_serves_actors(monkeypatch: pytest.MonkeyPatch) -> None:
    named(monkeypatch, "a", "b")
    assert replica_ids("text-to-image", "StableDiffusion") == ["a", "b"]


def test_a_silent_replica_is_listed_and_delays_the_others_only_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    named(monkeypatch, "a", "b", "c", "d")
    handle = Handle(stats_of("c"), None, ActorDiedError(), stats_of("a"))
    began = time.monotonic()
    replicas = asyncio.run(stats_of_all(handle, 0.1))
    assert time.monotonic() - began < 5
    assert replicas == {"a": STATS, "b": SILENT, "c": STATS, "d": SILENT}
    assert total(replicas.values())["replicas"] == 2


def test_a_replica_that_answers_is_listed_even_if_its_actor_was_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    named(monkeypatch)
    assert asyncio.run(stats_of_all(Handle(stats_of("new")), 1)) == {"new": STATS}


def test_without_replicas_the_stats_are_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    named(monkeypatch)
    assert asyncio.run(stats_of_all(Handle(), 1)) == {}
    assert total([])["replicas"] == total([])["backlog_s"] == 0


def test_the_total_sums_the_numbers() -> None:
    both = total([STATS, STATS | {"backlog_s": 1.5, "requests": {"completed": 1, "failed": 2}}, SILENT])
    assert (both["replicas"], both["backlog_s"], both["num_slots"]) == (2, 2.0, 8)
    assert both["requests"] == {"completed": 4, "failed": 2}


OLDER = {name: value for name, value in STATS.items() if name not in ("backlog_s", "requests")}
OTHER = STATS | {"waiting": "none", "active_slots": None, "num_slots": {"128x128": 4}, "backlog_s": float("nan")}


@pytest.mark.parametrize("stats", [OLDER, OTHER, {}, STATS | {"requests": 7}, STATS | {"requests": {"completed": "3"}}])
def test_a_rollout_with_different_statistics_has_a_total(stats: dict[str, Any]) -> None:
    mixed = total([STATS, stats])
    assert mixed["replicas"] == 2
    assert set(mixed) == {"replicas", "requests", *SUMMED}
    for name in SUMMED:
        value = stats.get(name)
        counts = isinstance(value, int | float) and value == value
        assert mixed[name] == STATS[name] + (value if counts else 0), name
    assert mixed["requests"]["completed"] in (3, 6)


def test_the_total_counts_what_waits_in_the_ingress_and_what_has_ended_there() -> None:
    queue = {"waiting": 3, "waiting_s": 1.5, "ended": {"queue_full": 2, "deadline": 1, "cancelled": 3}}
    alone = total([STATS | {"requests": {"completed": 3, "deadline": 4, "cancelled": 1}}])
    both = with_queue(alone, queue)
    assert (both["waiting"], both["unfinished"], both["backlog_s"]) == (4, 5, 2.0)
    assert both["requests"] == {"completed": 3, "deadline": 5, "queue_full": 2, "cancelled": 4}
    assert both["device_busy_s"] == alone["device_busy_s"]


def test_a_replica_that_answers_without_its_id_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    named(monkeypatch, "a", "b")
    assert asyncio.run(stats_of_all(Handle(stats_of("a"), STATS, "busy"), 1)) == {"a": STATS, "b": SILENT}
