"""Private parts of Ray that a rehearsal without hosts drives, as Ray's monitor does on the head of a cluster."""

import importlib
from types import ModuleType

from ray.autoscaler._private.providers import _get_node_provider as node_provider
from ray.autoscaler.v2.instance_manager.config import FileConfigReader
from ray.autoscaler.v2.instance_manager.node_provider import NodeProviderAdapter
from ray.autoscaler.v2.instance_manager.ray_installer import RayInstaller
from ray.core.generated.instance_manager_pb2 import Instance  # type: ignore[attr-defined]

__all__ = ["FileConfigReader", "Instance", "NodeProviderAdapter", "RayInstaller", "node_provider", "waiting_modules"]

# Modules that wait for Google or a host, each with its own name for the module `time`.
WAITING = (
    "cluster.remote.leftovers",
    "googleapiclient.http",
    "ray.autoscaler._private.command_runner",
    "ray.autoscaler._private.commands",
    "ray.autoscaler._private.gcp.config",
    "ray.autoscaler._private.gcp.node",
    "ray.autoscaler._private.gcp.node_provider",
    "ray.autoscaler._private.updater",
)


def waiting_modules() -> list[ModuleType]:
    return [importlib.import_module(name) for name in WAITING]
