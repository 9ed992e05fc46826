"""A streamed request whose client is told its place while it waits in the ingress, before any replica has it.

Knows nothing of HTTP, nor of how places are given.
"""

import asyncio
from collections.abc import Callable

from app.api.journey import StreamedJourney
from app.api.messages import Accepted, Images, Preview, Progress

PROGRESS_S = 0.5  # between two items that tell the place
ADMITTED_S = 0.02  # between two looks at whether the request was admitted


class FollowedJourney:
    """`place` returns the progress of a request that waits in the ingress, and None before and after."""

    def __init__(self, journey: StreamedJourney, place: Callable[[], Progress | None]) -> None:
        self.journey = journey
        self.place = place
        self.accepted = asyncio.ensure_future(journey.next_item())

    async def admitted(self) -> None:
        """Returns once the request waits in the ingress or a replica has it. Raises ApiError for a refusal."""
        try:
            while not self.accepted.done() and self.place() is None:
                await asyncio.wait({self.accepted}, timeout=ADMITTED_S)
        except asyncio.CancelledError:  # the client has gone
            self.cancel()
            raise
        if self.accepted.done():
            self.accepted.result()

    async def next_item(self) -> Progress | Preview | Images:
        while not self.accepted.done():
            if progress := self.place():
                await asyncio.wait({self.accepted}, timeout=PROGRESS_S)
                return progress
            await asyncio.wait({self.accepted}, timeout=ADMITTED_S)
        self.accepted.result()
        item = await self.journey.next_item()
        assert not isinstance(item, Accepted)
        return item

    def cancel(self) -> None:
        self.accepted.cancel()
        self.journey.cancel()
