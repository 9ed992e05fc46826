"""Calls the verbs of a pipeline, keeps a window of dispatches in flight, and measures how long they take.

The host runs ahead of the device, but only just: a newcomer should find a place in the very next step. Every call is
watched for a stall (app/engine/stall.py). Knows nothing of the order of requests.
"""

import contextlib
import dataclasses
import math
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from app.engine.request import Image
from app.engine.size_queue import SizeQueue
from app.engine.stall import StallWatch
from app.engine.verbs import Verbs
from app.types import ActiveSlot

# The next dispatch is made this long before the device runs out of work: a constant, and a multiple of the usual
# difference between predicted and measured times. So the device never idles.
LEAD_S, LEAD_SPREADS = 0.002, 4
SPREAD_WEIGHT = 0.1  # of a new measurement
BLOCKED_S = 1e-4  # a wait that took longer has really waited for the device


@dataclasses.dataclass(eq=False)
class Dispatch:
    """Steps of one size, from their dispatch until the engine has waited for them."""

    queue: SizeQueue
    done: Any
    bucket: int
    count: int
    predicted_s: float
    at: float
    only_steps: (
        bool  # no other verb was called since the previous dispatch, so the time between both is that of the steps
    )
    suspect: bool = False  # it was in flight when another dispatch failed, so it may fail for the same cause
    ended: float = math.inf  # when the first waiting thread saw it done
    denoised: list[Image] = dataclasses.field(default_factory=list)  # the images whose last step it has


class Dispatcher:
    """Tracks what is in flight on the device, and when it should be done."""

    def __init__(self, pipeline: Verbs, clock: Callable[[], float], watch: StallWatch):
        self.pipeline = pipeline
        self.clock = clock
        self.watch = watch
        self.in_flight: deque[Dispatch] = deque()
        self.busy_s = 0.0
        self._last_done = 0.0
        self._only_steps = True  # no other verb was called since the latest dispatch
        self._spread_s = 0.0  # mean difference between predicted and measured times
        # Predicted device-seconds: of steps in flight, of all decodes so far, and of the decodes that were fetched.
        self._stepping_s = self._decoding_s = self._fetched_s = 0.0

    def call(self, verb: str) -> AbstractContextManager[None]:
        """Watches a call that may block until the device has done all that was dispatched before."""
        return self.watch.call(verb, self._stepping_s + self._decoding_s - self._fetched_s)

    def encode(self, texts: Sequence[str]) -> list[Any]:
        self._only_steps = False
        with self.call("encode"):
            return self.pipeline.encode(texts)

    def insert(self, queue: SizeQueue, image: Image) -> None:
        request = image.request
        assert image.slot is not None and request.encoded is not None
        seed, guidance_scale = request.seeds[image.number], request.generation.guidance_scale
        self._only_steps = False
        with self.call("insert"):
            queue.state = self.pipeline.insert(
                queue.state, image.slot, *request.encoded, request.table, guidance_scale, seed
            )

    def step(self, queue: SizeQueue, active: Sequence[ActiveSlot], count: int) -> Dispatch:
        bucket = queue.step_cost.bucket(sum(slot.rows for slot in active))
        predicted_s = count * queue.step_cost.step_s(bucket)
        self._stepping_s += predicted_s
        with self.call("step"):
            queue.state, done = self.pipeline.step(queue.state, active, count)
        dispatch = Dispatch(queue, done, bucket, count, predicted_s, self.clock(), self._only_steps)
        self.in_flight.append(dispatch)
        self._only_steps = True
        return dispatch

    def preview(self, queue: SizeQueue, slot: int) -> Any:
        self._only_steps = False
        with self.call("preview"):
            return self.pipeline.preview(queue.state, slot)

    def decode(self, queue: SizeQueue, slots: Sequence[int], decode_s: float) -> Any:
        self._only_steps = False
        self._decoding_s += decode_s
        try:
            with self.call("decode"):
                pixels = self.pipeline.decode(queue.state, slots)
        except BaseException:
            self._decoding_s -= decode_s
            raise
        self.busy_s += decode_s
        return pixels

    def fetched(self, decode_s: float) -> None:
        """Notes that a decode is done, or has failed. The fetching thread calls it."""
        self._fetched_s += decode_s

    def denoised_at(self, image: Image) -> float:
        """Returns when the device ended the image's last step. The fetching thread calls it within a `call`."""
        dispatch: Dispatch = image.last_dispatch
        if dispatch.ended == math.inf:  # the engine's thread has not waited for it yet
            with contextlib.suppress(Exception):  # reading the pixels will fail too
                self.pipeline.wait(dispatch.done)
            dispatch.ended = min(dispatch.ended, self.clock())
        return dispatch.ended

    def wait(self, dispatch: Dispatch) -> None:
        """Waits for the oldest dispatch, and learns from the time that it took."""
        waits_since = self.clock()
        try:
            with self.call("wait"):
                self.pipeline.wait(dispatch.done)
        finally:
            self._stepping_s -= dispatch.predicted_s
        now = self.clock()
        dispatch.ended = min(dispatch.ended, now)
        self._learn(dispatch, now, blocked=now - waits_since > BLOCKED_S)
        self._last_done = now

    def _learn(self, dispatch: Dispatch, now: float, blocked: bool) -> None:
        cost = dispatch.queue.step_cost
        took_s = now - max(self._last_done, dispatch.at)
        predicted_s = dispatch.count * cost.step_s(dispatch.bucket)
        # If the wait did not block, the steps were done earlier, and `took_s` is only an upper bound.
        if dispatch.only_steps and (blocked or took_s < predicted_s):
            self._spread_s += SPREAD_WEIGHT * (abs(took_s - predicted_s) - self._spread_s)
            cost.observe(dispatch.bucket, took_s / dispatch.count)
            predicted_s = dispatch.count * cost.step_s(dispatch.bucket)
        # The time of a decode in between is counted already.
        self.busy_s += took_s if dispatch.only_steps else min(took_s, predicted_s)

    def pause_s(self) -> float:
        """Returns the seconds until shortly before the device runs out of work. They are negative if it is late."""
        last = self.in_flight[-1]
        ends = max(self._last_done, last.at) + last.count * last.queue.step_cost.step_s(last.bucket)
        return ends - LEAD_S - LEAD_SPREADS * self._spread_s - self.clock()

    def reset(self, queue: SizeQueue) -> None:
        """Gives a size an empty state, after a failure that consumed the old one."""
        with self.call("empty_state"):
            queue.state = self.pipeline.empty_state(queue.size)

    def forget(self, queue: SizeQueue) -> None:
        """Drops the dispatches of a size whose state was lost. The others may fail for the same cause."""
        self.in_flight = deque(dispatch for dispatch in self.in_flight if dispatch.queue is not queue)
        self._stepping_s = sum(dispatch.predicted_s for dispatch in self.in_flight)
        for dispatch in self.in_flight:
            dispatch.suspect = True
