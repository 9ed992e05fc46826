"""Private parts of Ray that `import ray` loads anyway: tables of TPUs, GPUs, nodes, and how a gRPC port is opened."""

from typing import Any

from ray._common import tls_utils
from ray._private.accelerators import tpu
from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager
from ray._private.node import Node
from ray._private.parameter import RayParams
from ray._private.ray_constants import PROCESS_TYPE_RAYLET
from ray._private.services import find_bootstrap_address

__all__ = [
    "PROCESS_TYPE_RAYLET",  # the key of the raylet in Node.all_processes
    "UPLOAD_LOGGERS",
    "Node",  # starts a raylet in this process, as `ray start` does
    "NvidiaGPUAcceleratorManager",  # counts the GPUs of this machine, and those that its environment leaves visible
    "RayParams",  # what a Node is started with
    "close_replica_port",
    "find_bootstrap_address",  # the cluster that ray.init() would take, or None
    "tpu",  # which TPUs there are, by name: their chips, hosts and topologies
]

UPLOAD_LOGGERS = ("ray._private.runtime_env.working_dir", "ray._private.runtime_env.packaging")  # a line per upload


def close_replica_port() -> None:
    """Keeps Serve's replicas in this process from opening a gRPC port, as ray/serve/_private/replica.py does."""
    tls_utils.add_port_to_grpc_server = open_no_port


def open_no_port(server: Any, address: str) -> int:
    """Stands in for the function that binds a port and returns its number, which Serve records for the replica."""
    return 0
