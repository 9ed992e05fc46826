"""The local twin of a cluster on Google Cloud: `up` starts a head here and Ray's own autoscaler, which adds and removes
nodes of the types that a cluster file declares, each a real raylet on this machine; `down` ends exactly those.

All of it listens on loopback only. What it is and where is written to cluster.json in the run directory (`.run`)
before anything starts, so that `down` and the next `up` can clear away whatever a crash leaves.
"""

import argparse
import fcntl
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import psutil
import yaml

from ops import nodes, processes, shell, twin
from ops.dashboard import Dashboard
from ops.processes import Recorded
from ops.terminal import Progress, Stop, run, say
from ops.twin import NodeTypes, Timings

ROOT = Path(__file__).resolve().parents[1]
RUN_DIR = ROOT / ".run"
TWIN = ROOT / "cluster.yaml"
DASHBOARD_PORT = 8265  # where `serve` and `ray job` look by default
OBJECT_STORE_BYTES = 256 << 20
VITAL = {"gcs_server", "raylet", "dashboard", "monitor"}  # of the head; nodes may come and go
# Ray's ports that nobody needs to know beforehand: options of `ray start`, and two that only an environment can set.
PORT_OPTIONS = (
    *("port", "ray-client-server-port", "node-manager-port", "object-manager-port", "metrics-export-port"),
    *("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port"),
)
PORT_VARIABLES = ("AUTOSCALER_METRIC_PORT", "DASHBOARD_METRIC_PORT")
METADATA_PORT = "metadata"
START_TIMEOUT_S = 120.0
NODES_TIMEOUT_S = 120.0
GRACE_S = 3.0  # all end within one second, but for the GCS, which has nothing to save and does not listen


@dataclass(frozen=True)
class Cluster:
    run_dir: Path
    mark: str  # in the environment of all its processes
    temp_dir: Path
    dashboard_port: int
    ports: dict[str, int]  # PORT_OPTIONS, PORT_VARIABLES and METADATA_PORT
    file: str  # whose node types it has
    timings: Timings = Timings()
    processes: tuple[Recorded, ...] = ()  # the head's; empty until it is up

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.dashboard_port}"

    @property
    def gcs_address(self) -> str:
        return f"127.0.0.1:{self.ports['port']}"

    @property
    def config_file(self) -> Path:
        """What the autoscaler reads."""
        return self.temp_dir / "autoscaling.yaml"

    @property
    def missing(self) -> set[str]:
        """The vital processes that do not run."""
        return VITAL - {one.name for one in self.processes if processes.find(one)}

    @property
    def uptime_s(self) -> float:
        return time.time() - min(one.started for one in self.processes)

    def search(self) -> list[psutil.Process]:
        return processes.belonging(self.mark, self.processes)

    def save(self) -> None:
        file = self.run_dir / "cluster.json"
        draft = file.with_suffix(".draft")
        draft.write_text(json.dumps(asdict(self), indent=2, default=str) + "\n")
        draft.replace(file)

    @classmethod
    def load(cls, run_dir: Path) -> Self | None:
        try:
            state: dict[str, Any] = json.loads((run_dir / "cluster.json").read_text())
            return cls(
                run_dir=run_dir,
                mark=state["mark"],
                temp_dir=Path(state["temp_dir"]),
                dashboard_port=state["dashboard_port"],
                ports=state["ports"],
                file=state["file"],
                timings=Timings(**state["timings"]),
                processes=tuple(Recorded(**one) for one in state["processes"]),
            )
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None


def running(run_dir: Path) -> Cluster:
    """The cluster that `up` started here, or a sentence about why there is none."""
    cluster = Cluster.load(run_dir)
    if not cluster:
        raise Stop("No cluster is up in this checkout. Start one with: make up")
    if cluster.missing:
        raise Stop(f"The cluster died ({', '.join(sorted(cluster.missing))} gone). Start a new one with: make up")
    return cluster


def up(
    run_dir: Path, wanted_port: int | None = None, file: Path | None = None, given: Mapping[str, str] | None = None
) -> None:
    """With what is given; what is not stays as it is, or as it is by default."""
    with locked(run_dir):
        cluster = Cluster.load(run_dir)
        if cluster and not cluster.missing:
            cluster = changed(cluster, wanted_port, file, given or {})
            say(f"The local Ray is already up: {cluster.address}")
        else:
            cluster = anew(run_dir, wanted_port or DASHBOARD_PORT, file or TWIN, twin.timings(given or {}, Timings()))
        wait_for_nodes(cluster)


def changed(cluster: Cluster, wanted_port: int | None, file: Path | None, given: Mapping[str, str]) -> Cluster:
    """The cluster that is up, from now on with the timings that are given."""
    if wanted_port not in (None, cluster.dashboard_port):
        raise Stop(f"A local Ray is already up at {cluster.address}. To move it, first: make down")
    if file and str(file.resolve()) != cluster.file:
        raise Stop(f"The local Ray that is up has the node types of {cluster.file}. For others, first: make down")
    timings = twin.timings(given, cluster.timings)
    if timings != cluster.timings:
        cluster = replace(cluster, timings=timings)
        configure(cluster, twin.read(Path(cluster.file)))
        cluster.save()
        say(f"From now on: {timings or 'no delay, no stock-out, no pre-emption'}")
    return cluster


def anew(run_dir: Path, dashboard_port: int, file: Path, timings: Timings) -> Cluster:
    types = twin.read(file.resolve())
    if leftovers := clear(run_dir):
        say(f"Cleared away what a cluster that died had left: {leftovers}.")
    if not processes.free(dashboard_port):
        raise Stop(
            f"Port {dashboard_port} is taken by {processes.listener(dashboard_port)}. "
            f"Choose another one: make up RAY_DASHBOARD_PORT={dashboard_port + 1}"
        )
    try:
        return start(replace(new(run_dir, dashboard_port, file), timings=timings), types)
    except BaseException:
        clear(run_dir)
        raise


def down(run_dir: Path) -> None:
    with locked(run_dir):
        ended = clear(run_dir)
        say(f"The local Ray is down: {ended}." if ended else "Nothing is up in this checkout, so nothing to end.")


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """One `up` or `down` at a time in one checkout."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Stop("Another make up or make down is at work in this checkout. Wait for it to end.") from None
        yield


def start(cluster: Cluster, types: NodeTypes) -> Cluster:
    cluster.save()
    cluster.temp_dir.mkdir(mode=0o700)  # Ray opens its own folder to all users; this one above it stays ours
    configure(cluster, types)
    log = cluster.temp_dir / "start.log"
    with log.open("w") as output, Progress() as progress:
        starting = subprocess.Popen(
            command(cluster, types),
            env=environment(cluster) | {"RAY_NODE_TYPE_NAME": types.head, "RAY_CLOUD_INSTANCE_ID": types.head},
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # the terminal's Ctrl-C and hang-up are not for the cluster
        )
        while starting.poll() is None:
            if progress.elapsed > START_TIMEOUT_S:
                raise Stop(f"Ray did not start within {START_TIMEOUT_S:.0f} s. {last_words(log)}")
            progress.show({"Ray": ("starting", "")})
            time.sleep(0.1)
    if starting.returncode:
        raise Stop(f"Ray did not start. {last_words(log)}")
    cluster = replace(cluster, processes=tuple(processes.record(one) for one in of_the_head(cluster)))
    if cluster.missing:
        raise Stop(f"Ray did not start: {', '.join(sorted(cluster.missing))} ended at once. {last_words(log)}")
    cluster.save()
    say(f"The local Ray is up in {progress.elapsed:.0f} s, a twin of {shown(types)}. Dashboard: {cluster.address}")
    return cluster


def configure(cluster: Cluster, types: NodeTypes) -> None:
    provider = {
        "gcs_address": cluster.gcs_address,
        "metadata_port": cluster.ports[METADATA_PORT],
        "config_file": str(cluster.config_file),
    }
    twin.write(twin.autoscaling(types, cluster.timings, **provider), cluster.config_file)


def of_the_head(cluster: Cluster) -> list[psutil.Process]:
    """All but the nodes that the autoscaler may have started already, which are its children."""
    found = cluster.search()
    others = {child for one in found if processes.name_of(one) == "monitor" for child in one.children(recursive=True)}
    return [one for one in found if one not in others]


def shown(types: NodeTypes) -> str:
    workers = [
        f"{one['min_workers']} to {one['max_workers']} {name} nodes of "
        + ", ".join(f"{resource} {amount:g}" for resource, amount in one["resources"].items() if "-" not in resource)
        for name, one in types.workers.items()
    ]
    return f"{Path(types.file).name} ({'; '.join(workers)})"


def wait_for_nodes(cluster: Cluster) -> None:
    """Until those are there that always should be; a cloud that has none for now is no failure."""
    types = yaml.safe_load(cluster.config_file.read_text())["available_node_types"]
    wanted = {name: one["min_workers"] for name, one in types.items() if one["min_workers"]}
    dashboard = Dashboard(cluster.address)
    with Progress() as progress:
        while True:
            found = nodes.status(dashboard)
            short = {name: count for name, count in wanted.items() if found.running.get(name, 0) < count}
            if not short:
                return
            told = {f"{name} nodes": f"{found.running.get(name, 0)} of {count}" for name, count in short.items()}
            if cluster.timings.stock_out == 1 or progress.elapsed > NODES_TIMEOUT_S + cluster.timings.launch_s:
                counts = ", ".join(f"{count} {name}" for name, count in told.items())
                say(f"Of the nodes that should be there, there are: {counts}. It goes on trying; see: make monitor")
                return
            progress.show({name: (count, "; ".join(found.pending)) for name, count in told.items()})
            time.sleep(0.5)


def new(run_dir: Path, dashboard_port: int, file: Path = TWIN) -> Cluster:
    mark = f"{run_dir}#{secrets.token_hex(4)}"
    names = (*PORT_OPTIONS, *PORT_VARIABLES, METADATA_PORT)
    ports = dict(zip(names, processes.free_ports(len(names), apart_from=dashboard_port), strict=True))
    return Cluster(run_dir, mark, temp_dir_of(mark), dashboard_port, ports, str(file.resolve()))


def temp_dir_of(mark: str) -> Path:
    """Short, because Ray adds some 70 characters to it and a socket's path may have 103 (macOS) or 107 (Linux)."""
    base = Path(tempfile.gettempdir())
    return (base if len(str(base)) <= 12 else Path("/tmp")) / f"imagine-{mark[-8:]}"


def command(cluster: Cluster, types: NodeTypes) -> list[str]:
    head = types.types[types.head]
    resources = {name: amount for name, amount in head["resources"].items() if name not in ("CPU", "GPU", "memory")}
    options: dict[str, object] = {name: cluster.ports[name] for name in PORT_OPTIONS} | {
        "node-ip-address": "127.0.0.1",
        "dashboard-host": "127.0.0.1",
        "dashboard-port": cluster.dashboard_port,
        "min-worker-port": 0,  # the system gives each worker a free port
        "max-worker-port": 0,
        "num-cpus": head["resources"].get("CPU", 0),
        "resources": json.dumps(resources),
        "labels": ",".join(f"{name}={value}" for name, value in head["labels"].items()),
        "object-store-memory": OBJECT_STORE_BYTES,
        "temp-dir": cluster.temp_dir / "ray",
        "autoscaling-config": cluster.config_file,
    }
    given = [f"--{name}={value}" for name, value in options.items() if value != ""]
    return [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--disable-usage-stats", *given]


def environment(cluster: Cluster) -> dict[str, str]:
    bin_dir = Path(sys.executable).parent
    return processes.environment(
        **{processes.MARK: cluster.mark},
        PATH=f"{bin_dir}{os.pathsep}{os.environ.get('PATH', os.defpath)}",  # a job's `python` is this one
        PYTHONPATH=str(ROOT),  # `app.builders` is importable wherever Serve builds or runs it
        JAX_PLATFORMS=os.environ.get("JAX_PLATFORMS", "cpu"),  # the TPU is only said to be there
        RAY_AUTH_MODE="disabled",  # so that plain `serve deploy` works; loopback and a 0700 folder keep others out
        RAY_USAGE_STATS_ENABLED="0",
        # Without this Ray takes 127.0.0.1 for a mistake and binds to the machine's address on the network.
        RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
        RAY_preload_python_modules="ops.loopback",
        RAY_FAKE_CLUSTER="1",  # without which Ray's local provider refuses to work
        RAY_enable_autoscaler_v2="1",  # as `ray up` has it on Google Cloud
        AUTOSCALER_UPDATE_INTERVAL_S="1",  # asking this machine costs little
        # A job's driver on a node would have as many workers started as the node says it has CPUs.
        RAY_prestart_worker_first_driver="0",
        **{name: str(cluster.ports[name]) for name in PORT_VARIABLES},
    )


def last_words(log: Path) -> str:
    """The last line that Ray wrote, which in a traceback is what went wrong."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"It says: {lines[-1]}" if lines else ""


def clear(run_dir: Path) -> str:
    """Ends every process and removes every folder of this checkout's clusters; says what, or nothing."""
    cluster = Cluster.load(run_dir)
    found = {mark: temp_dir_of(mark) for mark in processes.marks(f"{run_dir}#")}  # also if cluster.json was lost
    if cluster:
        found[cluster.mark] = cluster.temp_dir
    recorded = cluster.processes if cluster else ()
    ended = processes.end(lambda: [one for mark in found for one in processes.belonging(mark, recorded)], GRACE_S)
    folders = [folder for folder in found.values() if folder.name.startswith("imagine-") and folder.is_dir()]
    for folder in folders:
        shutil.rmtree(folder)
    (run_dir / "cluster.json").unlink(missing_ok=True)
    if not cluster and not found:
        return ""
    return f"{ended} process{'' if ended == 1 else 'es'} ended" + "".join(f", {folder} removed" for folder in folders)


def port(text: str) -> int:
    if not text.isdigit() or not 1024 <= int(text) <= 65535:
        raise Stop(f"A port must be between 1024 and 65535, got {text}.")
    return int(text)


def preempt(cluster: Cluster, node: str) -> None:
    """Has the twin's Google take a node away: notice first, the end half a minute later."""
    google = Dashboard(f"http://127.0.0.1:{cluster.ports[METADATA_PORT]}", what="twin's Google")
    with google.open("/") as answer:
        there: list[str] = json.load(answer)
    if not there:
        raise Stop("No node is there that could be taken away. See: make status")
    if node and node not in there:
        raise Stop(f"NODE must be one of {', '.join(there)}, got {node}.")
    with google.open(f"/{node or there[-1]}/preempted", method="PUT"):
        say(f"{node or there[-1]} has its notice and goes in 30 s. Watch it with: make monitor")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["up", "down", "monitor", "attach", "dashboard", "address", "preempt"])
    parser.add_argument("--run-dir", type=Path, default=RUN_DIR, help="where its state is kept (default: .run)")
    parser.add_argument("--dashboard-port", default="", help=f"up: (default: {DASHBOARD_PORT}, or where it is up)")
    parser.add_argument("--twin", default="", help="up: the cluster file whose node types it has (cluster.yaml)")
    for name, (least, most) in twin.BOUNDS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", default="", help=f"up: {least:g} to {most:g}")
    parser.add_argument("--once", action="store_true", help="monitor: tell how it is, and do not follow")
    parser.add_argument("--node", default="", help="preempt: which (the youngest)")
    arguments = parser.parse_args()
    run_dir = arguments.run_dir.resolve()
    os.environ.update(processes.past_proxies())
    if arguments.verb == "up":
        given = {name: text for name in twin.BOUNDS if (text := getattr(arguments, name))}
        file = Path(arguments.twin) if arguments.twin else None
        up(run_dir, port(arguments.dashboard_port) if arguments.dashboard_port else None, file, given)
        return
    if arguments.verb == "down":
        down(run_dir)
        return
    cluster = running(run_dir)
    match arguments.verb:
        case "monitor":
            nodes.monitor(Dashboard(cluster.address), follow=not arguments.once)
        case "attach":
            shell.attach(cluster.address, cluster.gcs_address)
        case "address":
            shell.export(cluster.address, cluster.gcs_address)
        case "dashboard":
            say(cluster.address)
        case "preempt":
            preempt(cluster, arguments.node)


if __name__ == "__main__":
    run(main)
