"""What a soak test looks at while it runs: every process of the cluster, and what the API says of its replicas.

Reads only. A process is the cluster's if it carries the cluster's mark (cluster/processes.py).
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
# What a process's title begins with or holds, and what it is called here; the first that fits.
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
COMMANDS = {  # by the name of the program, script or module
    "gcs_server": "gcs_server",
    "raylet": "raylet",
    "monitor": "autoscaler",
    "log_monitor": "log monitor",
    "dashboard": "dashboard",
    "ray.util.client.server": "client server",
    "cluster.node_watcher": "node watcher",
}


def kind_of(command: Sequence[str]) -> str:
    """What the process with this command line is to the cluster."""
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
    found = []
    for process in cluster.search():
        with contextlib.suppress(psutil.Error), process.oneshot():  # it may end meanwhile
            memory = process.memory_info()
            found.append(
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
    return found


async def stats_of(session: aiohttp.ClientSession, url: str) -> dict[str, Any] | None:
    """What GET /v1/stats answers; None where it does not."""
    try:
        timeout = aiohttp.ClientTimeout(total=STATS_TIMEOUT_S)
        async with session.get(f"{url}/v1/stats", timeout=timeout) as answer:
            return dict(await answer.json()) if answer.status == 200 else None
    except (aiohttp.ClientError, TimeoutError, ValueError, OSError):
        return None


def replicas_of(stats: dict[str, Any] | None) -> dict[str, int]:
    """Of those that answer, the process by the replica's name."""
    replicas = (stats or {}).get("replicas", {})
    return {name: replica["pid"] for name, replica in replicas.items() if "pid" in replica}


async def sample(cluster: Cluster, session: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    found, stats = await asyncio.gather(asyncio.to_thread(processes_of, cluster), stats_of(session, url))
    total = (stats or {}).get("total", {})
    return {
        "processes": [[*vars(process).values()] for process in found],
        "unfinished": total.get("unfinished"),
        "replicas": total.get("replicas"),
    }
