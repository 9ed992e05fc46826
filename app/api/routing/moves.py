"""Has replicas let requests go that are to change replicas. The requests themselves come back to the ingress."""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from contextvars import Context

logger = logging.getLogger(f"ray.serve.{__name__}")  # the tree that Serve writes to its files

LetGo = Callable[[str, Sequence[str]], Coroutine[None, None, object]]  # a replica, and its places


class Moves:
    def __init__(self, let_go: LetGo) -> None:
        self.let_go = let_go
        self.calls: set[asyncio.Task[None]] = set()

    def begin(self, replica: str, places: Sequence[str]) -> None:
        """In a context of its own, as the call belongs to no request."""
        call = asyncio.get_running_loop().create_task(self.call(replica, places), context=Context())
        self.calls.add(call)
        call.add_done_callback(self.calls.discard)

    async def call(self, replica: str, places: Sequence[str]) -> None:
        try:
            await self.let_go(replica, places)
        except Exception as error:  # such as a replica that has just ended; its requests end or go on there
            logger.warning("Replica %s did not let %d requests go: %r", replica, len(places), error)
