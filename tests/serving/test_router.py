"""Serve's own router class, with ours below it, over replicas that are only names."""

import asyncio
import pickle
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray import cloudpickle
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve.config import RequestRouterConfig

from app.api.errors import ReplicaGone
from app.ray_internals.routing import PendingRequest, running_replicas
from app.serving.router import ReplicaRouter

DEPLOYMENT = DeploymentID("StableDiffusion", "text-to-image")


def replica(name: str) -> Any:
    """What the router asks of Serve's wrapper of a replica."""

    async def queue_len(*, deadline_s: float) -> int:
        return 0

    return SimpleNamespace(replica_id=ReplicaID(name, DEPLOYMENT), max_ongoing_requests=8, get_queue_len=queue_len)


def pending(name: str, request: str = "request") -> PendingRequest:
    metadata = RequestMetadata(request_id=request, internal_request_id=request, session_id=name)
    return PendingRequest(args=[], kwargs={}, metadata=metadata)


def routed(test: Callable[[Any], Awaitable[None]], *names: str) -> None:
    async def run() -> None:
        router: Any = ReplicaRouter(DEPLOYMENT, DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True)
        router.update_replicas([replica(name) for name in names])
        async with asyncio.timeout(10):
            await test(router)
            await asyncio.gather(*router._routing_tasks)  # none goes on without a request

    asyncio.run(run())


def test_each_request_goes_to_the_replica_that_the_ingress_names() -> None:
    async def test(router: Any) -> None:
        names = ["b", "a", "c", "b", "b"] * 4
        requests = [pending(name, f"request {i}") for i, name in enumerate(names)]
        chosen = await asyncio.gather(*(router._choose_replica_for_request(request) for request in requests))
        assert [replica.replica_id.unique_id for replica in chosen] == names

    routed(test, "a", "b", "c")


def test_a_request_for_a_replica_that_is_gone_returns_at_once_and_the_same_http_request_may_call_again() -> None:
    async def test(router: Any) -> None:
        with pytest.raises(ReplicaGone):
            await router._choose_replica_for_request(pending("gone"))
        chosen = await router._choose_replica_for_request(pending("a"))
        assert chosen.replica_id.unique_id == "a"

    routed(test, "a", "b")


def test_a_call_that_names_no_replica_goes_to_any() -> None:
    async def test(router: Any) -> None:
        assert await router._choose_replica_for_request(pending(""))

    routed(test, "a")


def test_serve_pickles_the_class_and_it_raises_the_error_that_the_ingress_knows() -> None:
    settings: dict[str, Any] = {"request_router_class": "app.serving.router:ReplicaRouter"}
    router: Any = RequestRouterConfig(**settings).get_request_router_class()
    assert router.__name__ == "ReplicaRouter"
    assert router.choose_replicas.__globals__["ReplicaGone"] is ReplicaGone
    assert pickle.loads(cloudpickle.dumps(ReplicaGone("a"))).args == ("a",)


def test_a_handle_tells_which_replicas_run() -> None:
    async def test(router: Any) -> None:
        handle = SimpleNamespace(_router=SimpleNamespace(_asyncio_router=SimpleNamespace(request_router=router)))
        assert running_replicas(handle) == frozenset("ab")
        assert running_replicas(SimpleNamespace(_router=None)) is None

    routed(test, "a", "b")
