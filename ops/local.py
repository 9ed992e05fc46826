"""The local Ray: `up` starts one that says it has a TPU host's four chips, `down` ends exactly that one.

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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import psutil

from ops import processes
from ops.processes import Recorded
from ops.terminal import Progress, Stop, run, say

ROOT = Path(__file__).resolve().parents[1]
RUN_DIR = ROOT / ".run"
DASHBOARD_PORT = 8265  # where `serve` and `ray job` look by default
RESOURCES = {"TPU": 4}
OBJECT_STORE_BYTES = 256 << 20
VITAL = {"gcs_server", "raylet", "dashboard"}
# Ray's ports that nobody needs to know beforehand: options of `ray start`, and two that only an environment can set.
PORT_OPTIONS = (
    *("port", "ray-client-server-port", "node-manager-port", "object-manager-port", "metrics-export-port"),
    *("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port"),
)
PORT_VARIABLES = ("AUTOSCALER_METRIC_PORT", "DASHBOARD_METRIC_PORT")
START_TIMEOUT_S = 120.0
GRACE_S = 3.0  # all end within one second, but for the GCS, which has nothing to save and does not listen


@dataclass(frozen=True)
class Cluster:
    run_dir: Path
    mark: str  # in the environment of all its processes
    temp_dir: Path
    dashboard_port: int
    ports: dict[str, int]  # PORT_OPTIONS and PORT_VARIABLES
    processes: tuple[Recorded, ...] = ()  # empty until it is up

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.dashboard_port}"

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


def up(run_dir: Path, wanted_port: int | None = None) -> None:
    with locked(run_dir):
        cluster = Cluster.load(run_dir)
        if cluster and not cluster.missing:
            if wanted_port not in (None, cluster.dashboard_port):
                raise Stop(f"A local Ray is already up at {cluster.address}. To move it, first: make down")
            say(f"The local Ray is already up: {cluster.address}")
            return
        dashboard_port = wanted_port or DASHBOARD_PORT
        if leftovers := clear(run_dir):
            say(f"Cleared away what a cluster that died had left: {leftovers}.")
        if not processes.free(dashboard_port):
            raise Stop(
                f"Port {dashboard_port} is taken by {processes.listener(dashboard_port)}. "
                f"Choose another one: make up RAY_DASHBOARD_PORT={dashboard_port + 1}"
            )
        try:
            start(run_dir, dashboard_port)
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


def start(run_dir: Path, dashboard_port: int) -> None:
    cluster = new(run_dir, dashboard_port)
    cluster.save()
    cluster.temp_dir.mkdir(mode=0o700)  # Ray opens its own folder to all users; this one above it stays ours
    log = cluster.temp_dir / "start.log"
    with log.open("w") as output, Progress() as progress:
        starting = subprocess.Popen(
            command(cluster),
            env=environment(cluster),
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
    cluster = replace(cluster, processes=tuple(processes.record(one) for one in cluster.search()))
    if cluster.missing:
        raise Stop(f"Ray did not start: {', '.join(sorted(cluster.missing))} ended at once. {last_words(log)}")
    cluster.save()
    resources = ", ".join(f"{name} {amount}" for name, amount in {"CPU": cpus(), **RESOURCES}.items())
    say(f"The local Ray is up in {progress.elapsed:.0f} s ({resources}). Dashboard: {cluster.address}")


def new(run_dir: Path, dashboard_port: int) -> Cluster:
    mark = f"{run_dir}#{secrets.token_hex(4)}"
    names = (*PORT_OPTIONS, *PORT_VARIABLES)
    ports = dict(zip(names, processes.free_ports(len(names), apart_from=dashboard_port), strict=True))
    return Cluster(run_dir, mark, temp_dir_of(mark), dashboard_port, ports)


def temp_dir_of(mark: str) -> Path:
    """Short, because Ray adds some 70 characters to it and a socket's path may have 103 (macOS) or 107 (Linux)."""
    base = Path(tempfile.gettempdir())
    return (base if len(str(base)) <= 12 else Path("/tmp")) / f"imagine-{mark[-8:]}"


def cpus() -> int:
    return max(2, os.cpu_count() or 1)  # one for each of the two deployments; Ray counts, it does not pin


def command(cluster: Cluster) -> list[str]:
    options: dict[str, object] = {name: cluster.ports[name] for name in PORT_OPTIONS} | {
        "node-ip-address": "127.0.0.1",
        "dashboard-host": "127.0.0.1",
        "dashboard-port": cluster.dashboard_port,
        "min-worker-port": 0,  # the system gives each worker a free port
        "max-worker-port": 0,
        "num-cpus": cpus(),
        "resources": json.dumps(RESOURCES),
        "object-store-memory": OBJECT_STORE_BYTES,
        "temp-dir": cluster.temp_dir / "ray",
    }
    given = [f"--{name}={value}" for name, value in options.items()]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["up", "down"])
    parser.add_argument("--run-dir", type=Path, default=RUN_DIR, help="where its state is kept (default: .run)")
    parser.add_argument("--dashboard-port", default="", help=f"(default: {DASHBOARD_PORT}, or where it is up)")
    arguments = parser.parse_args()
    run_dir = arguments.run_dir.resolve()
    if arguments.verb == "up":
        up(run_dir, port(arguments.dashboard_port) if arguments.dashboard_port else None)
    else:
        down(run_dir)


if __name__ == "__main__":
    run(main)
