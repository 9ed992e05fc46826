"""Joins the queue and the book: who goes to which replica now, and whether a new request is accepted at all.

Plain code over a clock that the caller reads: the ingress runs it (app/api/routing/dispatch.py), and so does the
simulator (capacity/cluster_simulation.py).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from app.api.errors import deadline_unmeetable, queue_full
from app.api.messages import Report
from app.api.routing.book import Book
from app.api.routing.costs import SizeModel, Work
from app.api.routing.page import AHEAD, FAIR_AHEAD, LEAST_STEPS, Replica, Sent
from app.api.routing.queue import Queue, Ticket
from app.api.routing.rebalance import Move, rebalance
from app.engine.scheduler import AGEING

LEAST_RETRY_S = 0.1
UNKNOWN_S = 1.0  # device-seconds of a request while no replica has reported what its steps take
HURRY_S = 1e-3  # by how much a request goes ahead of another one's that it overtakes inside a replica

Send = Callable[[Ticket, str, Sent, float], None]  # a ticket, the replica, its entry, and how far it goes ahead there


class Router:
    """`max_waiting`: requests that may wait for each replica. `send` is called with a ticket that leaves the queue."""

    def __init__(self, max_waiting: int, send: Send) -> None:
        self.max_waiting = max_waiting
        self.send = send
        self.book = Book()
        self.queue = Queue()
        self.starting: dict[str, float] = {}  # replicas that do not run yet, and when they should
        self.ended = {"queue_full": 0, "deadline": 0, "cancelled": 0}  # requests, under the engine's names for outcomes
        self.rebalanced = 0  # requests that were to change replicas

    def ticket(
        self,
        work: Work,
        now: float,
        key: str | None = None,
        again: bool = False,
        age_s: float = 0.0,
        left: Sequence[int] | None = None,
        siblings: int = 0,
        counted: bool = True,
    ) -> Ticket:
        """`left`: the evaluations that each unfinished image needs, of a request that has begun elsewhere. `siblings`:
        images of the same request that have tickets of their own, of which one is `counted`."""
        rest_s = self.device_s(replace(work, images=siblings)) if siblings else 0.0
        if left is None or not (model := self.model(work)):
            return Ticket(work, self.device_s(work), now, key, again, age_s, rest_s, counted=counted)
        steps = tuple(model.steps(replace(work, steps=count, encodes=0)) for count in left) or (LEAST_STEPS,)
        return Ticket(work, model.device_s(work, sum(steps)), now, key, again, age_s, rest_s, steps, counted)

    def images_together(self, work: Work, now: float, timeout_s: float = math.inf, key: str | None = None) -> int:
        """How many images of a request go to a replica together.

        All, where one replica can run them at once now, or is the only one. Else each goes by itself, and this admits
        them together, or raises as `admit` does.
        """
        replicas = self.usable_for(work, now)
        for replica in replicas:
            replica.move_on(now)
        free = max((replica.rows_at_once - replica.rows_held() for replica in replicas), default=0)
        if work.images == 1 or len(replicas) < 2 or free >= work.rows * work.images:
            return work.images
        self.admit(self.ticket(work, now, key), timeout_s, now)
        return 1

    def model(self, work: Work) -> SizeModel | None:
        return self.book.models().get(work.size)

    def device_s(self, work: Work) -> float:
        model = self.model(work)
        return UNKNOWN_S * work.images if model is None else model.device_s(work)

    def admit(self, ticket: Ticket, timeout_s: float, now: float) -> None:
        """Raises ApiError if the queue is full, or if the request cannot be answered in time."""
        replicas = max(1, len(self.book.replicas) + len(self.starting))
        if len(self.queue) >= self.max_waiting * replicas:
            self.ended["queue_full"] += 1
            raise queue_full(self.next_place_s(now))
        if timeout_s < math.inf and (estimate_s := self.answer_s(ticket, now)) > timeout_s:
            self.ended["deadline"] += 1
            last_s = self.answer_s(ticket, now, last=True)
            raise deadline_unmeetable(estimate_s, timeout_s, max(last_s - timeout_s, LEAST_RETRY_S))

    def answer_s(self, ticket: Ticket, now: float, last: bool = False) -> float:
        """Estimates when a new request is answered, if no others arrive. With `last` it overtakes none.

        The work before it fills the replicas like water: each takes from when it is free, starting ones too.
        """
        model = self.model(ticket.work)
        free_s = []
        for replica in self.book.usable(now):
            replica.move_on(now)
            free_s.append(replica.backlog_s())
        free_s += [max(0.0, ready - now) for ready in self.starting.values()]
        if model is None or not free_s:
            return 0.0  # nothing is known, so nothing speaks against it
        before_s = self.queue.total_s() if last else self.queue.ahead_s(ticket)
        if before_s <= 0 and not last:
            own_s = [
                replica.added_s(ticket.work, ticket.order_s, ticket.left)[0]
                for replica in self.usable_for(ticket.work, now)
            ]
            if own_s:
                return min(own_s)
        return level(free_s, before_s) + model.alone_s(ticket.work)

    def next_place_s(self, now: float) -> float:
        """Estimates the seconds until the queue has room: replicas take the waiting requests one after the other."""
        waiting, replicas = len(self.queue), max(1, len(self.book.usable(now)))
        return max(LEAST_RETRY_S, self.queue.total_s() / replicas / max(1, waiting))

    def usable_for(self, work: Work, now: float) -> list[Replica]:
        return [replica for replica in self.book.usable(now) if work.size in replica.models]

    def pump(self, now: float) -> None:
        """Sends what has a place. Call it whenever a request came, an answer came, or replicas changed."""
        sent = True
        while sent and self.queue.waiting:
            sent = any(self.try_send(ticket, now) for ticket in list(self.queue.in_order()))

    def try_send(self, ticket: Ticket, now: float) -> bool:
        replica = self.choose(ticket, now, math.inf if ticket.again else AHEAD)
        hurry_s = 0.0
        if self.below_share(ticket):
            replica = replica or self.choose(ticket, now, FAIR_AHEAD)
            if replica:
                hurry_s = overtaking_s(replica, ticket)
        if replica is None:
            return False
        self.queue.take(ticket)
        sent = self.book.send(replica, ticket.work, ticket.order_s - hurry_s, ticket.key, now, ticket.left)
        self.send(ticket, replica.id, sent, AGEING * (now - ticket.since) + hurry_s - ticket.rest_s)
        return True

    def choose(self, ticket: Ticket, now: float, ahead: float) -> Replica | None:
        return self.book.choose(ticket.work, ticket.order_s, now, ahead, ticket.left)

    def below_share(self, ticket: Ticket) -> bool:
        """Whether the ticket's key has fewer rows in the replicas than its share, among several keys."""
        active = self.queue.active
        if len(active) < 2:
            return False
        rows = sum(replica.rows_at_once for replica in self.book.replicas.values())
        return self.book.rows_of(ticket.key) + ticket.work.rows * ticket.work.images <= rows / len(active)

    def answered(self, sent: Sent) -> None:
        self.book.remove(sent)
        self.queue.answered(sent.key)

    def rebalance(self, now: float) -> list[Move]:
        """The requests that should change replicas now. Nothing moves while some wait here: they go first."""
        moves = [] if self.queue.waiting else rebalance(self.book, now)
        self.rebalanced += len(moves)
        return moves

    def report(self, report: Report, now: float) -> None:
        self.starting.pop(report.replica, None)
        self.book.report(report, now)

    def stats(self, now: float) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        for replica in self.book.replicas.values():
            replica.move_on(now)
        return {
            "waiting": len(self.queue),
            "waiting_s": self.queue.total_s(),
            "ended": dict(self.ended),
            "rebalanced": self.rebalanced,
            "oldest_s": max((now - ticket.since for ticket in self.queue), default=0.0),
            "replicas": {name: page(replica, now) for name, replica in sorted(self.book.replicas.items())},
            "starting": {name: max(0.0, ready - now) for name, ready in sorted(self.starting.items())},
        }


def page(replica: Replica, now: float) -> Mapping[str, Any]:
    return {
        "requests": len(replica.sent),
        "rows": replica.rows_held(),
        "backlog_s": replica.backlog_s(),
        "usable": replica.usable(now),
    }


def overtaking_s(replica: Replica, ticket: Ticket) -> float:
    """How far a request must go ahead, in device-seconds, to pass all requests of other keys that the replica has."""
    others = [replica.rank(sent) for sent in replica.sent if sent.key != ticket.key]
    return max(0.0, ticket.rank - min(others) + HURRY_S) if others else 0.0


def level(free_s: list[float], work_s: float) -> float:
    """When replicas that are free at these times have done `work_s` device-seconds together.

    Without work it is the first time of all.
    """
    free_s = sorted(free_s)
    for count, following in enumerate([*free_s[1:], math.inf], 1):
        ends = (work_s + sum(free_s[:count])) / count
        if ends <= following:
            return ends
    raise AssertionError("the last one follows for ever")
