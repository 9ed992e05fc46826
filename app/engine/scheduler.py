"""Decides which images share the next step, in which order, and when to decode; estimates when a request is answered.

Sharing a step is free only while the device would otherwise idle. If a step for two images takes as long as two steps
for one, sharing makes both slow, and one after the other is better for everybody. In between it depends on the load:
sharing helps those who wait, and slows those who run. The batch size follows from measured step times and the queue.

Pure functions. Knows nothing of threads, clocks or devices.
"""

import heapq
import math
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

from app.engine.cost_model import DecodeCost, StepCost
from app.engine.request import Image, Request, Status
from app.engine.size_queue import Queued, SizeQueue

# The request with the least remaining work goes first, but not for ever. A request that has t seconds of work more than
# another is overtaken only if the other came no later than t / AGEING seconds after it.
AGEING = 0.2
# What a dispatch costs beside its steps is at most this share of them, unless its images end sooner: while a newcomer
# would join the next dispatch, and while it would not. More steps cost less, but a newcomer, a request that overtakes
# and a cancelled one in its slot wait for the dispatch to end.
OVERHEAD, CLOSED_OVERHEAD = 0.03, 0.015
MOST_S = 1.0  # of a dispatch of several steps: what it costs may have been measured while the machine stood still
KEEPS_UP = 2  # the host keeps up with a device whose dispatches take so many times as long as the host's work for them
NEWCOMER_ROWS = 2  # of a guided image
ROUNDING = 1e-9


class Work(NamedTuple):
    """The remaining work of an image. `last`: it completes its request."""

    steps: float  # as long as those of a request that looks at no images
    rows: int
    last: bool = True


class Overhead(NamedTuple):
    """Seconds of a dispatch beside its steps."""

    device_s: float = 0.0  # while the device launches, or waits for the host
    host_s: float = 0.0  # of the host, while the device works
    lead_s: float = 0.0  # of the host at most


class Batch(NamedTuple):
    """The decision about the next step of one size."""

    images: list[Image]
    batch_size: int  # before backfill
    expected_arrivals: float
    newcomer_joins: bool


def next_queue(queues: Iterable[SizeQueue]) -> SizeQueue | None:
    """Returns the queue that goes next. Sizes share device time in proportion to their queued images."""
    busy = (queue for queue in queues if queue.requests)
    return min(busy, key=lambda queue: queue.virtual_time, default=None)


def virtual_time_after_idling(queue: SizeQueue, queues: Iterable[SizeQueue]) -> float:
    """Returns the virtual time of a size that was idle: it has no claim to time that it did not use.

    Nor does it owe time that no other size wanted.
    """
    queues = list(queues)
    busy = [other.virtual_time for other in queues if other.requests]
    return max(queue.virtual_time, min(busy or [max(other.virtual_time for other in queues)]))


def choose_batch(queue: SizeQueue, others_expected: float) -> Batch:
    """Chooses the images that share the next step. `others_expected`: requests that wait elsewhere, or will arrive.

    Images that look at others share no step with those that do not, as these would pay for the further tokens.
    """
    images = in_order(queue)
    admissible, free = [], len(queue.free_slots)
    for image in images:
        if image.status is Status.RUNNING or free > 0:
            admissible.append(image)
            free -= image.status is Status.WAITING
    without_slot = {image.request for image in images} - {image.request for image in admissible}
    apart = {image.request for image in admissible if image.request.looks != admissible[0].request.looks}
    admissible = [image for image in admissible if image.request not in apart]
    cost, expected = queue.cost_of(admissible), others_expected + len(without_slot) + len(apart)
    work = [work_of(image) for image in admissible]
    count = batch_size(work, cost, queue.gain, expected, queue.fixed_batch_size)
    chosen = admissible[:count]
    if queue.fixed_batch_size is None:
        chosen += backfill(chosen, admissible[count:], cost)
    newcomer = Work(steps=1, rows=NEWCOMER_ROWS)
    with_newcomer = batch_size([*work, newcomer], cost, queue.gain, expected, queue.fixed_batch_size)
    return Batch(chosen, count, expected, newcomer_joins=free > 0 and not apart and with_newcomer > len(images))


def in_order(queue: SizeQueue) -> list[Image]:
    """Sorts requests by remaining work, with ageing; within a request, the images that have begun come first."""
    return [
        image
        for request in sorted(queue.requests, key=lambda request: rank(request, queue.step_cost))
        for image in sorted(request.images, key=lambda image: (image.steps_left, image.number))
        if image.steps_left
    ]


def rank(request: Request, cost: StepCost) -> float:
    """Ranks a request by remaining device-seconds, plus its arrival weighted by ageing. The lowest goes first.

    Where it has waited before it came to this engine, it goes ahead by so much.
    """
    return device_s(map(work_of, request.images), cost) + AGEING * request.since - request.ahead_s


def work_of(image: Image) -> Work:
    request = image.request
    return Work(image.steps_left * request.stretch, request.rows, image is request.images[-1])


def batch_size(
    queue: Sequence[Work], cost: StepCost, gain: float, expected_arrivals: float, fixed: int | None = None
) -> int:
    """Returns how many images of a queue should share the next step.

    Within a bucket one more image costs nothing. A larger bucket must pass two tests, both by the margin `gain`. It
    raises rows per second over the best smaller bucket. It also lowers the summed latency of a queue that goes through
    in batches of this size: of its own requests, and of those that arrive before the device is idle.
    `fixed` overrides all this, but never the largest bucket.
    """
    sums = list(accumulate(work.rows for work in queue))
    counts: dict[int, int] = {}  # by bucket: how many images of the queue it holds
    for count, rows in enumerate(sums, 1):
        if rows > cost.largest_bucket or (fixed is not None and count > fixed):
            break
        counts[cost.bucket(rows)] = count
    if fixed is not None:
        return max(counts.values(), default=0)

    best, least_s, best_rate = 0, math.inf, 0.0
    for bucket, count in counts.items():  # ascending, as rows only grow
        rows, step_s = sums[count - 1], cost.step_s(bucket)
        if rows / step_s <= best_rate * (1 + gain):
            continue
        best_rate = rows / step_s
        batches = sum(math.ceil(until / rows) for until, work in zip(sums, queue, strict=True) if work.last)
        latencies_s = step_s * (batches + expected_arrivals * sums[-1] / rows)
        if latencies_s * (1 + gain) < least_s:
            best, least_s = count, latencies_s
    return best


def backfill(chosen: Sequence[Image], others: Sequence[Image], cost: StepCost) -> list[Image]:
    """Returns those of the others that fit into the free rows of the bucket. They cost nothing."""
    if not chosen:
        return []
    rows = sum(image.request.rows for image in chosen)
    left = cost.bucket(rows) - rows
    fitting = []
    for image in others:
        if image.request.rows <= left:
            fitting.append(image)
            left -= image.request.rows
    return fitting


def steps_in_dispatch(images: Sequence[Image], step_s: float, overhead: Overhead, newcomer_joins: bool) -> int:
    """Returns how many steps a dispatch has: as few as its overhead allows, up to an image's end or preview.

    While a newcomer would join, it is enough that the host can keep up. Else its work is bounded too, as it has other
    things to do. Never more than `MOST_S` long, as newcomers and those who cancel wait for its end.
    """
    until = min(image.steps_left - (image.previews_due[-1] if image.previews_due else 0) for image in images)
    keeps_up_s = overhead.lead_s * KEEPS_UP
    if newcomer_joins:
        least_s = max(overhead.device_s / OVERHEAD, keeps_up_s)
    else:
        least_s = max(overhead.device_s / CLOSED_OVERHEAD, overhead.host_s / OVERHEAD, keeps_up_s)
    return min(until, max(1, math.ceil(min(least_s, MOST_S) / step_s - ROUNDING)))


def decode_due(cost: DecodeCost, images: int, next_s: float, others: int) -> bool:
    """Returns whether to decode the denoised images now. Else they wait `next_s` for the next one.

    A decode holds up all `others` that run or wait. It is put off if the denoised images lose less by waiting, in sum,
    than the others gain by a shared decode.
    """
    return images >= cost.largest_bucket or next_s * images >= cost.saved_s(images) * others


def schedule(
    queue: Sequence[Work], cost: StepCost, gain: float, expected_arrivals: float, fixed: int | None = None
) -> list[tuple[float, float]]:
    """Returns when each image begins and ends denoising, in seconds from now, if no requests arrive.

    A list schedule: each image takes the place of the first that ends among those before it.
    """
    places = batch_size(queue, cost, gain, expected_arrivals, fixed)
    free_at = [0.0] * places
    spans = []
    for work in queue:  # as if the images that share its steps had as many rows
        begins = heapq.heappop(free_at)
        ends = begins + work.steps * cost.step_s(min(work.rows * places, cost.largest_bucket))
        heapq.heappush(free_at, ends)
        spans.append((begins, ends))
    return spans


def _schedule(queue: SizeQueue, work: Sequence[Work]) -> list[tuple[float, float]]:
    return schedule(work, queue.step_cost, queue.gain, queue.expected_arrivals, queue.fixed_batch_size)


def device_s(queue: Iterable[Work], cost: StepCost) -> float:
    """Returns the device-seconds of the steps that are left, as if all buckets were full."""
    return sum(work.steps * work.rows for work in queue) * cost.row_s()


def encode_s(queue: SizeQueue, requests: Iterable[Request]) -> float:
    """Returns the device-seconds until the images that requests came with are encoded."""
    return sum(request.images_to_encode for request in requests) * queue.encode_image_s


def backlog_s(queue: SizeQueue, images: Sequence[Image]) -> float:
    """Returns the device-seconds of the encodes, steps and decodes that are left."""
    encodes_s = encode_s(queue, {image.request for image in images})
    return encodes_s + device_s(map(work_of, images), queue.step_cost) + len(images) * queue.decode_cost.image_s()


def answer_s(request: Request, queue: SizeQueue, queued: Queued, last: bool = False) -> float:
    """Estimates the seconds until a request is answered, if no others arrive. With `last` it overtakes none."""
    own = [work_of(image) for image in request.images]
    images = [image for image in queued[queue] if image.request is not request]
    own_rank = rank(request, queue.step_cost)
    requests = dict.fromkeys(image.request for image in images)
    before = {other for other in requests if last or rank(other, queue.step_cost) <= own_rank}
    ahead = [work_of(image) for image in images if image.request in before]
    ends = [end for _, end in _schedule(queue, [*ahead, *own])]
    denoised_s = max(ends[-len(own) :])
    decodes = sum(end <= denoised_s for end in ends)
    # Other sizes have device time in proportion to their images until their steps are done, and decode in between.
    others = {other: waiting for other, waiting in queued.items() if other is not queue}
    others_s = sum(backlog_s(other, waiting) for other, waiting in others.items())
    steps_s = sum(device_s(map(work_of, waiting), other.step_cost) for other, waiting in others.items())
    shared_s = denoised_s * sum(map(len, others.values())) / (len(images) + len(own))
    fraction = 1.0 if last or shared_s >= steps_s else shared_s / steps_s
    encodes_s = encode_s(queue, {*before, request})
    return encodes_s + denoised_s + fraction * others_s + decodes * queue.decode_cost.image_s()


def place_s(queued: Queued) -> float:
    """Estimates the seconds until the queue has room, which is when the next waiting request begins."""
    total = sum(map(len, queued.values()))
    places_s = []
    for queue, images in queued.items():
        spans = _schedule(queue, [work_of(image) for image in images])
        begins = [
            start for (start, _), image in zip(spans, images, strict=True) if image.request.status is Status.WAITING
        ]
        if begins:
            decodes = sum(end <= min(begins) for _, end in spans)
            own_s = min(begins) + decodes * queue.decode_cost.image_s()
            places_s.append(own_s * total / len(images))  # sizes share the device
    return max(0.1, min(places_s, default=0.0))
