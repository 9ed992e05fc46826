"""How far an unfinished request is: its place in the queue, its steps and the seconds that are left.

Pure functions. Knows nothing of threads, clocks or devices.
"""

from typing import NamedTuple

from app.engine.request import Request, Status
from app.engine.scheduler import answer_s, rank
from app.engine.size_queue import Queued, SizeQueue


class Progress(NamedTuple):
    """The seconds are an estimate, as if no other request came."""

    status: str  # waiting, running or decoding
    ahead: int  # waiting requests that begin before it
    steps: int  # that its images have taken, in sum
    total_steps: int
    left_s: float  # until its images are decoded


def progress_of(request: Request, queue: SizeQueue, queued: Queued) -> Progress:
    """The caller holds the lock that guards the queues."""
    total_steps = len(request.table) * request.generation.n
    left = sum(image.steps_left for image in request.images)
    if request.images:
        left_s = answer_s(request, queue, queued)
    else:
        left_s = request.generation.n * queue.decode_cost.image_s()
    ahead = requests_ahead(request, queue, queued) if request.status is Status.WAITING else 0
    return Progress(request.status.value, ahead, total_steps - left, total_steps, left_s)


def requests_ahead(request: Request, queue: SizeQueue, queued: Queued) -> int:
    """Within a size the order is that of the scheduler; between sizes, which share the device, that of arrival."""
    waiting = {
        (other, image.request)
        for other, images in queued.items()
        for image in images
        if image.request is not request and image.request.status is Status.WAITING
    }
    own_rank = rank(request, queue.step_cost)
    return sum(
        rank(other, queue.step_cost) <= own_rank if its_queue is queue else other.since <= request.since
        for its_queue, other in waiting
    )
