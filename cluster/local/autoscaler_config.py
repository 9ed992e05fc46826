"""The config of the local cluster's autoscaler: the node types of a cluster file, with a local node provider.

It also holds the timings and failures that the local node provider imitates. Knows nothing of processes.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster import ownership
from cluster.cli import UserError

PROVIDER = "cluster.local.node_provider.LocalNodeProvider"
COMMANDS = (
    *("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"),
    *("head_start_ray_commands", "worker_start_ray_commands"),
)
BOUNDS = {"idle_minutes": (0.05, 1440.0), "launch_s": (0.0, 3600.0), "stock_out": (0.0, 1.0), "preemption": (0.0, 1.0)}


@dataclass(frozen=True)
class Timings:
    """Delays and failures of the local cloud. Each is an option of `make up` by its name in capitals."""

    idle_minutes: float | None = None  # until an idle node is removed; None: as in the cluster file
    launch_s: float = 0.0  # from the request for a node to its start
    stock_out: float = 0.0  # probability that a request for a node is refused
    preemption: float = 0.0  # probability that a node is preempted within a minute

    def __post_init__(self) -> None:
        for name, (least, most) in BOUNDS.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise UserError(f"{name.upper()} must be between {least:g} and {most:g}, got {value:g}.")

    def __str__(self) -> str:
        return ", ".join(f"{name.upper()}={value:g}" for name, value in asdict(self).items() if value)


def timings(options: Mapping[str, str], before: Timings) -> Timings:
    """`before` with the options applied."""
    values = asdict(before)
    for name, text in options.items():
        try:
            values[name] = float(text)
        except ValueError:
            least, most = BOUNDS[name]
            raise UserError(f"{name.upper()} must be a number between {least:g} and {most:g}, got {text}.") from None
    return Timings(**values)


@dataclass(frozen=True)
class NodeTypes:
    """The node types of a cluster file without what only Google Cloud has, and one for this machine's GPUs."""

    file: str
    head: str  # name of the head's type
    types: dict[str, dict[str, Any]]
    most_workers: int
    idle_minutes: float

    @property
    def workers(self) -> dict[str, dict[str, Any]]:
        return {name: node_type for name, node_type in self.types.items() if name != self.head}


def read(path: Path) -> NodeTypes:
    """Raises UserError where the file is no cluster file, or Ray could not start its nodes."""
    from cluster.config import cluster_config  # imports Ray, which takes a second
    from cluster.gpus import visible_gpus

    try:
        path.open().close()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}. Name the cluster file with: make up TWIN=..."
        ) from None
    config = cluster_config.read(path, visible_gpus())
    types: dict[str, dict[str, Any]] = {
        name: {
            "resources": {key: amount for key, amount in node.resources.items() if not key.startswith("node:")},
            "labels": node.labels,
            "min_workers": node.min_workers,
            "max_workers": node.max_workers,
            "node_config": {},
        }
        for name, node in config.node_types.items()
    }
    return NodeTypes(str(path), config.head, types, config.max_workers, config.idle_timeout_minutes)


def autoscaling(types: NodeTypes, behaviour: Timings, **provider: object) -> dict[str, Any]:
    """The content for `ray start --autoscaling-config`. Ray and the provider read the file every second."""
    return {
        "cluster_name": "local",
        "max_workers": types.most_workers,
        "idle_timeout_minutes": types.idle_minutes if behaviour.idle_minutes is None else behaviour.idle_minutes,
        "provider": {
            "type": "external",
            "module": PROVIDER,
            "disable_node_updaters": True,  # they would log in by SSH
            "launch_multiple": True,
            "head_node_id": types.head,
            "head_node_type": types.head,
            "timings": asdict(behaviour),
            **provider,
        },
        "auth": {},
        "head_node_type": types.head,
        "available_node_types": types.types,
        "file_mounts": {},
        "cluster_synced_files": [],
        **{name: [] for name in COMMANDS},
    }


def write(config: dict[str, Any], path: Path) -> None:
    """Replaces the file atomically, as Ray may read it at any moment."""
    ownership.write(path, yaml.safe_dump(config, sort_keys=False))
