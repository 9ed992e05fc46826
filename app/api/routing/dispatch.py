"""The router of the ingress: requests wait here for their places, on the event loop of the routes.

While requests wait or run, it polls the replicas. It counts on what they report, and on which of them Serve says run.
Knows nothing of HTTP, and of Ray nothing but the functions that it gets.
"""

import asyncio
import itertools
import logging
import time
import uuid
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from contextvars import Context
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from app.api.errors import ApiError
from app.api.messages import Progress, QueueState, Report
from app.api.routing.arriving import ArrivingLoad
from app.api.routing.costs import Work
from app.api.routing.moves import LetGo, Moves
from app.api.routing.page import Sent
from app.api.routing.queue import Ticket
from app.api.routing.router import Router
from app.api.routing.starts import Starts
from app.types import Generation

logger = logging.getLogger(f"ray.serve.{__name__}")  # the tree that Serve writes to its files

POLL_S, WAITING_POLL_S = 1.0, 0.25  # between two polls: while requests run, and while some wait for a place

Poll = Callable[[], Coroutine[None, None, object]]


@dataclass(eq=False)
class Place:
    """A request's place in a replica. Leave it when the answer has come or never will."""

    dispatch: "Dispatch"
    ticket: Ticket
    replica: str
    sent: Sent
    ahead_s: float  # device-seconds by which it goes ahead there
    waited_s: float  # in the ingress
    id: str  # by which the ingress lets the replica know which request it means
    left: bool = False
    moving: bool = False  # the replica is to let it go, as it ends sooner in another one

    def leave(self) -> None:
        if not self.left:
            self.left = True
            self.dispatch.answered(self)

    def __enter__(self) -> "Place":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.leave()


class Dispatch:
    """`poll` asks the replicas for reports, which come in through `reported`. `wake` waits for some replica to answer,
    as a request does, so that Serve starts the first one; it raises ApiError if none will start. `list_replicas` names
    all replicas that are up, starting ones too. `let_go` has a replica end places, whose requests then come again."""

    def __init__(
        self,
        max_waiting: int,
        poll: Poll,
        wake: Poll,
        list_replicas: Callable[[], Coroutine[None, None, Iterable[str]]],
        let_go: LetGo,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.router = Router(max_waiting, self._send)
        self.poll, self.wake, self.list_replicas = poll, wake, list_replicas
        self.clock = clock
        self.id = uuid.uuid4().hex[:8]
        self.waiting: dict[Ticket, asyncio.Future[Place]] = {}
        self.generations: dict[Ticket, Generation] = {}  # of those
        self.places: set[Place] = set()
        self.numbers = itertools.count()
        self.moves = Moves(let_go)
        self.arriving = ArrivingLoad()
        self.starts = Starts()
        self.hurry = asyncio.Event()  # a request waits, so the next poll comes sooner
        self.lacking = asyncio.Event()  # a request has come, and no replica is known: the next poll does not wait
        self.polling: asyncio.Task[None] | None = None
        self.waking: asyncio.Task[None] | None = None

    async def enter(
        self,
        generation: Generation,
        timeout_s: float,
        key: str | None = None,
        again: bool = False,
        age_s: float = 0.0,
        left: Sequence[int] | None = None,
        siblings: int = 0,
        counted: bool = True,
    ) -> Place:
        """Waits for a place. Raises ApiError if the queue is full or the time does not suffice.

        A request that comes `again` has been admitted before. It goes first, and to a full replica too.
        `age_s`: since it came first. `left`: the steps of each unfinished image of one that has begun.
        `siblings`: images of the same request that come apart from it; all were admitted together, and one of
        them is `counted` in the statistics.
        """
        now = self.clock()
        ticket = self.router.ticket(Work.of(generation), now, key, again, age_s, left, siblings, counted)
        if not again:
            self.arriving.note(now, ticket.device_s)
        if not again and not siblings:
            self.router.admit(ticket, timeout_s, now)
        future: asyncio.Future[Place] = asyncio.get_running_loop().create_future()
        self.waiting[ticket], self.generations[ticket] = future, generation
        self.router.queue.add(ticket)
        self.router.pump(now)
        if not future.done():
            self.hurry.set()
            if not self.router.book.usable(now):
                self.lacking.set()
        self.keep_polling()
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and not future.exception():
                future.result().leave()
            else:
                self.router.ended["cancelled"] += counted
            raise
        finally:
            self.waiting.pop(ticket, None)
            self.generations.pop(ticket, None)
            self.router.queue.remove(ticket)

    def _send(self, ticket: Ticket, replica: str, sent: Sent, ahead_s: float) -> None:
        id = f"{self.id}-{next(self.numbers)}"
        place = Place(self, ticket, replica, sent, ahead_s, self.clock() - ticket.since, id)
        self.places.add(place)
        future = self.waiting[ticket]
        if future.done():  # the client has just gone
            place.leave()
        else:
            future.set_result(place)

    def answered(self, place: Place) -> None:
        self.places.discard(place)
        self.router.answered(place.sent)
        self.pump()

    def pump(self) -> None:
        """Sends what has a place. If nothing waits, requests may change replicas."""
        self.router.pump(self.clock())
        moving = {move.sent for move in self.router.rebalance(self.clock())}
        sources: dict[str, list[str]] = {}
        for place in self.places if moving else ():
            if place.sent in moving:
                place.moving = True
                sources.setdefault(place.replica, []).append(place.id)
        for source, ids in sources.items():
            self.moves.begin(source, ids)

    def avoid(self, replica: str) -> None:
        """The replica has just failed a request."""
        self.router.book.avoid(replica, self.clock())

    def gone(self, replica: str) -> None:
        """The replica does not run any more."""
        self.router.book.list(self.router.book.replicas.keys() - {replica}, self.clock())

    def reported(
        self,
        reports: Iterable[Report],
        running: Iterable[str] | None = None,
        *,
        polled: bool = False,
        new: bool = False,
    ) -> None:
        """Takes reports in. `running` are the replicas that get requests, where that is known. Else only a replica that
        is known counts, unless it may be `new`: one that ends still answers."""
        now, book = self.clock(), self.router.book
        if running is not None:
            running = {*running}
            self.starts.have_run |= running
            book.list(running, now)
        new = new or (polled and running is None)
        reports = [report for report in reports if new or report.replica in book.replicas]
        for report in reports:
            self.router.report(report, now)
            self.starts.start_s = report.start_s or self.starts.start_s
        if polled:
            for name in book.replicas.keys() - {report.replica for report in reports}:
                book.replicas[name].missed += 1
        self.pump()

    def keep_polling(self) -> None:
        if self.polling is None or self.polling.done():
            self.polling = asyncio.get_running_loop().create_task(self._keep_polling(), context=Context())

    # In a context of its own: a handle call in the context of a request would count as that request's.
    async def _keep_polling(self) -> None:
        while self.waiting or self.places:
            self.lacking.clear()
            for part in (self.look_for_replicas, self.poll, self.see_starting):
                try:
                    await part()
                except Exception:  # such as a cluster whose head does not answer for a while
                    logger.exception("The replicas could not be polled.")
            with suppress(TimeoutError):
                async with asyncio.timeout(WAITING_POLL_S):
                    await self.lacking.wait()
            self.hurry.clear()
            if not self.waiting:
                with suppress(TimeoutError):
                    async with asyncio.timeout(POLL_S - WAITING_POLL_S):
                        await self.hurry.wait()

    async def look_for_replicas(self) -> None:
        """A request that waits in the ingress wakes nobody up, so something must wait where Serve sees it."""
        if not self.router.book.usable(self.clock()) and (self.waking is None or self.waking.done()):
            self.waking = asyncio.get_running_loop().create_task(self._wake(), context=Context())

    async def _wake(self) -> None:
        try:
            await self.wake()
        except ApiError as error:
            if error.status == 504:
                return
            for future in self.waiting.values():
                if not future.done():
                    future.set_exception(ApiError(*error.args))

    async def see_starting(self) -> None:
        """Notes the replicas that are on their way, and when they should be ready."""
        if not self.waiting:
            return
        names = {*await self.list_replicas()}
        self.router.starting = self.starts.ready_at(names, self.router.book.replicas.keys(), self.clock())

    def progress(self, generation: Generation) -> Progress | None:
        """How far a request is that waits; None for any other."""
        ticket = next((ticket for ticket, waiting in self.generations.items() if waiting is generation), None)
        if ticket is None or self.waiting[ticket].done():
            return None
        left_s, steps = self.router.answer_s(ticket, self.clock()), ticket.work.images * ticket.work.steps
        return Progress("waiting", self.router.queue.ahead(ticket), 0, steps, left_s)

    def state(self) -> QueueState:
        now, queue = self.clock(), self.router.queue
        return QueueState(self.id, len(queue), queue.total_s(), self.arriving.a_second(now))

    def stats(self) -> dict[str, Any]:
        return {**self.router.stats(self.clock()), "arriving": self.state().arriving}
