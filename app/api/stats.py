"""GET /v1/stats: the statistics of every replica, their sum, and the nodes of the cluster."""

import asyncio
import math
from collections.abc import Iterable, Mapping
from typing import Any

import ray
import ray.util
from ray.serve.exceptions import DeploymentUnavailableError

from app.api.replica_calls import broadcast

Stats = Mapping[str, Any]

SILENT = {"error": "This replica does not answer: it is starting, stopping or lost."}
NODE_TYPE, HEAD = "ray.io/node-group", "node:__internal_head__"  # a label and a resource, as Ray names them
COUNTED = ("CPU", "GPU", "TPU")
SUMMED = ("waiting", "unfinished", "active_slots", "num_slots", "backlog_s", "device_busy_s", "compiles_after_ready")


async def stats_of_all(replicas: Any, timeout_s: float) -> dict[str, Stats]:
    """Statistics by replica id. `replicas` is a DeploymentHandle. One that does not answer is SILENT."""
    known, answers = await asyncio.gather(all_replica_ids(replicas), answers_of_all(replicas, timeout_s))
    stats: dict[str, Stats] = {answer["replica"]: answer for answer in answers if is_stats(answer)}
    return {
        name: {key: value for key, value in stats.get(name, SILENT).items() if key != "replica"}
        for name in sorted({*known, *stats})
    }


async def answers_of_all(replicas: Any, timeout_s: float) -> list[Any]:
    try:
        return await broadcast(replicas, "stats", timeout_s)
    except DeploymentUnavailableError:  # none is running
        return []


def is_stats(answer: object) -> bool:
    """A replica of another version might answer anything. Without its id it cannot be listed."""
    return isinstance(answer, Mapping) and isinstance(answer.get("replica"), str)


async def all_replica_ids(replicas: Any) -> list[str]:
    return await asyncio.to_thread(replica_ids, replicas.app_name, replicas.deployment_name)


def replica_ids(app: str, deployment: str) -> list[str]:
    """Of all replicas that are up, also those that get no requests. They are part of the names of Serve's actors."""
    prefix = f"SERVE_REPLICA::{app}#{deployment}#"
    names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]


async def nodes() -> list[dict[str, Any]]:
    """The live nodes, without their addresses. A replica's `node` is one of their ids."""
    if not ray.is_initialized():  # tests serve the routes without Ray
        return []
    return [
        {
            "id": node["NodeID"],
            "type": node["Labels"].get(NODE_TYPE, ""),
            "head": HEAD in node["Resources"],
            "resources": {name: node["Resources"][name] for name in COUNTED if name in node["Resources"]},
        }
        for node in await asyncio.to_thread(ray.nodes)
        if node["Alive"]
    ]


def total(replicas: Iterable[Stats]) -> dict[str, Any]:
    """The sum over the replicas that answered.

    During a rollout, old and new replicas answer with different statistics. A number that a replica lacks counts as 0,
    and so does a value that is no number.
    """
    answered = [stats for stats in replicas if "error" not in stats]
    requests = [counts for stats in answered if isinstance(counts := stats.get("requests"), Mapping)]
    outcomes = sorted({outcome for counts in requests for outcome in counts})
    return {
        "replicas": len(answered),
        **{name: sum(number(stats.get(name)) for stats in answered) for name in SUMMED},
        "requests": {outcome: sum(number(counts.get(outcome)) for counts in requests) for outcome in outcomes},
    }


def with_queue(totals: Mapping[str, Any], queue: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the requests that wait in the ingress, or that have ended there, to those of the replicas."""
    waiting, waiting_s = queue["waiting"], queue["waiting_s"]
    more = {"waiting": waiting, "unfinished": waiting, "backlog_s": waiting_s}
    sums = {name: value + more[name] if name in more else value for name, value in totals.items()}
    outcomes = totals["requests"]
    ended = {name: outcomes.get(name, 0) + count for name, count in queue["ended"].items()}
    return sums | {"requests": outcomes | ended}


def number(value: object) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if is_number else 0  # type: ignore[return-value]
