"""The state of the local cluster: ports, folder and processes, saved as cluster.json in the run directory.

Knows nothing of how a cluster is started.
"""

import json
import re
import secrets
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import psutil

from cluster import ROOT, auth_token, ownership, processes
from cluster.cli import UserError
from cluster.dashboard import Dashboard
from cluster.local.autoscaler_config import Timings
from cluster.processes import Recorded

RUN_DIR = ROOT / ".run"
CLUSTER_FILE = ROOT / "cluster.yaml"
DASHBOARD_PORT = 8265  # where `serve` and `ray job` look by default
VITAL = {"gcs_server", "raylet", "dashboard", "monitor"}  # processes of the head
# Ray's other ports, which we choose at random: options of `ray start`, and two that are environment variables.
PORT_OPTIONS = (
    *("port", "ray-client-server-port", "node-manager-port", "object-manager-port", "metrics-export-port"),
    *("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port"),
)
PORT_VARIABLES = ("AUTOSCALER_METRIC_PORT", "DASHBOARD_METRIC_PORT")
METADATA_PORT = "metadata"
MARK_FORM = re.compile(r".*#[0-9a-f]{8}", re.DOTALL)
FOLDER_FORM = re.compile(r"imagine-[0-9a-f]{8}")


@dataclass(frozen=True)
class Cluster:
    run_dir: Path
    mark: str  # in the environment of all its processes
    temp_dir: Path
    dashboard_port: int
    ports: dict[str, int]  # PORT_OPTIONS, PORT_VARIABLES and METADATA_PORT
    file: str  # the cluster file with its node types
    timings: Timings = Timings()
    processes: tuple[Recorded, ...] = ()  # of the head; empty until it is up

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.dashboard_port}"

    @property
    def gcs_address(self) -> str:
        return f"127.0.0.1:{self.ports['port']}"

    @property
    def config_file(self) -> Path:
        """The autoscaler reads this file."""
        return self.temp_dir / "autoscaling.yaml"

    @property
    def token_file(self) -> Path:
        return token_file(self.run_dir)

    @property
    def headers(self) -> dict[str, str]:
        """The header with the cluster's token. Raises UserError if the token cannot be read."""
        return auth_token.bearer(auth_token.read_local(self.token_file))

    @property
    def dashboard(self) -> Dashboard:
        return Dashboard(self.address, headers=self.headers, token_file=str(self.token_file))

    @property
    def missing(self) -> set[str]:
        """The vital processes that no longer run."""
        return VITAL - {process.name for process in self.processes if processes.find(process)}

    @property
    def uptime_s(self) -> float:
        return time.time() - min(process.started for process in self.processes)

    def search(self) -> list[psutil.Process]:
        return processes.belonging(self.mark, self.processes)

    def save(self) -> None:
        ownership.write(self.run_dir / "cluster.json", json.dumps(asdict(self), indent=2, default=str) + "\n")

    @classmethod
    def load(cls, run_dir: Path) -> Self | None:
        """Raises UserError if another user wrote the file: its reader ends processes and removes folders."""
        try:
            state: dict[str, Any] = json.loads(ownership.read(run_dir / "cluster.json"))
            return cls(
                run_dir=run_dir,
                mark=state["mark"],
                temp_dir=Path(state["temp_dir"]),
                dashboard_port=state["dashboard_port"],
                ports=state["ports"],
                file=state["file"],
                timings=Timings(**state["timings"]),
                processes=tuple(Recorded(**process) for process in state["processes"]),
            )
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None


def token_file(run_dir: Path) -> Path:
    return run_dir / "token"


def running(run_dir: Path) -> Cluster:
    """The cluster that `up` started. Raises UserError if there is none."""
    cluster = Cluster.load(run_dir)
    if not cluster:
        raise UserError("No cluster is up in this checkout. Start one with: make up")
    if cluster.missing:
        raise UserError(f"The cluster died ({', '.join(sorted(cluster.missing))} gone). Start a new one with: make up")
    return cluster


def new(run_dir: Path, dashboard_port: int, file: Path = CLUSTER_FILE) -> Cluster:
    mark = f"{run_dir}#{secrets.token_hex(4)}"
    names = (*PORT_OPTIONS, *PORT_VARIABLES, METADATA_PORT)
    ports = dict(zip(names, processes.free_ports(len(names), apart_from=dashboard_port), strict=True))
    return Cluster(run_dir, mark, temp_dir_of(mark), dashboard_port, ports, str(file.resolve()))


def temp_dir_of(mark: str) -> Path:
    """A short path: Ray adds about 70 characters, and a socket's path may have 103 (macOS) or 107 (Linux)."""
    base = Path(tempfile.gettempdir())
    return (base if len(str(base)) <= 12 else Path("/tmp")) / f"imagine-{mark[-8:]}"
