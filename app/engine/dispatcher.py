"""Calls the verbs of a pipeline, keeps a window of dispatches in flight, and measures what they take.

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
    """Steps of one size that the device has been given."""

    queue: SizeQueue
    done: Any
    bucket: int
    count: int
    predicted_s: float
    at: float
    only_steps: bool  # nothing but steps since the dispatch before, so that the time between them is theirs
    suspect: bool = False  # in flight when another failed, so it may fail for the same cause
    ended: float = math.inf  # when the first of the threads that wait for it saw it done
    denoised: list[Image] = dataclasses.field(default_factory=list)  # images whose last step it has


class Dispatcher:
    """The device as the engine sees it: what is in flight, and when it should be done."""

    def __init__(self, pipeline: Verbs, clock: Callable[[], float], watch: StallWatch):
        self.pipeline = pipeline
        self.clock = clock
        self.watch = watch
        self.in_flight: deque[Dispatch] = deque()
        self.busy_s = 0.0
        self._last_done = 0.0
        self._only_steps = True  # since the latest dispatch
        self._spread_s = 0.0  # mean difference between predicted and measured times
        # Predicted device-seconds: of steps in flight, of all decodes so far, and of the decodes that were fetched.
        self._stepping_s = self._decoding_s = self._fetched_s = 0.0

    def call(self, verb: str) -> AbstractContextManager[None]:
        """Around whatever may block until the device has done all that it was given before."""
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
        """In the fetching thread: a decode is done, or has failed."""
        self._fetched_s += decode_s

    def denoised_at(self, image: Image) -> float:
        """In the fetching thread, within a `call`: when the device ended the image's last step."""
        dispatch: Dispatch = image.last_dispatch
        if dispatch.ended == math.inf:  # the engine's thread has not waited for it yet
            with contextlib.suppress(Exception):  # the pixels fail with it
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
        # If it was done before anybody waited, `took_s` is an upper bound.
        if dispatch.only_steps and (blocked or took_s < predicted_s):
            self._spread_s += SPREAD_WEIGHT * (abs(took_s - predicted_s) - self._spread_s)
            cost.observe(dispatch.bucket, took_s / dispatch.count)
            predicted_s = dispatch.count * cost.step_s(dispatch.bucket)
        # A decode that ran in between is counted already.
        self.busy_s += took_s if dispatch.only_steps else min(took_s, predicted_s)

    def pause_s(self) -> float:
        """Seconds until shortly before the device has done all that is in flight; negative if that is past."""
        last = self.in_flight[-1]
        ends = max(self._last_done, last.at) + last.count * last.queue.step_cost.step_s(last.bucket)
        return ends - LEAD_S - LEAD_SPREADS * self._spread_s - self.clock()

    def reset(self, queue: SizeQueue) -> None:
        """After a failure that consumed the state of a size: an empty one."""
        with self.call("empty_state"):
            queue.state = self.pipeline.empty_state(queue.size)

    def forget(self, queue: SizeQueue) -> None:
        """Drops what is in flight for a size whose state was lost."""
        self.in_flight = deque(dispatch for dispatch in self.in_flight if dispatch.queue is not queue)
        self._stepping_s = sum(dispatch.predicted_s for dispatch in self.in_flight)
        for dispatch in self.in_flight:
            dispatch.suspect = True
