"""How the cluster fares while a load test runs: replicas and nodes from Serve's REST API and Ray's dashboard, queues
and milestones from our own GET /v1/stats. It reads only. What cannot be read is noted in the sample and never ends a
run: that a server does not answer is what a load test is for.
"""

import asyncio
import contextlib
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import aiohttp

from cluster.cli import UserError
from cluster.dashboard import Dashboard
from cluster.nodes import status
from loadtest.records import Journal

Sample = dict[str, Any]
Source = Callable[[], Awaitable[Sample]]
STATS_TIMEOUT_S = 10.0
SETTLED_S = 3.0  # for so long nothing may have changed


@dataclass
class Watcher:
    url: str
    session: aiohttp.ClientSession
    dashboard: Dashboard | None
    journal: Journal
    samples: list[Sample] = field(default_factory=list)

    async def watch(self, interval_s: float, stop: asyncio.Event) -> None:
        """Until `stop`, and once more; each source at its own pace, so that a slow one does not hold up the other."""
        await asyncio.gather(*(self.follow(source, interval_s, stop) for source in self.sources()))

    async def follow(self, source: Source, interval_s: float, stop: asyncio.Event) -> None:
        while not stop.is_set():
            await self.sample(source)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), interval_s)
        await self.sample(source)

    async def look(self) -> None:
        await asyncio.gather(*map(self.sample, self.sources()))

    def sources(self) -> Sequence[Source]:
        if not self.dashboard:
            return (self.statistics,)
        return (self.statistics, partial(self.ask, serve, self.dashboard), partial(self.ask, nodes, self.dashboard))

    async def sample(self, source: Source) -> None:
        told = await source()
        one: Sample = {"unix": round(time.time(), 3), **told}
        self.journal.write(one)
        self.samples.append(one)

    async def statistics(self) -> Sample:
        """Of the replicas that answer."""
        try:
            timeout = aiohttp.ClientTimeout(total=STATS_TIMEOUT_S)
            async with self.session.get(f"{self.url}/v1/stats", timeout=timeout, allow_redirects=False) as answer:
                if answer.status != 200:
                    return {"errors": [f"GET /v1/stats answers {answer.status}"]}
                return queues(await answer.json())
        except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, TypeError) as error:
            return {"errors": [f"GET /v1/stats: {type(error).__name__} {error}"]}

    async def ask(self, question: Callable[[Dashboard], Sample], dashboard: Dashboard) -> Sample:
        """What blocks, in a thread."""
        try:
            return await asyncio.to_thread(question, dashboard)
        except (UserError, OSError, ValueError, KeyError, TypeError) as error:
            return {"errors": [f"dashboard: {error}"]}

    def settled(self, before: Sample | None) -> bool:
        """Whether replicas and nodes are as they were before the load, and have been for a moment."""
        if not before:  # there is nothing to wait for that could be seen
            return True
        wanted = {"target": before["target"], "running": before["target"], "starting": 0, "stopping": 0}
        wanted |= {"nodes": before["nodes"], "pending": 0}
        for name, value in wanted.items():
            told = [one for one in self.samples if name in one]
            if any(one[name] != value for one in told if one["unix"] >= told[-1]["unix"] - SETTLED_S):
                return False
        return True

    def cluster(self) -> Sample | None:
        """The first that was seen of replicas and nodes; None where either could not be."""
        found: Sample = {}
        for one in reversed(self.samples):
            found |= one
        return found if "target" in found and "nodes" in found else None


def serve(dashboard: Dashboard) -> Sample:
    return replicas(dashboard.details())


def nodes(dashboard: Dashboard) -> Sample:
    """Without the head; and when each began."""
    told = status(dashboard)
    with dashboard.open("/nodes", view="summary") as answer:
        raylets = [one["raylet"] for one in json.load(answer)["data"]["summary"]]
    heads = {one.get("nodeTypeName") for one in raylets if one.get("isHeadNode")}
    return {
        "nodes": {name: count for name, count in sorted(told.running.items()) if name not in heads},
        "pending": len(told.pending),
        "node_starts": {
            one["nodeId"]: {"type": one.get("nodeTypeName", "?"), "since": int(one["startTimeMs"]) / 1000}
            for one in raylets
            if one.get("startTimeMs") and one.get("state") == "ALIVE"
        },
    }


def queues(stats: Mapping[str, Any]) -> Sample:
    told = {name: one for name, one in stats["replicas"].items() if "error" not in one}
    fills = [one["bucket_fill"] for one in told.values()]
    names = ("waiting", "unfinished", "active_slots", "num_slots")
    return {
        **{name: sum(one[name] for one in told.values()) for name in names},
        "bucket_fill": sum(fills) / len(fills) if fills else None,
        "devices": {name: one["device"] for name, one in told.items()},
        "milestones": {name: one["milestones"] for name, one in told.items() if "milestones" in one},
    }


def replicas(details: Mapping[str, Any]) -> Sample:
    """Of the deployment that the load scales: the one with autoscaling, or with the most chips, or the last."""
    deployments = [
        (app, name, one)
        for app, content in details["applications"].items()
        for name, one in content["deployments"].items()
    ]
    if not deployments:
        return {"errors": ["Serve has no deployment"]}

    def weight(entry: tuple[str, str, Mapping[str, Any]]) -> tuple[bool, float]:
        config = entry[2]["deployment_config"]
        return bool(config.get("autoscaling_config")), chips(config)

    app, name, model = max(deployments, key=weight)
    config = model["deployment_config"]
    states = Counter(one["state"] for one in model["replicas"])
    going = {"STOPPING", "PENDING_MIGRATION"}
    return {
        "deployment": f"{app}/{name}",
        "target": model["target_num_replicas"],
        "running": states["RUNNING"],
        "stopping": sum(states[state] for state in going),
        "starting": sum(count for state, count in states.items() if state not in {"RUNNING", *going}),
        "target_ongoing": (config.get("autoscaling_config") or {}).get("target_ongoing_requests"),
        "chips": chips(config),
        "replicas": {
            one["replica_id"]: {"state": one["state"], "node": one["node_id"], "since": one["start_time_s"]}
            for one in model["replicas"]
        },
    }


def chips(config: Mapping[str, Any]) -> float:
    return float(((config.get("ray_actor_options") or {}).get("resources") or {}).get("TPU", 0))
