"""What GET /v1/stats answers: every replica asked for its statistics, and their sum."""

import asyncio
import math
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
    known, answers = await asyncio.gather(names, answers_of_all(replicas, timeout_s))
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
    """A replica of another version might answer anything; without its name there is nowhere to list it."""
    return isinstance(answer, Mapping) and isinstance(answer.get("replica"), str)


async def broadcast(replicas: Any, method: str, timeout_s: float) -> list[Any]:
    """What those replicas return that do so in time. Raises DeploymentUnavailableError if none runs.

    Ray's own `results_async` gives nothing at all when one is late, so its parts are used here.
    """
    try:
        async with asyncio.timeout(timeout_s):
            sent = await replicas.broadcast(method)._fetch_replica_results_async()
    except TimeoutError:  # Serve has not told us yet which replicas there are
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
    """The sum over the replicas that answered.

    While a rollout replaces replicas, old and new ones answer with different statistics: a number that a replica does
    not have counts as 0, and a value that is no number is left out.
    """
    answered = [stats for stats in replicas if "error" not in stats]
    requests = [counts for stats in answered if isinstance(counts := stats.get("requests"), Mapping)]
    outcomes = sorted({outcome for counts in requests for outcome in counts})
    return {
        "replicas": len(answered),
        **{name: sum(number(stats.get(name)) for stats in answered) for name in SUMMED},
        "requests": {outcome: sum(number(counts.get(outcome)) for counts in requests) for outcome in outcomes},
    }


def number(value: object) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if is_number else 0  # type: ignore[return-value]
