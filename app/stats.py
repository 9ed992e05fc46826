"""What GET /v1/stats answers: every replica asked for its statistics, and their sum."""

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any

import ray.util
from ray.serve.exceptions import DeploymentUnavailableError

Stats = Mapping[str, Any]

SILENT = {"error": "It does not answer: it is starting, stopping or lost."}
SUMMED = ("waiting", "unfinished", "active_slots", "num_slots", "backlog_s", "device_busy_s", "compiles_after_ready")


async def stats_of_all(replicas: Any, timeout_s: float) -> dict[str, Stats]:
    """Statistics by replica id. `replicas` is a DeploymentHandle; one that does not answer is listed with an error."""
    names = asyncio.to_thread(replica_ids, replicas.app_name, replicas.deployment_name)
    known, answers = await asyncio.gather(names, broadcast(replicas, "stats", timeout_s))
    found: dict[str, Stats] = {one.pop("replica"): one for one in answers}
    return {name: found.get(name, SILENT) for name in sorted({*known, *found})}


async def broadcast(replicas: Any, method: str, timeout_s: float) -> list[Any]:
    """What those replicas return that do so in time.

    Ray's own `results_async` gives nothing at all when one is late, so its parts are used here.
    """
    try:
        async with asyncio.timeout(timeout_s):
            sent = await replicas.broadcast(method)._fetch_replica_results_async()
    except (TimeoutError, DeploymentUnavailableError):  # none is running
        return []
    asked = [asyncio.ensure_future(one.get_async()) for one in sent]
    done, late = await asyncio.wait(asked, timeout=timeout_s)
    for one in late:
        one.cancel()
    return [one.result() for one in done if not one.cancelled() and not one.exception()]


def replica_ids(app: str, deployment: str) -> list[str]:
    """Of all replicas that are up, also those that no request goes to: Serve names their actors so."""
    prefix = f"SERVE_REPLICA::{app}#{deployment}#"
    named = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    return [name.removeprefix(prefix) for name in named if name.startswith(prefix)]


def total(replicas: Iterable[Stats]) -> dict[str, Any]:
    """Of those that answered."""
    answered = [one for one in replicas if "error" not in one]
    outcomes = sorted({outcome for one in answered for outcome in one["requests"]})
    return {
        "replicas": len(answered),
        **{name: sum(one[name] for one in answered) for name in SUMMED},
        "requests": {outcome: sum(one["requests"].get(outcome, 0) for one in answered) for outcome in outcomes},
    }
