"""What the local cluster is and where: its ports, its folder, its processes, as cluster.json in the run directory keeps
them. Knows nothing of how it is started.
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
VITAL = {"gcs_server", "raylet", "dashboard", "monitor"}  # of the head; nodes may come and go
# Ray's ports that nobody needs to know beforehand: options of `ray start`, and two that only an environment can set.
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
    def token_file(self) -> Path:
        return token_file(self.run_dir)

    @property
    def headers(self) -> dict[str, str]:
        """By which it knows its owner. Raises UserError where the token cannot be had."""
        return auth_token.bearer(auth_token.read_local(self.token_file))

    @property
    def dashboard(self) -> Dashboard:
        return Dashboard(self.address, headers=self.headers, token_file=str(self.token_file))

    @property
    def missing(self) -> set[str]:
        """The vital processes that do not run."""
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
        """Raises UserError where another user wrote it: whoever believes it may end processes and remove folders."""
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
    """The cluster that `up` started here, or a sentence about why there is none."""
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
    """Short, because Ray adds some 70 characters to it and a socket's path may have 103 (macOS) or 107 (Linux)."""
    base = Path(tempfile.gettempdir())
    return (base if len(str(base)) <= 12 else Path("/tmp")) / f"imagine-{mark[-8:]}"
