"""Starts the head of the local cluster with Ray's own autoscaler, and waits for the nodes that the autoscaler adds.

The head listens on loopback only and has its own folder. All its processes carry the cluster's mark.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import yaml

from cluster import ROOT, auth_token, nodes, ownership, processes
from cluster.cli import UserError
from cluster.local import autoscaler_config
from cluster.local.autoscaler_config import NodeTypes
from cluster.local.state import METADATA_PORT, PORT_OPTIONS, PORT_VARIABLES, Cluster
from cluster.terminal import Progress, say

OBJECT_STORE_BYTES = 256 << 20
START_TIMEOUT_S = 120.0
NODES_TIMEOUT_S = 120.0


def start(cluster: Cluster, types: NodeTypes) -> Cluster:
    cluster.save()
    auth_token.create(cluster.token_file)
    with ownership.private():
        cluster.temp_dir.mkdir(mode=0o700)  # Ray's folder is open to all users, so the one above it is not
        configure(cluster, types)
        log = cluster.temp_dir / "start.log"
        output = log.open("w")
    with output, Progress() as progress:  # outside private(): files of jobs get the user's own umask
        starting = subprocess.Popen(
            command(cluster, types),
            env=environment(cluster) | {"RAY_NODE_TYPE_NAME": types.head, "RAY_CLOUD_INSTANCE_ID": types.head},
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C and a closed terminal do not end the cluster
        )
        while starting.poll() is None:
            if progress.elapsed > START_TIMEOUT_S:
                raise UserError(f"Ray did not start within {START_TIMEOUT_S:.0f} s. {last_words(log)}")
            progress.show({"Ray": ("starting", "")})
            time.sleep(0.1)
    if starting.returncode:
        raise UserError(f"Ray did not start. {last_words(log)}")
    cluster = replace(cluster, processes=tuple(processes.record(process) for process in of_the_head(cluster)))
    if cluster.missing:
        if "dashboard" in cluster.missing:
            refuse_taken(cluster.dashboard_port)  # perhaps another process took it meanwhile
        raise UserError(f"Ray did not start: {', '.join(sorted(cluster.missing))} ended at once. {last_words(log)}")
    cluster.save()
    say(f"The local cluster is up in {progress.elapsed:.0f} s with {shown(types)}. Dashboard: {cluster.address}")
    say('Plain serve, ray and curl reach it after: eval "$(make -s address)"')
    return cluster


def refuse_taken(dashboard_port: int) -> None:
    if not processes.free(dashboard_port):
        raise UserError(
            f"Port {dashboard_port} is taken by {processes.listener(dashboard_port)}. "
            f"Choose another one: make up RAY_DASHBOARD_PORT={dashboard_port + 1}"
        )


def configure(cluster: Cluster, types: NodeTypes) -> None:
    provider = {
        "gcs_address": cluster.gcs_address,
        "metadata_port": cluster.ports[METADATA_PORT],
        "config_file": str(cluster.config_file),
    }
    autoscaler_config.write(autoscaler_config.autoscaling(types, cluster.timings, **provider), cluster.config_file)


def of_the_head(cluster: Cluster) -> list[psutil.Process]:
    """The head's processes, without the nodes that the autoscaler may have started, which are its children."""
    own = cluster.search()
    others = {
        child
        for process in own
        if processes.name_of(process) == "monitor"
        for child in process.children(recursive=True)
    }
    return [process for process in own if process not in others]


def shown(types: NodeTypes) -> str:
    workers = [
        f"{node_type['min_workers']} to {node_type['max_workers']} {name} nodes of "
        + ", ".join(
            f"{resource} {amount:g}" for resource, amount in node_type["resources"].items() if "-" not in resource
        )
        for name, node_type in types.workers.items()
    ]
    return f"{Path(types.file).name} ({'; '.join(workers)})"


def wait_for_nodes(cluster: Cluster) -> None:
    """Waits until every type has its min_workers. Gives up without an error, as the autoscaler goes on trying."""
    types = yaml.safe_load(cluster.config_file.read_text())["available_node_types"]
    wanted = {name: node_type["min_workers"] for name, node_type in types.items() if node_type["min_workers"]}
    dashboard = cluster.dashboard
    with Progress() as progress:
        while True:
            current = nodes.status(dashboard)
            short = {name: count for name, count in wanted.items() if current.running.get(name, 0) < count}
            if not short:
                return
            counts = {f"{name} nodes": f"{current.running.get(name, 0)} of {count}" for name, count in short.items()}
            if cluster.timings.stock_out == 1 or progress.elapsed > NODES_TIMEOUT_S + cluster.timings.launch_s:
                summary = ", ".join(f"{count} {name}" for name, count in counts.items())
                say(f"Not all nodes have started: {summary}. The autoscaler keeps trying; see: make monitor")
                return
            progress.show({name: (count, "; ".join(current.pending)) for name, count in counts.items()})
            time.sleep(0.5)


def command(cluster: Cluster, types: NodeTypes) -> list[str]:
    head = types.types[types.head]
    resources = {name: amount for name, amount in head["resources"].items() if name not in ("CPU", "GPU", "memory")}
    options: dict[str, object] = {name: cluster.ports[name] for name in PORT_OPTIONS} | {
        "node-ip-address": "127.0.0.1",
        "dashboard-host": "127.0.0.1",
        "dashboard-port": cluster.dashboard_port,
        "min-worker-port": 0,  # 0: any free port
        "max-worker-port": 0,
        "num-cpus": head["resources"].get("CPU", 0),
        "num-gpus": 0,  # else it takes those of the machine
        "resources": json.dumps(resources),
        "labels": ",".join(f"{name}={value}" for name, value in head["labels"].items()),
        "object-store-memory": OBJECT_STORE_BYTES,
        "temp-dir": cluster.temp_dir / "ray",
        "autoscaling-config": cluster.config_file,
    }
    arguments = [f"--{name}={value}" for name, value in options.items() if value != ""]
    return [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--disable-usage-stats", *arguments]


def environment(cluster: Cluster) -> dict[str, str]:
    bin_dir = Path(sys.executable).parent
    return processes.environment(
        **{processes.MARK: cluster.mark},
        PATH=f"{bin_dir}{os.pathsep}{os.environ.get('PATH', os.defpath)}",  # a job's `python` is ours
        PYTHONPATH=str(ROOT),  # Serve can import `app.builders` in every process
        JAX_PLATFORMS=os.environ.get("JAX_PLATFORMS", "cpu"),  # nodes declare TPUs that do not exist
        **auth_token.environment(cluster.token_file),  # without a token, any local user could run code as us
        TMPDIR=str(cluster.temp_dir),  # Ray's dashboard makes sockets there, so the path must be shorter than 75
        RAY_USAGE_STATS_ENABLED="0",
        **{processes.PROXY_CALLBACK: processes.PROXY_GUARDS},
        # Without this Ray replaces 127.0.0.1 by the machine's address on the network.
        RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
        RAY_preload_python_modules="cluster.closed_port",
        RAY_FAKE_CLUSTER="1",  # Ray's fake node provider requires it
        RAY_enable_autoscaler_v2="1",  # as `ray up` sets it on Google Cloud
        AUTOSCALER_UPDATE_INTERVAL_S="1",  # seconds; cheap on this machine
        # With Serve's defaults a dead proxy is noticed after 28 s, and a frozen replica keeps its chips until drained.
        RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S="2",
        RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S="5",
        RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS="1",
        # Otherwise a job's driver starts as many workers as its node declares CPUs.
        RAY_prestart_worker_first_driver="0",
        **{name: str(cluster.ports[name]) for name in PORT_VARIABLES},
    )


def last_words(log: Path) -> str:
    """The last line of Ray's output. In a traceback it is the error."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"It says: {lines[-1]}" if lines else ""
