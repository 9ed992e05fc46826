"""Calls the verbs of a pipeline, keeps a window of dispatches in flight, and measures how long they take.

The host runs ahead of the device, but only just: a newcomer should find a place in the very next step. How far, and how
much a dispatch costs, is measured (app/engine/host_cost.py). Every call is watched for a stall (app/engine/stall.py).
Knows nothing of the order of requests.
"""

import contextlib
import dataclasses
import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from app.engine.cost_model import StepCost
from app.engine.device_time import DeviceTime, Work
from app.engine.host_cost import HostCost
from app.engine.request import Image, Request
from app.engine.scheduler import Overhead
from app.engine.size_queue import SizeQueue
from app.engine.stall import StallWatch
from app.engine.verbs import Verbs
from app.types import ActiveSlot

MOST_AHEAD = 4  # dispatches in flight, however short they are


@dataclasses.dataclass(eq=False, kw_only=True)
class Dispatch(Work):
    """Steps of one size, from their dispatch until the engine has waited for them."""

    queue: SizeQueue
    cost: StepCost
    bucket: int
    count: int
    suspect: bool = False  # it was in flight when another dispatch failed, so it may fail for the same cause
    denoised: list[Image] = dataclasses.field(default_factory=list)  # the images whose last step it has


class Dispatcher:
    """Tracks what is in flight on the device, and when it should be done."""

    def __init__(self, pipeline: Verbs, clock: Callable[[], float], watch: StallWatch):
        self.pipeline = pipeline
        self.clock = clock
        self.watch = watch
        self.in_flight: deque[Dispatch] = deque()
        self.host = HostCost(pipeline.dispatch_cost)
        self._device = DeviceTime()
        self._lock = threading.Lock()  # of what is measured: the fetching thread measures too
        self._alone = True  # no other verb was called since the latest steps or decode
        self._free_at = math.inf  # when the engine's thread could go on after it had waited for the device

    @property
    def busy_s(self) -> float:
        return self._device.busy_s

    def call(self, verb: str) -> AbstractContextManager[None]:
        """Watches a call that may block until the device has done all that was dispatched before."""
        return self.watch.call(verb, self._device.pending_s)

    def encode(self, texts: Sequence[str]) -> list[Any]:
        self._alone = False
        with self.call("encode"):
            return self.pipeline.encode(texts)

    def encode_image(self, queue: SizeQueue, request: Request) -> None:
        """One dispatch for all images of an edit, between two steps."""
        edit = request.generation.edit
        assert edit is not None
        began, predicted_s = self.clock(), edit.images * queue.encode_image_s
        with self.watch.call("encode_image", self._device.pending_s + predicted_s):
            request.encoded_image = self.pipeline.encode_image(edit, queue.size)
        work = self._called(request.encoded_image, [(request, 1.0)], predicted_s, began)
        if work.blocked:  # it has ended, and nobody will wait for it
            self._wait(work)

    def insert(self, queue: SizeQueue, image: Image) -> None:
        request = image.request
        assert image.slot is not None and request.encoded is not None
        seed, guidance_scale = request.seeds[image.number], request.generation.guidance_scale
        self._alone = False
        texts, table, fields = request.encoded, request.table, dict(request.generation.fields)
        edit = request.encoded_image
        with self.call("insert"):
            queue.state = self.pipeline.insert(
                queue.state, image.slot, *texts, table, guidance_scale, seed, fields, edit
            )

    def import_slot(self, queue: SizeQueue, image: Image) -> None:
        """Puts an image of another engine into its slot."""
        assert image.slot is not None
        self._alone = False
        with self.call("import"):
            queue.state = self.pipeline.import_slot(queue.state, image.slot, image.unpacked)
        image.moving, image.unpacked = b"", None

    def export_slot(self, queue: SizeQueue, image: Image) -> Any:
        """Copies an image out of its slot, after all steps that have been dispatched. The copy stays on the device."""
        assert image.slot is not None
        image.last_dispatch = next((work for work in reversed(self.in_flight) if work.queue is queue), None)
        self._alone = False
        with self.call("export"):
            return self.pipeline.export_slot(queue.state, image.slot)

    def packed(self, image: Image, exported: Any) -> bytes:
        """Waits for the device. The fetching thread calls it within a `call`."""
        if image.last_dispatch is not None:
            self.denoised_at(image)  # so that the request gets its share of the steps
        return bytes(exported)

    def preview(self, queue: SizeQueue, slot: int) -> Any:
        self._alone = False
        with self.call("preview"):
            return self.pipeline.preview(queue.state, slot)

    def overhead(self, launch_s: float) -> Overhead:
        """Returns what a dispatch costs beside its steps, on a device that takes `launch_s` to launch them."""
        if self.host.blocks:
            return Overhead(launch_s + self.host.host_s)
        return Overhead(launch_s, self.host.host_s, self.host.lead_s)

    def step(self, queue: SizeQueue, images: Sequence[Image], active: Sequence[ActiveSlot], count: int) -> Dispatch:
        rows = sum(slot.rows for slot in active)
        cost = queue.cost_of(images)
        bucket = cost.bucket(rows)
        predicted_s = cost.dispatch_s(bucket, count)
        began = self.clock()
        if self._alone and self._free_at < began:
            self.host.observe_turn(began - self._free_at)
        with self.watch.call("step", self._device.pending_s + predicted_s):
            queue.state, done = self.pipeline.step(queue.state, active, count)
        returned = self.clock()
        blocked = self.host.observe_step(returned - began, predicted_s)
        shares = [(image.request, slot.rows / rows) for image, slot in zip(images, active, strict=True)]
        at = began if blocked else returned
        dispatch = Dispatch(
            done, shares, predicted_s, at, blocked, self._alone, queue=queue, cost=cost, bucket=bucket, count=count
        )
        self._begin(dispatch, returned)
        self.in_flight.append(dispatch)
        return dispatch

    def decode(self, queue: SizeQueue, images: Sequence[Image], decode_s: float) -> Work:
        slots = [image.slot for image in images if image.slot is not None]
        began = self.clock()
        with self.watch.call("decode", self._device.pending_s + decode_s):
            pixels = self.pipeline.decode(queue.state, slots)
        return self._called(pixels, [(image.request, 1 / len(images)) for image in images], decode_s, began)

    def _called(self, done: Any, shares: list[tuple[Request, float]], predicted_s: float, began: float) -> Work:
        """Notes the work of a verb other than `step`, whose call has just returned."""
        returned = self.clock()
        blocked = self.host.waited(returned - began, predicted_s)
        work = Work(done, shares, predicted_s, began if blocked else returned, blocked, self._alone)
        self._begin(work, returned)
        return work

    def _begin(self, work: Work, returned: float) -> None:
        with self._lock:
            self._device.begin(work)
        self._alone = True
        self._free_at = returned

    def denoised_at(self, image: Image) -> float:
        """Returns when the device ended the image's last step; raises what it failed with.

        The fetching thread calls it within a `call`.
        """
        dispatch: Dispatch = image.last_dispatch
        if dispatch.ended == math.inf:  # the engine's thread has not waited for it yet
            self._wait(dispatch)
        return dispatch.ended

    def wait_for_decode(self, decode: Work) -> None:
        """Waits for the device alone, not for pixels on the host. The fetching thread calls it within a `call`."""
        with contextlib.suppress(Exception):  # reading the pixels will fail too
            if decode.previous:  # its end says when the decode began
                self._wait(decode.previous)
            self._wait(decode)

    def drop(self, work: Work) -> None:
        """Forgets work that will not be waited for: it has failed, or its pixels are on the host."""
        with self._lock:
            self._device.drop(work, self.clock())

    def wait(self, dispatch: Dispatch) -> None:
        """Waits for the oldest dispatch, and learns from the time that it took."""
        try:
            with self.call("wait"):
                self._wait(dispatch)
        except BaseException:
            self.drop(dispatch)
            raise
        finally:
            self._free_at = self.clock()

    def _wait(self, work: Work) -> None:
        """Waits until the device has ended the work, and all before it."""
        began = self.clock()
        self.pipeline.wait(work.done)
        now = self.clock()
        with self._lock:
            took_s = self._device.end(work, now, now - began)
            if took_s is not None and isinstance(work, Dispatch):
                self.host.observe_end(work.cost.dispatch_s(work.bucket, work.count), took_s)
                work.cost.observe(work.bucket, work.count, took_s)

    @property
    def ahead(self) -> int:
        """Returns how many dispatches stay in flight: as many as keep the device busy while the host makes the next."""
        if self.host.blocks:
            return 0
        covered_s, number = 0.0, 0
        for dispatch in reversed(self.in_flight):
            if number == MOST_AHEAD or (number and covered_s >= self.host.lead_s):
                break
            covered_s += dispatch.predicted_s
            number += 1
        return number

    def pause_s(self) -> float:
        """Returns the seconds until shortly before the device runs out of work. They are negative if it is late."""
        now = self.clock()
        pause_s = self._device.left_s(self.in_flight, now) - self.host.lead_s
        if pause_s > 0:
            self._free_at = now + pause_s  # a thread that wakes late is late from then on
        return pause_s

    def reset(self, queue: SizeQueue) -> None:
        """Gives a size an empty state, after a failure that consumed the old one."""
        with self.call("empty_state"):
            queue.state = self.pipeline.empty_state(queue.size)

    def forget(self, queue: SizeQueue) -> None:
        """Drops the dispatches of a size whose state was lost. The others may fail for the same cause."""
        self.in_flight = deque(dispatch for dispatch in self.in_flight if dispatch.queue is not queue)
        for dispatch in self.in_flight:
            dispatch.suspect = True
