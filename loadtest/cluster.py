"""How the cluster fares while a load test runs: replicas and nodes from Serve's REST API and Ray's dashboard, queues
and milestones from our own GET /v1/stats. It reads only. What cannot be read is noted in the sample and never ends a
run: that a server does not answer is what a load test is for.
"""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from loadtest.records import Journal
from ops.dashboard import Dashboard
from ops.nodes import status
from ops.terminal import Stop

Sample = dict[str, Any]
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
        """Until `stop`, and once more."""
        while not stop.is_set():
            await self.sample()
            try:
                await asyncio.wait_for(stop.wait(), interval_s)
            except TimeoutError:
                continue
        await self.sample()

    async def sample(self) -> None:
        parts = await asyncio.gather(self.statistics(), asyncio.to_thread(self.serve))
        one: Sample = {"unix": round(time.time(), 3)}
        for part in parts:
            errors = [*one.get("errors", []), *part.pop("errors", [])]
            one |= part | ({"errors": errors} if errors else {})
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

    def serve(self) -> Sample:
        """Blocks, so it runs in a thread."""
        if not self.dashboard:
            return {}
        try:
            found = replicas(self.dashboard.details())
            nodes = status(self.dashboard)
            with self.dashboard.open("/nodes", view="summary") as answer:
                raylets = [one["raylet"] for one in json.load(answer)["data"]["summary"]]
        except (Stop, OSError, ValueError, KeyError, TypeError) as error:
            return {"errors": [f"dashboard: {error}"]}
        started = {
            one["nodeId"]: {"type": one.get("nodeTypeName", "?"), "since": int(one["startTimeMs"]) / 1000}
            for one in raylets
            if one.get("startTimeMs") and one.get("state") == "ALIVE"
        }
        heads = {one.get("nodeTypeName") for one in raylets if one.get("isHeadNode")}
        workers = {name: count for name, count in sorted(nodes.running.items()) if name not in heads}
        return found | {"nodes": workers, "pending": len(nodes.pending), "node_starts": started}

    def settled(self, before: Sample | None) -> bool:
        """Whether replicas and nodes are as they were before the load, and have been for a moment."""
        if not before or "target" not in before or "nodes" not in before:
            return True
        wanted = before["target"], before["target"], 0, 0, before["nodes"], 0
        recent = [one for one in self.samples if one["unix"] >= self.samples[-1]["unix"] - SETTLED_S]
        names = ("target", "running", "starting", "stopping", "nodes", "pending")
        return all(tuple(one.get(name) for name in names) == wanted for one in recent)


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
