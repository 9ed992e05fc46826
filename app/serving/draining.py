"""How requests leave a replica: one by one where the ingress has a better one, and all when it ends.

Serve tells user code nothing before all requests have ended, so it is Serve's own shutdown that begins a drain.
"""

import asyncio
import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from time import monotonic
from typing import Any

from ray import serve
from ray.serve.exceptions import RayServeException

from app.engine.engine import Engine
from app.engine.request import Generated
from app.ray_internals.serve import on_shutdown

logger = logging.getLogger(f"ray.serve.{__name__}")  # the tree that Serve writes to its files

POLL_S = 0.5  # between two looks for other replicas
LAST_S = 5.0  # of graceful_shutdown_timeout_s, in which images leave even if no other replica runs yet
END_S = 10.0  # Serve has waited for every request before it ends a replica, so nothing should be left


class Drain:
    """Begins when Serve starts to end this replica: for a preempted node, a downscale or a new version."""

    def __init__(self, engine: Engine, others_run: Callable[[], bool]) -> None:
        self.engine = engine
        self.others_run = others_run
        self.ended = threading.Event()

    def begin(self, grace_s: float) -> None:
        """Returns at once. `grace_s`: until Serve ends the process."""
        threading.Thread(target=self.run, args=(grace_s,), name="drain", daemon=True).start()

    def run(self, grace_s: float) -> None:
        """Hands over all requests as soon as another replica runs. Until then, it goes on with them."""
        deadline = monotonic() + grace_s - LAST_S
        while monotonic() < deadline and self.engine.stats()["unfinished"] and not self.others_run():
            if self.ended.wait(POLL_S):
                return
        logger.info("This replica ends, and hands over %d requests.", self.engine.stats()["unfinished"])
        self.engine.hand_over()


def drain_with_serve(engine: Engine) -> Drain:
    """A drain that Serve's shutdown of this replica begins. Outside Serve, nothing does."""
    try:
        context = serve.get_replica_context()
    except RayServeException:
        return Drain(engine, lambda: False)

    def others_run() -> bool:
        try:
            application = serve.status().applications.get(context.app_name)
            deployment = application.deployments.get(context.deployment) if application else None
            if deployment is None:  # the application is being deleted
                return False
            # This one is STOPPING. Ray declares an enum of strings, and gives plain strings.
            return any(state == "RUNNING" for state in deployment.replica_states)
        except Exception:  # the controller may be lost, or another one has just begun
            logger.exception("Serve's controller does not say whether another replica runs.")
            return False

    drain = Drain(engine, others_run)
    on_shutdown(drain.begin)
    return drain


async def end(parts: Mapping[str, Any]) -> None:
    """Finishes requests that have begun and lets the others go, without blocking the event loop.

    `parts` are the attributes of a replica; one whose constructor failed may lack some.
    """
    if "drain" in parts:
        parts["drain"].ended.set()
    if "engine" in parts:
        await asyncio.to_thread(parts["engine"].drain, END_S)
    if "profiler" in parts:
        await parts["profiler"].close()
    with suppress(TimeoutError):
        async with asyncio.timeout(END_S):
            await parts["unanswered"].none.wait()
    if "encoders" in parts:
        await asyncio.to_thread(parts["encoders"].shutdown)
    if "compiles" in parts:
        parts["compiles"].close()


class Places:
    """The requests in the engine, by the ingress's names for their places."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.futures: dict[str, Future[Generated]] = {}

    def hold(self, name: str, future: "Future[Generated]") -> "Future[Generated]":
        """Until the request has ended. An older ingress gives no name."""
        if name:
            self.futures[name] = future
            future.add_done_callback(lambda _: self.futures.pop(name, None))
        return future

    def let_go(self, names: Iterable[str]) -> None:
        """A request that has ended has its answer on the way."""
        for future in [self.futures[name] for name in names if name in self.futures]:
            self.engine.let_go(future)


class Unanswered:
    """Requests without an answer: `with` counts one of them."""

    def __init__(self) -> None:
        self.count = 0
        self.none = asyncio.Event()
        self.none.set()

    def __enter__(self) -> None:
        self.count += 1
        self.none.clear()

    def __exit__(self, *error: object) -> None:
        self.count -= 1
        if not self.count:
            self.none.set()
