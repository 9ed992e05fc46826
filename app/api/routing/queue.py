"""Requests that no replica has yet: in which order they go, fair between API keys. Plain code.

Within a key the request with the least remaining work goes first, with ageing. Between keys, the one that has had the
least device time goes first; a key that was idle has no claim to time that it did not use.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from app.api.routing.costs import Work
from app.engine.scheduler import AGEING


@dataclass(eq=False)
class Ticket:
    """A request that waits. `device_s` is what it costs, by the cost model of a typical replica."""

    work: Work
    device_s: float
    since: float
    key: str | None = None
    again: bool = False  # a replica had it, or was meant to: it goes first
    age_s: float = 0.0  # before it came again
    rest_s: float = 0.0  # device-seconds of the request's other images, where it is one of several parts
    left: tuple[float, ...] | None = None  # the steps of each unfinished image, of a request that has begun
    counted: bool = True  # False: another part of the same request counts among those that wait

    @property
    def order_s(self) -> float:
        """What counts beside its device-seconds."""
        return AGEING * (self.since - self.age_s) + self.rest_s

    @property
    def rank(self) -> float:
        """Remaining device-seconds with ageing, as inside the engine. The lowest goes first."""
        return self.device_s + self.order_s


class Queue:
    def __init__(self) -> None:
        self.waiting: dict[str | None, list[Ticket]] = {}
        self.used_s: dict[str | None, float] = {}  # device-seconds of each active key, from a common start
        self.held: Counter[str | None] = Counter()  # requests that replicas have

    def __len__(self) -> int:
        """The requests: one in parts counts once."""
        return sum(ticket.counted for ticket in self)

    def __iter__(self) -> Iterator[Ticket]:
        for tickets in self.waiting.values():
            yield from tickets

    @property
    def active(self) -> set[str | None]:
        """Keys with requests that wait or that replicas have."""
        return self.waiting.keys() | {key for key, count in self.held.items() if count}

    def add(self, ticket: Ticket) -> None:
        active = self.active
        if ticket.key not in active:
            least_s = min((self.used_s.get(key, 0.0) for key in active), default=0.0)
            self.used_s = {key: used_s for key, used_s in self.used_s.items() if key in active}
            self.used_s[ticket.key] = least_s
        self.waiting.setdefault(ticket.key, []).append(ticket)

    def remove(self, ticket: Ticket) -> bool:
        tickets = self.waiting.get(ticket.key, [])
        if ticket not in tickets:
            return False
        tickets.remove(ticket)
        if not tickets:
            del self.waiting[ticket.key]
        return True

    def take(self, ticket: Ticket) -> None:
        """The ticket goes to a replica; its key has used so much more."""
        self.remove(ticket)
        self.held[ticket.key] += 1
        self.used_s[ticket.key] = self.used_s.get(ticket.key, 0.0) + ticket.device_s

    def answered(self, key: str | None) -> None:
        self.held[key] -= 1
        if self.held[key] <= 0:
            del self.held[key]

    def in_order(self) -> Iterator[Ticket]:
        """Those that come again, then the first ticket of each key, the key with the least used time first."""
        yield from (ticket for ticket in self if ticket.again)
        for key in sorted(self.waiting, key=lambda key: self.used_s.get(key, 0.0)):
            yield min(self.waiting[key], key=lambda ticket: ticket.rank)

    def ahead_s(self, ticket: Ticket) -> float:
        """Device-seconds of the waiting requests that go before this one, if no others arrive."""
        own_s = sum(other.device_s for other in self.before(ticket))
        others_s = (
            min(sum(other.device_s for other in tickets), own_s + ticket.device_s)
            for key, tickets in self.waiting.items()
            if key != ticket.key
        )
        return own_s + sum(others_s)

    def ahead(self, ticket: Ticket) -> int:
        """How many requests go before this one: of another key at most one more than of its own."""
        own = len(self.before(ticket))
        others = (min(len(tickets), own + 1) for key, tickets in self.waiting.items() if key != ticket.key)
        return own + sum(others)

    def before(self, ticket: Ticket) -> list[Ticket]:
        """Those of the same key."""
        tickets = self.waiting.get(ticket.key, ())
        return [other for other in tickets if other is not ticket and other.rank <= ticket.rank]

    def total_s(self) -> float:
        return sum(ticket.device_s for ticket in self)
