"""Samples the processes of the cluster and the API's statistics while a soak test runs. It only reads.

A process belongs to the cluster if it carries the cluster's mark (cluster/processes.py).
"""

import asyncio
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from benchmarks.soak.records import Process
from cluster.local.state import Cluster

STATS_TIMEOUT_S = 20.0
# The kind of a process by the beginning of its title, or with a colon by any part of it. The first match counts.
TITLES = {
    ":APIIngress": "ingress",
    ":StableDiffusion": "replica",
    "ray::ProxyActor": "proxy",
    "ray::ServeController": "controller",
    "ray::DashboardAgent": "dashboard agent",
    "ray::RuntimeEnvAgent": "runtime env agent",
    "ray::": "other workers",
    "ray-dashboard-": "dashboard modules",
}
COMMANDS = {  # the kind by the name of the program, script or module
    "gcs_server": "gcs_server",
    "raylet": "raylet",
    "monitor": "autoscaler",
    "log_monitor": "log monitor",
    "dashboard": "dashboard",
    "ray.util.client.server": "client server",
    "cluster.node_watcher": "node watcher",
}


def kind_of(command: Sequence[str]) -> str:
    """The role in the cluster of the process with this command line."""
    title = command[0] if command else ""
    for part, kind in TITLES.items():
        if title.startswith(part) or (part.startswith(":") and part in title):
            return kind
    for before, argument in zip(["", *command], command, strict=False):
        name = argument if before == "-m" else Path(argument).name.removesuffix(".py")
        if name in COMMANDS and (not before or before == "-m" or argument.endswith(".py")):
            return COMMANDS[name]
    return "others"


def processes_of(cluster: Cluster) -> list[Process]:
    processes = []
    for process in cluster.search():
        with contextlib.suppress(psutil.Error), process.oneshot():  # the process may end meanwhile
            memory = process.memory_info()
            processes.append(
                Process(
                    process.pid,
                    process.create_time(),
                    kind_of(process.cmdline()),
                    memory.rss,
                    getattr(memory, "shared", 0),  # not on macOS
                    process.num_fds(),
                    process.num_threads(),
                )
            )
    return processes


async def stats_of(session: aiohttp.ClientSession, url: str) -> dict[str, Any] | None:
    """The answer of GET /v1/stats; None if there is none."""
    try:
        timeout = aiohttp.ClientTimeout(total=STATS_TIMEOUT_S)
        async with session.get(f"{url}/v1/stats", timeout=timeout) as answer:
            return dict(await answer.json()) if answer.status == 200 else None
    except (aiohttp.ClientError, TimeoutError, ValueError, OSError):
        return None


def replicas_of(stats: dict[str, Any] | None) -> dict[str, int]:
    """The process id of each replica that answers, by the replica's name."""
    replicas = (stats or {}).get("replicas", {})
    return {name: replica["pid"] for name, replica in replicas.items() if "pid" in replica}


async def sample(cluster: Cluster, session: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    processes, stats = await asyncio.gather(asyncio.to_thread(processes_of, cluster), stats_of(session, url))
    total = (stats or {}).get("total", {})
    return {
        "processes": [[*vars(process).values()] for process in processes],
        "unfinished": total.get("unfinished"),
        "replicas": total.get("replicas"),
    }
