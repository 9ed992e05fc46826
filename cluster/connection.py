"""Connects to a cluster: the local one (`CLUSTER=local`), or the one that a cluster file describes (`CLUSTER=x.yaml`).

Both give a Dashboard, so that callers need not know which it is.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster import auth_token, processes
from cluster.cli import UserError
from cluster.dashboard import Dashboard, Details, serve_address
from cluster.local.state import running
from cluster.local.state import token_file as local_token_file
from cluster.remote.preflight import content, ready, token_file
from cluster.remote.tunnel import route, tunnel
from cluster.terminal import make_command

LOCAL = "local"
DASHBOARD_PORT = 8265  # Ray's default


@contextmanager
def dashboard_of(cluster: str, run_dir: Path) -> Iterator[Dashboard]:
    """The cluster's dashboard. A tunnel to a remote one is open while the block runs."""
    if cluster == LOCAL:
        yield running(run_dir).dashboard
        return
    path = Path(cluster)
    ready(path)
    remote_port = dashboard_port(content(path))
    local_port = processes.free_ports(1)[0]
    headers = authorization()
    with tunnel(route(path), {local_port: remote_port}):
        yield Dashboard(f"http://127.0.0.1:{local_port}", cluster, headers)


def isolate(cluster: str, run_dir: Path) -> None:
    """Removes variables that would lead Ray to another cluster. Call it before Ray is imported, which reads them once.

    It also removes a token: the local cluster has its own, and remote clusters use the one in the home folder.
    """
    token = auth_token.environment(local_token_file(run_dir)) if cluster == LOCAL else {"RAY_AUTH_MODE": "token"}
    ours = processes.environment(**token, RAY_USAGE_STATS_ENABLED="0")
    os.environ.clear()
    os.environ.update(ours)


def reach(dashboard: Dashboard) -> str:
    """The address of the API, as a sentence for the user."""
    address = serve_address(dashboard.details())
    if dashboard.cluster == LOCAL:
        return address
    return f"{address} on the head, and here at the end of: {make_command('dashboard', dashboard.cluster)}"


def dashboard_port(cluster: dict[str, Any]) -> int:
    commands = " ".join(map(str, cluster.get("head_start_ray_commands") or ()))
    named = re.search(r"--dashboard-port[= ](\d+)", commands)
    return int(named[1]) if named else DASHBOARD_PORT


def authorization() -> dict[str, str]:
    """The header with the token of remote clusters, read from the home folder."""
    try:
        token = token_file().read_text().strip()
    except (OSError, UnicodeDecodeError):
        token = ""
    if not auth_token.plausible(token):
        raise UserError(
            f"{token_file()} holds no token. Put the cluster's there, or make one: ray get-auth-token --generate"
        )
    return auth_token.bearer(token)


@contextmanager
def api_of(dashboard: Dashboard, details: Details) -> Iterator[str]:
    """The URL of the API from this machine. A tunnel to a remote one is open while the block runs."""
    if dashboard.cluster == LOCAL:
        yield serve_address(details)
        return
    local_port = processes.free_ports(1)[0]
    with tunnel(route(Path(dashboard.cluster)), {local_port: details["http_options"]["port"]}):
        yield f"http://127.0.0.1:{local_port}"
