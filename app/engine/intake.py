"""Accepts or refuses requests, and keeps the unfinished ones. Knows nothing of devices.

Clients' threads and the engine's thread meet here, under one lock.
"""

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from app.engine.arrival_rate import ArrivalRate
from app.engine.errors import DeadlineUnmeetable, HandedOver, QueueFull
from app.engine.moving import resumed_of
from app.engine.progress import Progress, progress_of
from app.engine.request import Generated, Request, Status
from app.engine.scheduler import answer_s, backlog_s, in_order, place_s, virtual_time_after_idling
from app.engine.size_queue import Queued, SizeQueue
from app.types import Generation, InvalidField, Size

LEAST_RETRY_S = 0.1
MOST_LISTED = 100  # requests in a line of the log


class Intake:
    def __init__(self, queues: Mapping[Size, SizeQueue], max_waiting: int, clock: Callable[[], float]):
        self.queues = queues
        self.max_waiting = max_waiting
        self.clock = clock
        # Guards the arrivals, the queues and the status of requests; notified when there may be something to do.
        self.changed = threading.Condition()
        self.arrivals: list[Request] = []
        self.unfinished: set[Request] = set()
        self._arrival_rate = ArrivalRate()
        self._outcomes = dict.fromkeys(("completed", "cancelled", "moved", "failed", "queue_full", "deadline"), 0)

    def waiting(self) -> list[Request]:
        return [request for request in self.unfinished if request.status is Status.WAITING]

    def declared_size(self, generation: Generation) -> Size:
        """Raises InvalidField for a size that is not compiled."""
        size = (generation.width, generation.height)
        if size not in self.queues:
            declared = ", ".join(f"{width}x{height}" for width, height in self.queues)
            raise InvalidField("size", f"size must be one of {declared}, got {size[0]}x{size[1]}.")
        return size

    def accept(self, request: Request, timeout_s: float, beyond_limits: bool) -> None:
        """Takes the request for the engine's next turn, or raises QueueFull or DeadlineUnmeetable."""
        with self.changed:
            if len(self.waiting()) >= self.max_waiting and not beyond_limits:
                self._count(request, "queue_full")
                raise QueueFull(place_s(self.queued()))
            if timeout_s < math.inf:
                self._check_deadline(request, timeout_s)
            self.unfinished.add(request)
            self.arrivals.append(request)
            self.changed.notify()
        request.future.add_done_callback(partial(self._ended, request))

    def _check_deadline(self, request: Request, timeout_s: float) -> None:
        queue, queued = self.queues[request.size], self.queued()
        if (estimate_s := answer_s(request, queue, queued)) > timeout_s:
            self._count(request, "deadline")
            # By then, the requests that it could overtake now have less work left, or have aged.
            last_s = answer_s(request, queue, queued, last=True)
            raise DeadlineUnmeetable(estimate_s, max(last_s - timeout_s, LEAST_RETRY_S))

    def _ended(self, request: Request, future: "Future[Generated]") -> None:
        """Counts the outcome of a request, and wakes the engine's thread, which then frees its slots."""
        outcome = "cancelled" if future.cancelled() else outcome_of(future.exception())
        with self.changed:
            self.unfinished.discard(request)
            self._count(request, outcome)
            self.changed.notify_all()

    def _count(self, request: Request, outcome: str) -> None:
        self._outcomes[outcome] += request.counted

    def take_arrivals(self) -> None:
        """Moves new requests to the queues of their sizes. The engine's thread calls it."""
        with self.changed:
            for request in self.arrivals:
                queue = self.queues[request.size]
                if not queue.requests:
                    queue.virtual_time = virtual_time_after_idling(queue, self.queues.values())
                queue.requests.append(request)
                self._arrival_rate.note(request.since, backlog_s(queue, request.images))
            self.arrivals.clear()

    def expected_beside(self, queue: SizeQueue) -> float:
        """Counts the requests of other sizes, and those that are expected before the device is idle."""
        backlog = sum(backlog_s(other, other.images) for other in self.queues.values())
        others = sum(len(other.requests) for other in self.queues.values() if other is not queue)
        return others + self._arrival_rate.expected(self.clock(), backlog)

    def leave(self, future: "Future[Generated] | None" = None) -> None:
        """Lets all requests go, or the one with this future: what waits at once, the others between two steps."""
        with self.changed:
            for request in self.unfinished:
                request.leaving |= future is None or request.future is future
            leaving = [request for request in self.waiting() if request.leaving]
        self.release(leaving)

    def release_waiting(self) -> None:
        """Lets the requests go that have not begun here."""
        self.release(self.waiting())

    def release(self, requests: Sequence[Request]) -> None:
        with self.changed:  # requests begin under this lock too, so none is both let go and begun
            waiting = [request for request in requests if request.status is Status.WAITING]
            for request in waiting:
                request.move()
            self.changed.notify_all()
        for request in waiting:
            request.end(HandedOver(resumed_of(request, request.images)))

    def unfinished_work(self) -> str:
        """Describes the unfinished requests in the order of their submission, for the log. Prompts are not in it."""
        with self.changed:
            requests = sorted(self.unfinished, key=lambda request: request.since)
            parts = [str(request) for request in requests[:MOST_LISTED]]
        return "; ".join(parts + [f"{len(requests) - MOST_LISTED} more"] * (len(requests) > MOST_LISTED))

    def progress(self, future: "Future[Generated]") -> Progress | None:
        """Returns how far the request with this future is, or None once it is finished or moves."""
        with self.changed:
            own = (request for request in self.unfinished if request.future is future and not request.moved)
            request = next(own, None)
            return progress_of(request, self.queues[request.size], self.queued()) if request else None

    def queued(self) -> Queued:
        """Lists the images of each queue, with new requests at its end. The caller holds the lock."""
        arrived = [image for request in self.arrivals for image in request.images]
        return {
            queue: [*in_order(queue), *(image for image in arrived if image.request.size == size)]
            for size, queue in self.queues.items()
        }

    def stats(self) -> dict[str, Any]:
        """Returns plain numbers, for JSON."""
        with self.changed:
            queued = self.queued()
            active = sum(queue.rows_active for queue in queued)
            computed = sum(queue.rows_computed for queue in queued)
            return {
                "waiting": len(self.waiting()),
                "unfinished": len(self.unfinished),
                "active_slots": sum(queue.active for queue in queued),
                "num_slots": sum(queue.num_slots for queue in queued),
                "backlog_s": sum(backlog_s(queue, images) for queue, images in queued.items()),
                "bucket_fill": active / computed if computed else 1.0,
                "sizes": {queue.name: queue.stats(images) for queue, images in queued.items()},
                "requests": dict(self._outcomes),
            }


def outcome_of(error: BaseException | None) -> str:
    return "completed" if error is None else "moved" if isinstance(error, HandedOver) else "failed"
