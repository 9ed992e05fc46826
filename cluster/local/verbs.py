"""The local cluster: a Ray cluster on this machine with the node types of a cluster file for Google Cloud.

`up` starts a head and Ray's own autoscaler, which adds and removes nodes; each is a real raylet. `down` ends exactly
these processes. All listen on loopback only.

The run directory (`.run`) has the cluster's state in cluster.json. It is written before anything starts, so that `down`
and the next `up` can remove what a crash leaves.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from cluster import nodes, ownership, processes, shell_environment
from cluster.cli import Parser, UserError
from cluster.dashboard import Dashboard
from cluster.local import autoscaler_config, head
from cluster.local.autoscaler_config import Timings
from cluster.local.state import (
    CLUSTER_FILE,
    DASHBOARD_PORT,
    FOLDER_FORM,
    MARK_FORM,
    METADATA_PORT,
    RUN_DIR,
    Cluster,
    new,
    running,
    temp_dir_of,
    token_file,
)
from cluster.terminal import say

GRACE_S = 3.0  # all end within a second, except the GCS, which ignores SIGTERM and has nothing to save


def up(
    run_dir: Path, wanted_port: int | None = None, file: Path | None = None, options: Mapping[str, str] | None = None
) -> None:
    """Starts a cluster, or changes the timings of the one that runs. What is left out keeps its value."""
    with locked(run_dir):
        cluster = Cluster.load(run_dir)
        if cluster and not cluster.missing:
            cluster = reconfigured(cluster, wanted_port, file, options or {})
            say(f"The local cluster is already up: {cluster.address}")
        else:
            timings = autoscaler_config.timings(options or {}, Timings())
            cluster = start_new(run_dir, wanted_port or DASHBOARD_PORT, file or CLUSTER_FILE, timings)
        head.wait_for_nodes(cluster)


def reconfigured(cluster: Cluster, wanted_port: int | None, file: Path | None, options: Mapping[str, str]) -> Cluster:
    """Gives the running cluster new timings."""
    if wanted_port not in (None, cluster.dashboard_port):
        raise UserError(f"A local cluster is already up at {cluster.address}. To move it, first: make down")
    if file and str(file.resolve()) != cluster.file:
        raise UserError(f"The local cluster has the node types of {cluster.file}. For others, first: make down")
    timings = autoscaler_config.timings(options, cluster.timings)
    if timings != cluster.timings:
        cluster = replace(cluster, timings=timings)
        head.configure(cluster, autoscaler_config.read(Path(cluster.file)))
        cluster.save()
        say(f"From now on: {str(timings) or 'no launch delay, no stock-outs, no preemption'}")
    return cluster


def start_new(run_dir: Path, dashboard_port: int, file: Path, timings: Timings) -> Cluster:
    from cluster.config.lint import refuse_errors  # imports the app and Ray, which takes seconds

    types = autoscaler_config.read(file.resolve())
    refuse_errors([file], local=True, advice=False)
    if leftovers := clear(run_dir):
        say(f"Removed the leftovers of a cluster that died: {leftovers}.")
    head.refuse_taken(dashboard_port)
    try:
        return head.start(replace(new(run_dir, dashboard_port, file), timings=timings), types)
    except BaseException:
        clear(run_dir)
        raise


def down(run_dir: Path) -> None:
    with locked(run_dir):
        ended = clear(run_dir)
        say(f"The local cluster is down: {ended}." if ended else "Nothing is up in this checkout, so nothing to end.")


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Allows only one `up` or `down` at a time in a checkout."""
    ownership.make_folder(run_dir, "RUN_DIR=")
    with ownership.private():
        lock = os.open(run_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(lock, "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError("Another make up or make down is running in this checkout. Wait for it to end.") from None
        yield


def clear(run_dir: Path) -> str:
    """Ends all processes and removes all folders of this checkout's clusters. Returns what it did, or nothing."""
    cluster = Cluster.load(run_dir)
    marks = filter(MARK_FORM.fullmatch, processes.marks(f"{run_dir}#"))
    folders_by_mark = {mark: temp_dir_of(mark) for mark in marks}  # also if cluster.json was lost
    if cluster:
        folders_by_mark[cluster.mark] = cluster.temp_dir
    recorded = cluster.processes if cluster else ()
    ended = processes.end(
        lambda: [process for mark in folders_by_mark for process in processes.belonging(mark, recorded)], GRACE_S
    )
    named = [folder for folder in folders_by_mark.values() if FOLDER_FORM.fullmatch(folder.name)]
    folders = [folder for folder in named if ownership.is_own_folder(folder)]
    for folder in folders:
        shutil.rmtree(folder)
    for folder in named:
        if folder not in folders and os.path.lexists(folder):
            say(f"{folder} is not our own folder, and is left alone.")
    for file in (run_dir / "cluster.json", token_file(run_dir)):
        file.unlink(missing_ok=True)
    if not cluster and not folders_by_mark:
        return ""
    return f"{ended} process{'' if ended == 1 else 'es'} ended" + "".join(f", {folder} removed" for folder in folders)


def port(text: str) -> int:
    if not text.isdigit() or not 1024 <= int(text) <= 65535:
        raise UserError(f"A port must be between 1024 and 65535, got {text}.")
    return int(text)


def preempt(cluster: Cluster, node: str) -> None:
    """Preempts a node as Google Cloud does: it gets notice, and ends half a minute later."""
    address = f"http://127.0.0.1:{cluster.ports[METADATA_PORT]}"
    metadata_server = Dashboard(
        address, headers=cluster.headers, what="local metadata server", token_file=str(cluster.token_file)
    )
    with metadata_server.open("/") as answer:
        workers: list[str] = json.load(answer)
    if not workers:
        raise UserError("There is no node to preempt. See: make status")
    if node and node not in workers:
        raise UserError(f"NODE must be one of {', '.join(workers)}, got {node}.")
    with metadata_server.open(f"/{node or workers[-1]}/preempted", method="PUT"):
        say(f"{node or workers[-1]} has its notice and goes in 30 s. Watch it with: make monitor")


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("verb", choices=["up", "down", "monitor", "attach", "dashboard", "address", "preempt"])
    parser.add_argument("--run-dir", type=Path, default=RUN_DIR, help="of the cluster's state (default: .run)")
    parser.add_argument("--dashboard-port", default="", help=f"up: default {DASHBOARD_PORT}, or as it runs")
    parser.add_argument("--twin", default="", help="up: the cluster file with the node types (cluster.yaml)")
    for name, (least, most) in autoscaler_config.BOUNDS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", default="", help=f"up: {least:g} to {most:g}")
    parser.add_argument("--once", action="store_true", help="monitor: print the state once")
    parser.add_argument("--node", default="", help="preempt: the node (default: the youngest)")
    arguments = parser.parse_args()
    run_dir = arguments.run_dir.resolve()
    os.environ.update(processes.past_proxies())
    if arguments.verb == "up":
        options = {name: text for name in autoscaler_config.BOUNDS if (text := getattr(arguments, name))}
        file = Path(arguments.twin) if arguments.twin else None
        up(run_dir, port(arguments.dashboard_port) if arguments.dashboard_port else None, file, options)
        return
    if arguments.verb == "down":
        down(run_dir)
        return
    cluster = running(run_dir)
    match arguments.verb:
        case "monitor":
            nodes.monitor(cluster.dashboard, follow=not arguments.once)
        case "attach":
            shell_environment.attach(cluster)
        case "address":
            shell_environment.export(cluster)
        case "dashboard":
            say(f"{cluster.address}  asks once for the token in {cluster.token_file}")
        case "preempt":
            preempt(cluster, arguments.node)
