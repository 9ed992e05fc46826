"""Private parts of Ray Serve that routing needs: the types of its request routers, and which replicas a handle knows.

Seen in Ray 2.60: serve/_private/request_router/ and the routers behind a DeploymentHandle, serve/_private/router.py.
"""

from collections.abc import Mapping
from typing import Any

from ray.serve._private.request_router.common import PendingRequest
from ray.serve._private.request_router.replica_wrapper import RunningReplica
from ray.serve._private.request_router.request_router import RequestRouter

__all__ = ["PendingRequest", "RequestRouter", "RunningReplica", "running_replicas"]


def running_replicas(handle: Any) -> frozenset[str] | None:
    """The ids of the replicas that a DeploymentHandle sends requests to; None before its first call."""
    router = getattr(handle, "_router", None)
    request_router = router and router._asyncio_router.request_router
    if request_router is None:
        return None
    replicas: Mapping[Any, RunningReplica] = request_router.curr_replicas
    return frozenset(replica_id.unique_id for replica_id in tuple(replicas))
