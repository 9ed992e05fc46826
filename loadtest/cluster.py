"""Samples the state of the cluster while a load test runs.

Replicas and nodes come from Serve's REST API and Ray's dashboard; queues and milestones come from our GET /v1/stats.
This module only reads. A failure to read is noted in the sample and never ends a run, as load may well cause it.
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
SETTLED_S = 3.0  # how long nothing may have changed


@dataclass
class Watcher:
    url: str
    session: aiohttp.ClientSession
    dashboard: Dashboard | None
    journal: Journal
    samples: list[Sample] = field(default_factory=list)

    async def watch(self, interval_s: float, stop: asyncio.Event) -> None:
        """Samples every source until `stop`, and once after it. A slow source does not delay the others."""
        await asyncio.gather(*(self.follow(source, interval_s, stop) for source in self.sources()))

    async def follow(self, source: Source, interval_s: float, stop: asyncio.Event) -> None:
        while not stop.is_set():
            await self.sample(source)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval_s):
                    await stop.wait()
        await self.sample(source)

    async def sample_once(self) -> None:
        await asyncio.gather(*map(self.sample, self.sources()))

    def sources(self) -> Sequence[Source]:
        if not self.dashboard:
            return (self.statistics,)
        return (self.statistics, partial(self.ask, serve, self.dashboard), partial(self.ask, nodes, self.dashboard))

    async def sample(self, source: Source) -> None:
        sample: Sample = {"unix": round(time.time(), 3), **await source()}
        self.journal.write(sample)
        self.samples.append(sample)

    async def statistics(self) -> Sample:
        """What GET /v1/stats says of the replicas that answer."""
        try:
            timeout = aiohttp.ClientTimeout(total=STATS_TIMEOUT_S)
            async with self.session.get(f"{self.url}/v1/stats", timeout=timeout, allow_redirects=False) as answer:
                if answer.status != 200:
                    return {"errors": [f"GET /v1/stats answers {answer.status}"]}
                return queues(await answer.json())
        except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, TypeError) as error:
            return {"errors": [f"GET /v1/stats: {type(error).__name__} {error}"]}

    async def ask(self, question: Callable[[Dashboard], Sample], dashboard: Dashboard) -> Sample:
        """Runs a blocking call in a thread."""
        try:
            return await asyncio.to_thread(question, dashboard)
        except (UserError, OSError, ValueError, KeyError, TypeError) as error:
            return {"errors": [f"dashboard: {error}"]}

    def settled(self, before: Sample | None) -> bool:
        """Whether replicas and nodes have been for a moment as they were before the load."""
        if not before:  # replicas and nodes cannot be seen
            return True
        wanted = {"target": before["target"], "running": before["target"], "starting": 0, "stopping": 0}
        wanted |= {"nodes": before["nodes"], "pending": 0}
        for name, value in wanted.items():
            seen = [sample for sample in self.samples if name in sample]
            if any(sample[name] != value for sample in seen if sample["unix"] >= seen[-1]["unix"] - SETTLED_S):
                return False
        return True

    def cluster(self) -> Sample | None:
        """The first known state of replicas and nodes; None if either is unknown."""
        first: Sample = {}
        for sample in reversed(self.samples):
            first |= sample
        return first if "target" in first and "nodes" in first else None


def serve(dashboard: Dashboard) -> Sample:
    return replicas(dashboard.details())


def nodes(dashboard: Dashboard) -> Sample:
    """Nodes by type without the head node, and when each node started."""
    node_status = status(dashboard)
    with dashboard.open("/nodes", view="summary") as answer:
        raylets = [node["raylet"] for node in json.load(answer)["data"]["summary"]]
    heads = {raylet.get("nodeTypeName") for raylet in raylets if raylet.get("isHeadNode")}
    return {
        "nodes": {name: count for name, count in sorted(node_status.running.items()) if name not in heads},
        "pending": len(node_status.pending),
        "node_starts": {
            raylet["nodeId"]: {"type": raylet.get("nodeTypeName", "?"), "since": int(raylet["startTimeMs"]) / 1000}
            for raylet in raylets
            if raylet.get("startTimeMs") and raylet.get("state") == "ALIVE"
        },
    }


def queues(stats: Mapping[str, Any]) -> Sample:
    answering = {name: replica for name, replica in stats["replicas"].items() if "error" not in replica}
    fills = [replica["bucket_fill"] for replica in answering.values()]
    names = ("waiting", "unfinished", "active_slots", "num_slots")
    return {
        **{name: sum(replica[name] for replica in answering.values()) for name in names},
        "bucket_fill": sum(fills) / len(fills) if fills else None,
        "devices": {name: replica["device"] for name, replica in answering.items()},
        "milestones": {name: replica["milestones"] for name, replica in answering.items() if "milestones" in replica},
    }


def replicas(details: Mapping[str, Any]) -> Sample:
    """Replicas of the deployment that the load scales.

    That is the deployment with autoscaling; of several, or without any, the one with most chips.
    """
    deployments = [
        (app, name, deployment)
        for app, content in details["applications"].items()
        for name, deployment in content["deployments"].items()
    ]
    if not deployments:
        return {"errors": ["Serve has no deployment"]}

    def weight(entry: tuple[str, str, Mapping[str, Any]]) -> tuple[bool, float]:
        config = entry[2]["deployment_config"]
        return bool(config.get("autoscaling_config")), chips(config)

    app, name, model = max(deployments, key=weight)
    config = model["deployment_config"]
    states = Counter(replica["state"] for replica in model["replicas"])
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
            replica["replica_id"]: {
                "state": replica["state"],
                "node": replica["node_id"],
                "since": replica["start_time_s"],
            }
            for replica in model["replicas"]
        },
    }


def chips(config: Mapping[str, Any]) -> float:
    return float(((config.get("ray_actor_options") or {}).get("resources") or {}).get("TPU", 0))
