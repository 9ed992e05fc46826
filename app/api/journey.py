"""One client's request on its way through replicas: one may hand it over to the next, and a lost one begins again.

Knows nothing of HTTP, nor of how a replica is chosen.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

from app.api.errors import ApiError
from app.api.messages import Accepted, ImageRequest, Images, Moved, Preview, Progress
from app.api.replica_calls import (
    Cancellable,
    Item,
    Items,
    Pending,
    ReplicaCancelled,
    ReplicaLost,
    cancelled_by_replica,
    failures,
)

MOST_RESTARTS = 1  # a request that ends its replica must not end all of them
GONE_S = 0.25  # when a client goes, Ray cancels the replica's call and ours, in any order
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0  # before the next try, while replicas take no requests

Unary = Pending[Images | Moved | ApiError]
Send = Callable[[ImageRequest], Awaitable[Unary]]
SendStream = Callable[[ImageRequest], Awaitable[Items]]


class Journey:
    """Where a request is, and how often it has changed replicas."""

    def __init__(self, request: ImageRequest) -> None:
        self.request = request  # as the next replica gets it
        self.timeout_s = request.timeout_s
        self.began = asyncio.get_running_loop().time()
        self.deadline = self.began + request.timeout_s
        self.response: Cancellable = Nothing()
        self.moves = self.restarts = 0
        self.pause_s = FIRST_PAUSE_S

    def cancel(self) -> None:
        """Stops the work, wherever it is."""
        self.response.cancel()

    async def answer(self, send: Send) -> Images:
        while True:
            try:
                with failures(self, self.timeout_s):
                    async with asyncio.timeout_at(self.deadline):
                        self.response = response = await send(self.request)
                        answer = await response
                        if isinstance(answer, Moved):
                            await self.move(answer)
            except ReplicaLost as lost:
                await self.restart(lost)
                continue
            if isinstance(answer, ApiError):
                raise answer
            if isinstance(answer, Images):
                return self.arrived(answer)

    async def move(self, moved: Moved) -> None:
        """Raises ReplicaLost for a request that must begin again."""
        self.response = Nothing()
        if moved.lost:
            raise ReplicaLost(503, "The replica was lost; try again.", None, "replica_lost", 5.0)
        if moved.accepted:
            self.moves += 1
            self.pause_s = FIRST_PAUSE_S
            self.go_on(replace(self.request, resumed=moved.resumed, moved=True))
        else:  # the same replica may be chosen again until Serve has told everybody that it goes
            await asyncio.sleep(self.pause_s)
            self.pause_s = min(2 * self.pause_s, LONGEST_PAUSE_S)
            self.go_on(self.request)

    async def restart(self, lost: ReplicaLost) -> None:
        """The same seed makes the same images elsewhere. Raises `lost` where that was tried already."""
        self.response.cancel()
        self.response = Nothing()
        if self.restarts == MOST_RESTARTS:
            raise lost
        if isinstance(lost, ReplicaCancelled):
            await asyncio.sleep(GONE_S)  # cancelled here, nothing begins again for a client that has gone
        self.restarts += 1
        self.go_on(replace(self.request, resumed=None, moved=True))

    def go_on(self, request: ImageRequest) -> None:
        now = asyncio.get_running_loop().time()
        left_s = max(self.deadline - now, 0.0)
        self.request = replace(request, age_s=now - self.began, timeout_s=left_s)

    def arrived(self, images: Images) -> Images:
        """Adds what the client may want to know of the way."""
        counts = {"moves": self.moves, "restarts": self.restarts}
        return replace(images, facts={**images.facts, **{name: count for name, count in counts.items() if count}})


class StreamedJourney(Journey):
    """Its client gets each item once, however many replicas send it."""

    def __init__(self, request: ImageRequest, send: SendStream) -> None:
        super().__init__(request)
        self.send = send
        self.items: Items | None = None
        self.accepted = False
        self.previews = 0  # passed on

    async def next_item(self) -> Accepted | Progress | Preview | Images:
        while True:
            try:
                with failures(self, self.timeout_s):
                    async with asyncio.timeout_at(self.deadline):
                        item = await self.item()
            except ReplicaLost as lost:
                self.items = None
                await self.restart(lost)
                continue
            if isinstance(item, ApiError):
                raise item
            if isinstance(item, Images):
                return self.arrived(item)
            if isinstance(item, Progress):
                return item
            if isinstance(item, Accepted) and not self.accepted:
                self.accepted = True
                return item
            if isinstance(item, Preview) and item.index >= self.previews:
                self.previews = item.index + 1
                return item

    async def item(self) -> Item:
        """The next item of the replica that has the request now."""
        if self.items is None:
            self.response = self.items = await self.send(self.request)
        item = await anext(self.items, None)
        if item is None:  # a replica that Serve ends may end its stream like this
            raise cancelled_by_replica()
        if isinstance(item, Moved):
            self.items = None
            await self.move(item)
        return item


class Nothing:
    """In place of a response while there is none."""

    def cancel(self) -> None:
        pass
