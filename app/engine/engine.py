"""Step-level batching: requests wait in queues, images run in slots, and one thread makes the steps.

Between any two steps images join, leave and overtake (app/engine/scheduler.py). The thread dispatches ahead of the
device, and never waits for pixels: another thread fetches those (app/engine/outputs.py). A third one notices when the
device no longer answers (app/engine/stall.py); the engine then gives up.

Knows nothing of Ray, HTTP, JAX or model weights.
"""

import logging
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

from app.engine.batcher import Batcher
from app.engine.dispatcher import Dispatcher
from app.engine.errors import EngineStalled, EngineStopped
from app.engine.failures import Failures, GivenUp
from app.engine.intake import Intake
from app.engine.moving import resume
from app.engine.outputs import Outputs
from app.engine.progress import Progress
from app.engine.prompt_cache import PromptCache
from app.engine.request import Generated, Image, OnPreview, Request
from app.engine.scheduler import next_queue
from app.engine.size_queue import SizeQueue
from app.engine.stall import STALL_S, StallWatch
from app.engine.verbs import Verbs
from app.engine.worker import Worker
from app.types import Generation, Resumed

logger = logging.getLogger(f"ray.serve.{__name__}")  # the tree that Serve writes to its files

CLOSE_S = 30.0  # the longest that `close` waits for the threads


class Engine:
    """Accepts requests from any thread, and owns the thread that makes their images."""

    def __init__(
        self,
        pipeline: Verbs,
        *,
        max_waiting: int,
        images_at_once: int | None = None,
        gain: float = 0.05,
        prompt_cache: int = 256,
        stall_s: float = STALL_S,
        clock: Callable[[], float] = time.monotonic,
        fetcher: Executor | None = None,
    ):
        """`images_at_once` overrides the batch size that follows from measured step times. A verb that takes longer
        than `stall_s`, and many times longer than predicted, means that the device is lost. `start` starts the threads;
        tests call `tick` instead."""
        self.pipeline = pipeline
        self.max_waiting = max_waiting
        self.images_at_once = images_at_once
        self.gain = gain
        self.clock = clock
        self.started = clock()
        self._queues = {size: SizeQueue.of(size, pipeline, gain, images_at_once) for size in pipeline.sizes}
        self._intake = Intake(self._queues, max_waiting, clock)
        self._changed = self._intake.changed
        self._stopping = self._draining = False
        self._thread: threading.Thread | None = None
        self._fetcher = fetcher or Worker("fetch")
        self._watch = StallWatch(stall_s, self._stall, clock)
        self._failures = Failures()
        self._prompt_cache = PromptCache(prompt_cache)
        self._dispatcher = Dispatcher(pipeline, clock, self._watch)
        outputs = Outputs(self._fetcher, self._dispatcher, self._failures, pipeline.default_sampler, clock)
        self._batcher = Batcher(self._intake, self._dispatcher, outputs, self._failures, self._prompt_cache)

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        self._watch.start()

    @property
    def stalled(self) -> str:
        """A sentence that names the verb which the device does not answer; empty while it answers."""
        return self._watch.stalled

    @property
    def healthy(self) -> bool:
        return not self._stopping and (self._thread is None or self._thread.is_alive())

    def submit(
        self,
        generation: Generation,
        *,
        timeout_s: float = math.inf,
        previews: int = 0,
        on_preview: OnPreview | None = None,
        resumed: Resumed | None = None,
        age_s: float = 0.0,
        beyond_limits: bool = False,
        ahead_s: float = 0.0,
        counted: bool = True,
    ) -> "Future[Generated]":
        """Raises QueueFull, DeadlineUnmeetable, EngineStopped, or InvalidField for what this checkpoint cannot do.

        A cancelled future frees its slots at the next step. A thread calls `on_preview`, at most `previews` times.
        A request from elsewhere has an `age_s`, and a place `beyond_limits`. With `resumed` it goes on, whatever its
        deadline; NotResumable for another model's. By `ahead_s` device-seconds it goes ahead of another that comes now.
        The outcomes in `stats` have it where it is `counted`.
        """
        size = self._intake.declared_size(generation)
        if previews and on_preview is None:
            raise ValueError(f"previews must be 0 without on_preview, got {previews}.")
        generation = self.pipeline.check(generation)
        strength = generation.edit.strength if generation.edit else None
        table = self.pipeline.table(generation.sampler, generation.num_inference_steps, size, strength)
        request = Request.of(generation, table, self.clock() - age_s, previews, on_preview, ahead_s)
        request.stretch, request.counted = self._queues[size].stretch_of(request), counted
        if resumed:
            resume(request, resumed, self.pipeline)
        with self._changed:
            if self._draining or not self.healthy:
                raise self._stopped()
            self._intake.accept(request, math.inf if resumed else timeout_s, beyond_limits)
        return request.future

    def progress(self, future: "Future[Generated]") -> Progress | None:
        return self._intake.progress(future)

    def hand_over(self) -> None:
        """Ends all requests with HandedOver: what waits at once, the others between two steps. Refuses new ones."""
        self._draining = True
        self._intake.leave()

    def let_go(self, future: "Future[Generated]") -> None:
        """Likewise ends one request, unless it ends by itself before. It accepts others."""
        self._intake.leave(future)

    def stats(self) -> dict[str, Any]:
        """Returns what the engine does now, and has done, as plain numbers for JSON."""
        return self._intake.stats() | {
            "admission": "measured" if self.images_at_once is None else "fixed",
            "gain": self.gain,
            "prompt_cache": self._prompt_cache.stats(),
            "device_busy_s": self._dispatcher.busy_s,
            "uptime_s": self.clock() - self.started,
        }

    def drain(self, timeout_s: float) -> None:
        """Lets waiting requests go, finishes the others for at most `timeout_s`, and closes."""
        deadline = self.clock() + timeout_s
        with self._changed:
            self._draining = True
        self._intake.release_waiting()
        with self._changed:
            while self._intake.unfinished and self.healthy and (left := deadline - self.clock()) > 0:
                self._changed.wait(min(left, 0.5))
        self.close()

    def close(self) -> None:
        """Ends the threads after their current verb. Unfinished requests that have begun fail with EngineStopped."""
        self._give_up()  # before the threads end, as their device may hang
        deadline = time.monotonic() + CLOSE_S
        join(self._thread, self._watch, deadline)
        self._fetcher.shutdown(wait=False)
        if isinstance(self._fetcher, Worker):  # the process might abort if it exits while a thread is inside JAX
            join(self._fetcher.thread, self._watch, deadline)
        self._watch.stop()

    def _give_up(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
            unfinished = list(self._intake.unfinished)
        self._intake.release_waiting()
        for request in unfinished:
            request.end(self._stopped())

    def _stopped(self) -> EngineStopped:
        return EngineStalled(self.stalled) if self.stalled else EngineStopped("the engine has stopped")

    def _stall(self, sentence: str) -> None:
        """Gives up, in the thread of the watch: the engine's own may never return from its verb."""
        lost = self._intake.unfinished_work()
        logger.error("%s The engine gives up. Unfinished: %s.\n%s", sentence, lost or "nothing", self._watch.stack)
        self._give_up()

    # The engine's thread.

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    while not (self._stopping or self._busy()):
                        self._changed.wait()
                    if self._stopping:
                        return
                self.tick()
                if (pause_s := self.pause_s()) > 0:
                    with self._changed:
                        self._changed.wait_for(lambda: self._stopping, timeout=pause_s)
        except BaseException:
            logger.exception("The engine's thread failed.")
        finally:
            self._give_up()

    def _busy(self) -> bool:
        queued = any(queue.requests for queue in self._queues.values())
        return bool(self._intake.arrivals or self._dispatcher.in_flight or queued)

    def tick(self) -> bool:
        """Runs one turn of the loop. Returns whether there was anything to do."""
        self._failures.check()
        self._intake.take_arrivals()
        self._batcher.free_cancelled()
        self._batcher.release()
        queue = next_queue(self._queues.values())
        if queue is None:
            return self._batcher.settle(0)
        running: list[Image] = []
        try:
            running = self._batcher.admit(queue)  # waiting -> free slots
            if running:
                self._batcher.advance(queue, running)
        except GivenUp:
            raise
        except Exception as error:
            self._batcher.fail_queue(queue, error)
        self._batcher.retire(queue, [image for image in running if image.steps_left])  # denoised -> decoding
        self._batcher.settle(self._dispatcher.ahead)
        return True

    def pause_s(self) -> float:
        """Returns for how long to put off the next dispatch, so that a newcomer may join it.

        It is 0 where other requests wait already, or where sharing gains nothing.
        """
        open_to_newcomers = all(queue.newcomer_joins for queue in self._queues.values() if queue.requests)
        return self._dispatcher.pause_s() if self._dispatcher.in_flight and open_to_newcomers else 0.0


def join(thread: threading.Thread | None, watch: StallWatch, deadline: float) -> None:
    """Waits for the end of a thread, unless the device does not answer it."""
    if thread is threading.current_thread():
        return
    while thread and thread.is_alive() and not watch.stalled and time.monotonic() < deadline:
        thread.join(timeout=0.1)
