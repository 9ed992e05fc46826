"""Several replicas on a virtual clock: real engines behind the ingress's own queue, book and autoscaling policy.

No real time passes, and nothing of Ray runs. A replica is an engine over a device that takes as long as a table says
(capacity/simulated_replica.py). Requests reach it through the router of app/api/routing/, or as Serve's default router
would send them: at once, to the replica with fewer requests of two drawn at random. Answers, reports and requests take
`way_s` each way. The work of the host is not included.
"""

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt

from app.api.errors import ApiError
from app.api.routing.costs import Work
from app.api.routing.page import Sent
from app.api.routing.queue import Ticket
from app.api.routing.router import Router
from app.engine.errors import HandedOver
from app.engine.request import Generated
from app.types import Generation, Resumed
from capacity.simulated_replica import MOST_WAITING, MakePipeline, SimulatedReplica, report_of

Routing = Literal["book", "serve"]
ARRIVED = 10_000  # arrivals that a policy may look back on


@dataclass(frozen=True)
class Arrival:
    at: float
    generation: Generation
    key: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of the requests, in the order of their arrival. NaN: refused."""

    latencies: npt.NDArray[np.float64]
    waits: npt.NDArray[np.float64]  # in the ingress
    replica_s: float  # seconds of replicas, starting ones included
    ended: float


class Cluster:
    """A simulation. `make_pipeline` gives the device of a new replica on its clock."""

    def __init__(
        self,
        make_pipeline: MakePipeline,
        replicas: int,
        *,
        routing: Routing = "book",
        max_waiting: int = MOST_WAITING,
        gain: float = 0.05,
        images_at_once: int | None = None,
        start_s: float = 0.0,
        way_s: float = 0.002,
        seed: int = 0,
    ) -> None:
        self.make_pipeline = make_pipeline
        self.routing = routing
        self.gain, self.images_at_once = gain, images_at_once
        self.start_s, self.way_s = start_s, way_s
        self.random = random.Random(seed)
        self.router = Router(max_waiting, self.place)
        self.now = 0.0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.numbers = itertools.count()
        self.replicas: dict[str, SimulatedReplica] = {}
        self.gone_s = 0.0
        self.wanted = replicas
        self.unfinished = 0
        self.arrived: deque[tuple[float, float]] = deque(maxlen=ARRIVED)  # when, and how many device-seconds
        self.requests: dict[Ticket, tuple[int, Arrival, Resumed | None]] = {}
        self.held: dict[Sent, tuple[SimulatedReplica, Future[Generated]]] = {}
        self.moves = 0
        self.parts: dict[int, int] = {}  # of a request, that are not answered
        self.latencies: npt.NDArray[np.float64] = np.empty(0)
        self.waits: npt.NDArray[np.float64] = np.empty(0)
        for _ in range(replicas):
            self.start(0.0)

    # Replicas.

    def start(self, start_s: float | None = None) -> None:
        """Adds a replica, which is ready after `start_s`."""
        name = f"replica-{next(self.numbers)}"
        ready = self.now + (self.start_s if start_s is None else start_s)
        self.replicas[name] = SimulatedReplica.started_at(
            name, self.now, ready, self.make_pipeline, self.gain, self.images_at_once
        )
        self.router.starting[name] = ready
        self.at(ready, partial(self.ready, name))

    def ready(self, name: str) -> None:
        self.router.starting.pop(name, None)
        if name in self.replicas:
            self.router.book.list(self.running(), self.now)
            self.router.report(report_of(self.replicas[name]), self.now)
            self.pump()

    def scale(self, wanted: int) -> None:
        """Starts or stops replicas. The youngest go first, as those that start may not be needed any more."""
        self.wanted = wanted
        alive = [name for name, replica in self.replicas.items() if not replica.draining]
        for _ in range(wanted - len(alive)):
            self.start()
        for name in alive[wanted:]:
            self.stop(name)

    def stop(self, name: str) -> None:
        """A replica finishes what it has, and gets nothing more."""
        replica = self.replicas[name]
        replica.draining = True
        self.router.book.list(self.running(), self.now)
        self.router.starting.pop(name, None)
        if replica.requests == 0:
            self.end(replica)

    def end(self, replica: SimulatedReplica) -> None:
        replica.ended = self.now
        self.gone_s += self.now - replica.started
        del self.replicas[replica.name]
        self.router.book.list(self.running(), self.now)

    def running(self) -> list[str]:
        """Ready replicas that may get requests."""
        return [name for name, replica in self.replicas.items() if replica.ready <= self.now and not replica.draining]

    @property
    def replica_s(self) -> float:
        return self.gone_s + sum(self.now - replica.started for replica in self.replicas.values())

    # Requests.

    def arrive(self, number: int, arrival: Arrival) -> None:
        work = Work.of(arrival.generation)
        self.arrived.append((self.now, self.router.device_s(work)))
        if self.routing == "serve":
            self.parts[number] = 1
            self.send_as_serve(number, arrival)
            return
        try:
            images = self.router.images_together(work, self.now, key=arrival.key)
            if images == work.images:
                self.router.admit(self.router.ticket(work, self.now, arrival.key), math.inf, self.now)
        except ApiError:
            self.unfinished -= 1
            return
        self.parts[number] = -(-work.images // images)
        for part in arrival.generation.parts(images):
            siblings = work.images - part.n
            ticket = self.router.ticket(Work.of(part), self.now, arrival.key, siblings=siblings)
            self.add(ticket, number, replace(arrival, generation=part), None)

    def come_again(self, number: int, arrival: Arrival, resumed: Resumed | None) -> None:
        """A request that has left its replica."""
        left = [image.steps_left for image in resumed.images] if resumed else None
        age_s = self.now - arrival.at
        ticket = self.router.ticket(Work.of(arrival.generation), self.now, arrival.key, True, age_s, left)
        self.add(ticket, number, arrival, resumed)

    def add(self, ticket: Ticket, number: int, arrival: Arrival, resumed: Resumed | None) -> None:
        self.requests[ticket] = number, arrival, resumed
        self.router.queue.add(ticket)
        self.pump()

    def pump(self) -> None:
        """As the ingress does: sends what has a place, and has requests change replicas."""
        self.router.pump(self.now)
        for move in self.router.rebalance(self.now):
            self.moves += 1
            self.at(self.now + self.way_s, partial(self.let_go, move.sent))

    def let_go(self, sent: Sent) -> None:
        if sent in self.held:
            replica, future = self.held[sent]
            with replica.at(self.now):
                replica.engine.let_go(future)

    def send_as_serve(self, number: int, arrival: Arrival) -> None:
        """The power of two choices, by numbers of requests, as Serve's default router compares them."""
        names = self.running()
        if not names:
            self.at(self.now + 0.1, partial(self.send_as_serve, number, arrival))
            return
        pair = self.random.sample(names, min(2, len(names)))
        name = min(pair, key=lambda name: self.replicas[name].requests)
        self.submit(name, number, arrival, 0.0, None)

    def place(self, ticket: Ticket, name: str, sent: Sent, ahead_s: float) -> None:
        number, arrival, resumed = self.requests.pop(ticket)
        if not ticket.again:
            self.waits[number] = self.now - arrival.at
        self.submit(name, number, arrival, ahead_s, sent, resumed, ticket.again)

    def submit(
        self,
        name: str,
        number: int,
        arrival: Arrival,
        ahead_s: float,
        sent: Sent | None,
        resumed: Resumed | None = None,
        again: bool = False,
    ) -> None:
        replica = self.replicas[name]
        replica.requests += 1

        def arrive() -> None:
            with replica.at(self.now):
                future = replica.engine.submit(
                    arrival.generation,
                    ahead_s=ahead_s,
                    resumed=resumed,
                    beyond_limits=again,
                    age_s=self.now - arrival.at if again else 0.0,
                )
            if sent is not None:
                self.held[sent] = replica, future
            future.add_done_callback(lambda future: self.at(replica.clock.now + self.way_s, partial(answered, future)))

        def answered(future: "Future[Generated]") -> None:
            replica.requests -= 1
            moved = future.exception()
            if not isinstance(moved, HandedOver):
                self.parts[number] -= 1
                if not self.parts[number]:
                    self.latencies[number] = self.now - arrival.at
                    self.unfinished -= 1
            if sent is not None:
                del self.held[sent]
                self.router.answered(sent)
                if name in self.router.book.replicas:
                    self.router.report(report_of(replica), self.now)
            if isinstance(moved, HandedOver):
                self.come_again(number, arrival, moved.resumed)
            elif sent is not None:
                self.pump()
            if replica.draining and replica.requests == 0:
                self.end(replica)

        self.at(self.now + self.way_s, arrive)

    # Time.

    def at(self, moment: float, event: Callable[[], None]) -> None:
        heapq.heappush(self.events, (moment, next(self.numbers), event))

    def run(self, arrivals: Sequence[Arrival], until: float = math.inf) -> Outcome:
        self.latencies = np.full(len(arrivals), np.nan)
        self.waits = np.zeros(len(arrivals))
        self.unfinished = len(arrivals)
        for number, arrival in enumerate(arrivals):
            self.at(arrival.at, partial(self.arrive, number, arrival))
        idle: set[str] = set()
        while self.now < until:
            event = self.events[0][0] if self.events else math.inf
            fetch, fetching = min(
                ((r.fetcher.due[0][0], n) for n, r in self.replicas.items() if r.fetcher.due), default=(math.inf, "")
            )
            tick, ticking = min(
                ((r.clock.now, n) for n, r in self.replicas.items() if n not in idle), default=(math.inf, "")
            )
            if min(event, fetch, tick) == math.inf:
                break
            if event <= min(fetch, tick):
                self.now = max(self.now, event)
                heapq.heappop(self.events)[2]()
                idle.clear()
            elif fetch <= tick:
                self.replicas[fetching].fetcher.run_until(fetch)
                idle.discard(fetching)
            else:
                replica = self.replicas[ticking]
                if replica.engine.tick():
                    replica.clock.now += max(0.0, replica.engine.pause_s())
                else:
                    idle.add(ticking)
        return Outcome(self.latencies, self.waits, self.replica_s, self.now)
