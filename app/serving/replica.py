"""The replica: one checkpoint, one engine, and the way from a request to encoded images.

It imports JAX only when it is constructed, so that builders.py may import it anywhere. Knows nothing of HTTP, and of
Ray only Serve's logger, the replica's name and its metrics.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from app.api.errors import ApiError, api_error
from app.api.messages import Accepted, Description, ImageRequest, Images, Moved, Preview, Progress, QueueState, Report
from app.engine.engine import Engine
from app.engine.errors import DeadlineUnmeetable, EngineStopped, HandedOver, NotResumable, QueueFull
from app.engine.request import Generated
from app.serving.description import description_of, replica_id, stats_of
from app.serving.draining import Places, Unanswered, drain_with_serve, end
from app.serving.encoders import Encoders
from app.serving.image_metadata import facts_of, timings_of
from app.serving.load import Queues, load_of
from app.serving.metrics import Metrics
from app.serving.profiling import Profiler, Trace
from app.serving.refusals import outcome_of, refusal
from app.serving.startup import Startup
from app.types import InvalidField, PipelineSpec

# Serve handles this tree of loggers only, and prefixes each line with the request id, which is X-Request-ID to clients.
logger = logging.getLogger(f"ray.serve.{__name__}")

PROGRESS_S = 0.5  # between two items that tell how far a stream's request is


class StableDiffusion:
    """Ready when constructed: everything declared is loaded, compiled and has run once."""

    def __init__(
        self,
        spec: PipelineSpec,
        *,
        name: str,
        max_waiting: int,
        images_at_once: int | None,
        admission_gain: float,
        prompt_cache: int,
        encoding_threads: int,
        stall_s: float,
    ) -> None:
        from app.aot.compile import CompileWatch

        self.name = name
        self.unanswered = Unanswered()
        self.ended = False
        self.startup = Startup()
        self.pipeline = self.startup.load(spec)
        self.compiles = CompileWatch()
        self.compiles.ready()

        self.metrics = Metrics()
        self.encoders = Encoders(encoding_threads, name)
        self.engine = Engine(
            self.pipeline,
            max_waiting=max_waiting,
            images_at_once=images_at_once,
            gain=admission_gain,
            prompt_cache=prompt_cache,
            stall_s=stall_s,
        )
        self.engine.start()
        self.places = Places(self.engine)
        self.drain = drain_with_serve(self.engine)
        self.startup.reached("warm")
        self.profiler = Profiler(replica_id(), self.steps)
        self.logged_unhealthy = False
        self.queues = Queues()

    async def generate(self, request: ImageRequest) -> Images | Moved | ApiError:
        """An expected refusal is returned: raised, Serve would log it with a traceback and count a failure."""
        began = time.perf_counter()
        with self.unanswered:
            future = self.submit(request)
            return await self.finish(request, future, began) if isinstance(future, Future) else future

    async def generate_stream(
        self, request: ImageRequest
    ) -> AsyncIterator[Accepted | Progress | Preview | Images | Moved | ApiError]:
        """Accepted, as many previews as were asked for, and the images; or a refusal in the place of any of them.

        Where the request asks for progress, this comes in between.
        """
        began = time.perf_counter()
        loop = asyncio.get_running_loop()
        previews: asyncio.Queue[tuple[int, np.ndarray] | None] = asyncio.Queue()

        def put(preview: tuple[int, np.ndarray] | None) -> None:  # called by the engine's threads
            loop.call_soon_threadsafe(previews.put_nowait, preview)

        future = self.submit(request, lambda index, pixels: put((index, pixels)))
        if not isinstance(future, Future):
            yield future
            return
        future.add_done_callback(lambda _: put(None))
        with self.unanswered:
            try:
                yield Accepted()
                while True:
                    if request.progress and (progress := self.engine.progress(future)):
                        yield Progress(*progress)
                    try:
                        async with asyncio.timeout(PROGRESS_S if request.progress else None):
                            preview = await previews.get()
                    except TimeoutError:
                        continue
                    if preview is None:
                        break
                    index, pixels = preview
                    yield Preview(index, await self.encoders.preview(pixels, request.encoding))
                yield await self.finish(request, future, began)
            finally:
                future.cancel()  # by now it is done, unless the client has gone

    def submit(
        self, request: ImageRequest, on_preview: Callable[[int, np.ndarray], None] | None = None
    ) -> Future[Generated] | Moved | ApiError:
        try:
            future = self.engine.submit(
                request.generation,
                timeout_s=request.timeout_s,
                previews=request.partial_images,
                on_preview=on_preview,
                resumed=request.resumed,
                age_s=request.age_s,
                ahead_s=request.ahead_s,
                beyond_limits=request.moved,
                counted=request.counted,
            )
        except (QueueFull, DeadlineUnmeetable, EngineStopped, NotResumable) as error:
            self.metrics.ended(request, outcome_of(error))
            if isinstance(error, QueueFull | DeadlineUnmeetable):
                return refusal(error, request)
            return Moved(accepted=False) if isinstance(error, EngineStopped) else Moved(lost=True)
        except InvalidField as error:  # only the checkpoint can refuse it, such as a sampler that does not suit it
            self.metrics.ended(request, "invalid")
            return api_error(error)
        future.add_done_callback(partial(self.count, request))
        return self.places.hold(request.place, future)

    async def let_go(self, places: Sequence[str]) -> None:
        """The ingress has a better replica for these requests. Each ends as Moved, unless it has ended already."""
        self.places.let_go(places)

    async def finish(self, request: ImageRequest, future: Future[Generated], began: float) -> Images | Moved:
        try:
            generated = await asyncio.wrap_future(future)  # cancelled here, it is cancelled in the engine too
        except HandedOver as error:
            return Moved(error.resumed)
        except EngineStopped:
            return Moved(lost=True)
        encoding, generation = time.perf_counter(), request.generation
        encoded = await self.encoders.images(generation, generated, request.encoding)
        ended = time.perf_counter()
        facts, timings = facts_of(generation, generated), timings_of(generated, ended - encoding)
        self.metrics.finished(request, ended - began, timings)
        logger.info(
            "generated n=%d size=%s steps=%d sampler=%s %s",
            *(generation.n, facts["size"], generation.num_inference_steps, generated.sampler),
            " ".join(f"{name}={seconds:.3f}" for name, seconds in timings.items()),
        )
        return Images(encoded, generated.seeds, facts, timings, self.name, self.load())

    def count(self, request: ImageRequest, future: Future[Generated]) -> None:
        outcome = "cancelled" if future.cancelled() else outcome_of(future.exception())
        if outcome == "completed":
            self.startup.reached("first_image")
        self.metrics.ended(request, outcome)

    async def describe(self) -> Description:
        return description_of(self.pipeline, self.name)

    def load(self) -> Report:
        return load_of(self.engine, replica_id(), self.startup.duration_s)

    async def report(self, queue: QueueState) -> Report:
        """The ingress polls it, and says what waits there."""
        self.queues.note(queue)
        return replace(self.load(), description=await self.describe())

    async def stats(self) -> dict[str, Any]:
        return stats_of(self.engine, self.startup, self.compiles.count)

    def steps(self) -> int:
        return sum(size["steps"] for size in self.engine.stats()["sizes"].values())

    async def profile(self, steps: int, timeout_s: float) -> Trace | str:
        """jobs/profile.py calls this over Ray. No route of the API does."""
        return await self.profiler.trace(steps, timeout_s)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve calls this every metrics_interval_s."""
        stats = await self.stats()
        self.metrics.report(stats)
        own = {name: float(stats[name]) for name in ("backlog_s", "unfinished")}
        return {**own, "start_s": self.startup.duration_s, **self.queues.totals()}

    async def check_health(self) -> None:
        """Three failures in a row make Serve replace this replica."""
        self.metrics.report(await self.stats())  # without autoscaling, record_autoscaling_stats is never called
        if not self.engine.healthy:
            why = self.engine.stalled or "The engine has stopped."
            if not self.logged_unhealthy:
                logger.error("%s So this replica is unhealthy, and Serve will replace it.", why)
            self.logged_unhealthy = True
            raise RuntimeError(why)

    def __del__(self) -> Coroutine[Any, Any, None] | None:
        """Serve calls this on its event loop once the replica has drained, and awaits what it returns.

        It is no `async def`, because garbage collection would then leave a coroutine that is never awaited.
        """
        if vars(self).get("ended", True):
            return None
        try:
            asyncio.get_running_loop()
        except RuntimeError:  # not Serve: the interpreter exits, or the object is collected as garbage
            self.ended = True
            if "engine" in vars(self):
                self.engine.close()
            return None
        return self.shut_down()

    async def shut_down(self) -> None:
        self.ended = True
        await end(vars(self))
