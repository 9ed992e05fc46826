"""Calls of replicas that answer once, and Ray's failures as ApiErrors. Knows nothing of HTTP.

A request for images may change replicas on its way: that is app/api/journey.py.
"""

import asyncio
from collections.abc import AsyncIterator, Generator, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

from app.api.errors import ApiError
from app.api.messages import Accepted, Images, Moved, Preview, Progress

FAILED_RETRY_S = 30.0  # somebody has to deploy again

Answer = TypeVar("Answer", covariant=True)


class ReplicaLost(ApiError):
    """The replica that had the request has gone, or has dropped it."""


class ReplicaCancelled(ReplicaLost):
    """The replica's work was cancelled: it ends, or the client has gone and Ray has not told us yet."""


class Cancellable(Protocol):
    def cancel(self) -> None: ...


class Pending(Cancellable, Protocol[Answer]):
    """The part of Serve's DeploymentResponse that this module uses."""

    def __await__(self) -> Generator[Any, None, Answer]: ...


Item = Accepted | Progress | Preview | Images | Moved | ApiError


class Items(Cancellable, Protocol):
    """The part of Serve's DeploymentResponseGenerator that this module uses."""

    def __aiter__(self) -> AsyncIterator[Item]: ...
    async def __anext__(self) -> Item: ...


async def answer_of(response: Pending[Answer], timeout_s: float) -> Answer:
    with failures(response, timeout_s):
        async with asyncio.timeout(timeout_s):
            return await response


async def broadcast(replicas: Any, method: str, timeout_s: float, *arguments: Any) -> list[Any]:
    """The answers of all replicas that answer in time. Raises DeploymentUnavailableError if no replica runs.

    Ray's own `results_async` returns nothing at all when one replica is late, so this uses its parts.
    """
    try:
        async with asyncio.timeout(timeout_s):
            responses = await replicas.broadcast(method, *arguments)._fetch_replica_results_async()
    except TimeoutError:  # Serve has not sent the list of replicas yet
        return []
    pending = [asyncio.ensure_future(response.get_async()) for response in responses]
    done, late = await asyncio.wait(pending, timeout=timeout_s)
    for future in late:
        future.cancel()
    return [future.result() for future in done if not future.cancelled() and not future.exception()]


@contextmanager
def failures(response: Cancellable, timeout_s: float) -> Iterator[None]:
    """Raises ApiErrors in place of Ray's. Where the caller stops waiting, the replica's work stops too."""
    try:
        yield
    except RayTaskError:  # before TimeoutError: Ray makes it an instance of what the replica raised, too
        message = "The model failed on this request; the server's log says why, under this X-Request-ID."
        raise ApiError(500, message, None, "internal_error") from None
    except TimeoutError:
        response.cancel()
        raise ApiError(504, f"No picture within {timeout_s:g} s; the request was dropped.", None, "timeout") from None
    except asyncio.CancelledError:
        response.cancel()
        task = asyncio.current_task()
        if task and task.cancelling():  # the client has gone
            raise
        raise cancelled_by_replica() from None
    except BackPressureError as full:
        message = "Every replica's queue is full; try again later."
        raise ApiError(503, message, None, "queue_full", full.retry_after_s or 1.0) from None
    except DeploymentUnavailableError:
        message = "The deployment has failed: no replica runs, and none will start. `make status` says why."
        raise ApiError(503, message, None, "deployment_failed", FAILED_RETRY_S) from None
    except (RayActorError, ReplicaUnavailableError):
        raise ReplicaLost(503, "The replica was lost; try again.", None, "replica_lost", 5.0) from None


def cancelled_by_replica() -> ReplicaCancelled:
    return ReplicaCancelled(503, "The replica cancelled this request; try again.", None, "replica_lost", 1.0)
