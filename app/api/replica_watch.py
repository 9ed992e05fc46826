"""What the replicas say of themselves, asked beside the requests, so that nobody who wants to know it waits behind
them. While nobody wants to know, nobody is asked. Knows nothing of HTTP, and of Ray only that none may be running."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence

from ray.serve.exceptions import DeploymentUnavailableError

from app.api.messages import Description

logger = logging.getLogger(f"ray.serve.{__name__}")  # the tree that Serve writes to its files

FRESH_S = 1.0  # asked again only after this
STALE_S = 10.0  # believed for so long, as replicas that are busy may skip a few answers

Ask = Callable[[], Awaitable[Sequence[object]]]


class ReplicaWatch:
    """Keeps the latest descriptions, for as long as they can be believed."""

    def __init__(self, ask: Ask, clock: Callable[[], float] = time.monotonic) -> None:
        """`ask` raises DeploymentUnavailableError where no replica runs."""
        self.ask = ask
        self.clock = clock
        self.latest: tuple[Description, ...] = ()
        self.answered_at = 0.0
        self.refreshing: asyncio.Task[None] | None = None

    @property
    def current(self) -> tuple[Description, ...]:
        """One for each replica that runs, most frequent first; none if none has answered lately."""
        if self.clock() - self.answered_at > STALE_S:
            return ()
        counts = Counter(self.latest)
        return tuple(sorted(self.latest, key=lambda description: -counts[description]))

    async def descriptions(self, patience_s: float, timeout_s: float) -> tuple[Description, ...]:
        """Waits for new answers as long as `patience_s`, and where there are no old ones, as long as `timeout_s`."""
        if not self.latest or self.clock() - self.answered_at > FRESH_S:
            refreshing = self.refresh()
            if self.current:
                await asyncio.wait({refreshing}, timeout=patience_s)
            if not self.current:
                await asyncio.wait({refreshing}, timeout=timeout_s)
        return self.current

    def refresh(self) -> asyncio.Task[None]:
        """One round of questions, which all who want to know share."""
        if self.refreshing is None or self.refreshing.done():
            self.refreshing = asyncio.get_running_loop().create_task(self.round())
        return self.refreshing

    async def round(self) -> None:
        try:
            answers = await self.ask()
        except DeploymentUnavailableError:  # no replica runs, so what they said is no longer true
            self.latest = ()
        except Exception:
            logger.exception("The replicas could not be asked what they are.")
        else:
            if descriptions := [answer for answer in answers if isinstance(answer, Description)]:
                self.latest, self.answered_at = tuple(descriptions), self.clock()
