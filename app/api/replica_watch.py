"""Keeps the latest descriptions of the replicas, and asks for new ones when somebody needs them.

The questions do not wait in the queue of image requests. Knows nothing of HTTP, and of Ray only the error for a
deployment without replicas.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence

from ray.serve.exceptions import DeploymentUnavailableError

from app.api.messages import Description

logger = logging.getLogger(f"ray.serve.{__name__}")  # the tree that Serve writes to its files

FRESH_S = 1.0  # a description is used this long before the next question
STALE_S = 10.0  # a description is valid this long, as busy replicas may miss some questions

Ask = Callable[[], Awaitable[Sequence[object]]]


class ReplicaWatch:
    """The latest descriptions, while they are valid."""

    def __init__(self, ask: Ask, clock: Callable[[], float] = time.monotonic) -> None:
        """`ask` raises DeploymentUnavailableError where no replica runs."""
        self.ask = ask
        self.clock = clock
        self.latest: tuple[Description, ...] = ()
        self.answered_at = 0.0
        self.refreshing: asyncio.Task[None] | None = None

    @property
    def current(self) -> tuple[Description, ...]:
        """One for each running replica, the most frequent first; empty if no replica has answered recently."""
        if self.clock() - self.answered_at > STALE_S:
            return ()
        counts = Counter(self.latest)
        return tuple(sorted(self.latest, key=lambda description: -counts[description]))

    async def descriptions(self, patience_s: float, timeout_s: float) -> tuple[Description, ...]:
        """Waits up to `patience_s` for new answers if there are valid ones, else up to `timeout_s`."""
        if not self.latest or self.clock() - self.answered_at > FRESH_S:
            refreshing = self.refresh()
            if self.current:
                await asyncio.wait({refreshing}, timeout=patience_s)
            if not self.current:
                await asyncio.wait({refreshing}, timeout=timeout_s)
        return self.current

    def refresh(self) -> asyncio.Task[None]:
        """The running round of questions, which all callers share, or a new one."""
        if self.refreshing is None or self.refreshing.done():
            self.refreshing = asyncio.get_running_loop().create_task(self.round())
        return self.refreshing

    async def round(self) -> None:
        try:
            answers = await self.ask()
        except DeploymentUnavailableError:  # no replica runs, so the old answers are wrong
            self.latest = ()
        except Exception:
            logger.exception("The replicas could not be asked for their descriptions.")
        else:
            if descriptions := [answer for answer in answers if isinstance(answer, Description)]:
                self.latest, self.answered_at = tuple(descriptions), self.clock()
