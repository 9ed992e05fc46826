"""The replica: one checkpoint, one engine, and the way from a request to encoded pictures.

Imports nothing heavy, so that builders.py may import it: JAX arrives with the first replica. Knows nothing of HTTP, and
of Ray only the name of Serve's logger, the replica's own and its metrics.
"""

import asyncio
import logging
import math
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import psutil
from ray import serve
from ray.serve.exceptions import RayServeException

from app.api.errors import ApiError, api_error
from app.api.messages import Accepted, Description, ImageRequest, Images, Preview, fact_text
from app.api.settings import Encoding
from app.diffusion.images import encode
from app.engine.engine import Engine
from app.engine.errors import DeadlineUnmeetable, EngineStalled, EngineStopped, QueueFull
from app.engine.request import Generated
from app.serving.metrics import Metrics
from app.serving.profiling import Profiler, Trace
from app.types import Generation, InvalidField, PipelineSpec

# Serve's handlers serve this tree only, and prefix each line with the request id that clients see as X-Request-ID.
logger = logging.getLogger(f"ray.serve.{__name__}")

DRAIN_S = 10.0  # Serve has waited for every request before it ends a replica, so nothing should be left
PREVIEW_PNG_LEVEL = 1  # a preview is looked at once
STALLED_RETRY_S = 5.0  # Serve needs three failed health checks to replace a replica

Facts = dict[str, str | int | float]


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
        from app.aot.program import CompileWatch
        from app.diffusion.pipeline import Pipeline

        self.name = name
        self.unanswered = 0  # requests that have come and have no answer yet
        self.all_answered = asyncio.Event()
        self.all_answered.set()
        self.ended = False
        # Unix times, in the order in which they come; a load test breaks a scale-up down by them.
        self.milestones = {"process": psutil.Process().create_time(), "constructor": time.time()}
        started = time.perf_counter()
        self.pipeline = Pipeline.load(spec)
        loaded = time.perf_counter()
        self.milestones["weights"] = time.time()
        self.pipeline.warmup()
        self.ready_s = time.perf_counter() - started
        self.compiles = CompileWatch()
        self.compiles.ready()
        logger.info("ready load_s=%.1f warmup_s=%.1f", loaded - started, self.ready_s - (loaded - started))

        self.metrics = Metrics()
        self.encoders = ThreadPoolExecutor(encoding_threads, thread_name_prefix="encode")
        self.engine = Engine(
            self.pipeline,
            max_waiting=max_waiting,
            images_at_once=images_at_once,
            gain=admission_gain,
            prompt_cache=prompt_cache,
            stall_s=stall_s,
        )
        self.engine.start()
        self.milestones["warm"] = time.time()
        self.profiler = Profiler(replica_id(), self.steps)
        self.found_dead = False

    async def generate(self, asked: ImageRequest) -> Images | ApiError:
        """An expected refusal is returned: raised, Serve would log it with a traceback and count a failure."""
        began = time.perf_counter()
        with self.answering():
            future = self.submit(asked)
            return future if isinstance(future, ApiError) else await self.finish(asked, future, began)

    async def generate_stream(self, asked: ImageRequest) -> AsyncIterator[Accepted | Preview | Images | ApiError]:
        """Accepted, as many previews as were asked for, and the images; or a refusal in the place of any of them."""
        began = time.perf_counter()
        loop = asyncio.get_running_loop()
        previews: asyncio.Queue[tuple[int, np.ndarray] | None] = asyncio.Queue()

        def put(preview: tuple[int, np.ndarray] | None) -> None:  # called by the engine's threads
            loop.call_soon_threadsafe(previews.put_nowait, preview)

        future = self.submit(asked, lambda index, pixels: put((index, pixels)))
        if isinstance(future, ApiError):
            yield future
            return
        future.add_done_callback(lambda _: put(None))
        with self.answering():
            try:
                yield Accepted()
                while preview := await previews.get():
                    index, pixels = preview
                    yield Preview(index, await self.encoded(pixels, asked.encoding, PREVIEW_PNG_LEVEL, {}))
                yield await self.finish(asked, future, began)
            finally:
                future.cancel()  # by now it is done, unless the client has gone

    @contextmanager
    def answering(self) -> Iterator[None]:
        self.unanswered += 1
        self.all_answered.clear()
        try:
            yield
        finally:
            self.unanswered -= 1
            if not self.unanswered:
                self.all_answered.set()

    def submit(
        self, asked: ImageRequest, on_preview: Callable[[int, np.ndarray], None] | None = None
    ) -> Future[Generated] | ApiError:
        try:
            future = self.engine.submit(
                asked.generation, timeout_s=asked.timeout_s, previews=asked.partial_images, on_preview=on_preview
            )
        except (QueueFull, DeadlineUnmeetable, EngineStopped) as error:
            self.metrics.requests.inc(tags={"outcome": outcome_of(error)})
            return refusal(error, asked)
        except InvalidField as error:  # what only the checkpoint can refuse, such as a sampler that does not suit it
            self.metrics.requests.inc(tags={"outcome": "invalid"})
            return api_error(error)
        future.add_done_callback(self.count)
        return future

    async def finish(self, asked: ImageRequest, future: Future[Generated], began: float) -> Images | ApiError:
        try:
            generated = await asyncio.wrap_future(future)  # cancelled here, it is cancelled in the engine too
        except EngineStopped as error:
            return refusal(error, asked)
        encoding = time.perf_counter()
        facts = facts_of(asked.generation, generated)
        files = await self.files(asked, generated, facts)
        ended = time.perf_counter()
        timings = {
            "queue_s": generated.queue_s,
            "denoise_s": generated.denoise_s,
            "decode_s": generated.decode_s,
            "encode_s": ended - encoding,
            "device_s": generated.device_s,
        }
        self.metrics.finished(asked.generation.n, ended - began, timings)
        logger.info(
            "generated n=%d size=%s steps=%d sampler=%s %s",
            *(asked.generation.n, facts["size"], asked.generation.num_inference_steps, generated.sampler),
            " ".join(f"{name}={seconds:.3f}" for name, seconds in timings.items()),
        )
        return Images(files, generated.seeds, facts, timings, self.name)

    async def files(self, asked: ImageRequest, generated: Generated, facts: Facts) -> tuple[bytes, ...]:
        """One file for each image; a PNG says what made it, with the seed that makes this very image alone."""
        text = {
            "prompt": asked.generation.prompt,
            "negative_prompt": asked.generation.negative_prompt,
            "model": self.name,
            "Software": "imagine-tpu",
            **{name: fact_text(fact) for name, fact in facts.items()},
        }
        each = zip(generated.pixels, generated.seeds, strict=True)
        level = asked.encoding.png_level
        pending = [
            self.encoded(pixels, asked.encoding, level, {**text, "seed": fact_text(seed)}) for pixels, seed in each
        ]
        return tuple(await asyncio.gather(*pending))

    async def encoded(self, pixels: np.ndarray, encoding: Encoding, png_level: int, text: dict[str, str]) -> bytes:
        def work() -> bytes:
            return encode(pixels, encoding.output_format, quality=encoding.quality, png_level=png_level, text=text)

        return await asyncio.get_running_loop().run_in_executor(self.encoders, work)

    def count(self, future: Future[Generated]) -> None:
        error = None if future.cancelled() else future.exception()
        if not future.cancelled() and error is None:
            self.milestones.setdefault("first_image", time.time())
        self.metrics.requests.inc(tags={"outcome": "cancelled" if future.cancelled() else outcome_of(error)})

    async def describe(self) -> Description:
        sizes = tuple(f"{width}x{height}" for width, height in self.pipeline.sizes)
        return Description(tuple(self.pipeline.samplers), self.pipeline.default_sampler, self.name, sizes)

    async def stats(self) -> dict[str, Any]:
        return {
            "replica": replica_id(),
            **self.engine.stats(),
            "compiles_after_ready": self.compiles.count,
            "ready_s": self.ready_s,
            "milestones": dict(self.milestones),
            "device": device(),
            "pid": os.getpid(),
        }

    def steps(self) -> int:
        return sum(size["steps"] for size in self.engine.stats()["sizes"].values())

    async def profile(self, steps: int, timeout_s: float) -> Trace | str:
        """For jobs/profile.py, over Ray; no route of the API leads here."""
        return await self.profiler.trace(steps, timeout_s)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve asks every metrics_interval_s."""
        stats = await self.stats()
        self.metrics.report(stats)
        return {"backlog_s": stats["backlog_s"], "unfinished": float(stats["unfinished"])}

    async def check_health(self) -> None:
        """Three failures in a row make Serve replace this replica."""
        self.metrics.report(await self.stats())  # a fixed number of replicas is never asked for autoscaling's
        if not self.engine.healthy:
            why = self.engine.stalled or "The engine has stopped."
            if not self.found_dead:
                logger.error("%s So this replica is unhealthy, and Serve will replace it.", why)
            self.found_dead = True
            raise RuntimeError(why)

    def __del__(self) -> Coroutine[Any, Any, None] | None:
        """Serve calls this on its event loop once the replica has drained, and awaits what it returns. As an
        `async def` it would leave a coroutine that nobody awaits to every collection of garbage."""
        if vars(self).get("ended", True):
            return None
        try:
            asyncio.get_running_loop()
        except RuntimeError:  # not Serve: the interpreter exits, or nobody needs this replica any more
            self.ended = True
            if "engine" in vars(self):
                self.engine.close()
            return None
        return self.shut_down()

    async def shut_down(self) -> None:
        """Lets requests that have begun end with their files, and refuses the others. The event loop goes on meanwhile.
        Of a replica whose constructor failed, some attributes may be missing."""
        self.ended, parts = True, vars(self)
        if "engine" in parts:
            await asyncio.to_thread(self.engine.drain, DRAIN_S)
        if "profiler" in parts:
            await self.profiler.close()
        with suppress(TimeoutError):
            await asyncio.wait_for(self.all_answered.wait(), DRAIN_S)
        if "encoders" in parts:
            await asyncio.to_thread(self.encoders.shutdown)
        if "compiles" in parts:
            self.compiles.close()


def outcome_of(error: BaseException | None) -> str:
    match error:
        case None:
            return "completed"
        case QueueFull():
            return "queue_full"
        case DeadlineUnmeetable():
            return "deadline"
        case EngineStopped():
            return "stopped"
    return "failed"


def refusal(error: QueueFull | DeadlineUnmeetable | EngineStopped, asked: ImageRequest) -> ApiError:
    match error:
        case QueueFull():
            return ApiError(503, "The queue is full; try again later.", None, "queue_full", error.retry_after_s)
        case DeadlineUnmeetable():
            message = (
                f"This would be ready in {up(error.estimate_s)} s, and timeout is {asked.timeout_s:g} s; "
                "try again later or with a longer timeout."
            )
            return ApiError(503, message, "timeout", "deadline_unmeetable", error.retry_after_s)
        case EngineStalled():
            return ApiError(
                503, "The replica's device does not answer; try again.", None, "replica_lost", STALLED_RETRY_S
            )
    return ApiError(503, "The replica is stopping; try again.", None, "replica_lost", 1.0)


def up(seconds: float) -> str:
    """Rounded up to a tenth, so that a deadline that is missed narrowly does not read as if it were met."""
    return f"{math.ceil(10 * seconds) / 10:g}"


def facts_of(generation: Generation, generated: Generated) -> Facts:
    """What a client needs in order to make the same picture again, and whether all of its prompt was read."""
    return {
        "seed": generation.seed,
        "sampler": generated.sampler,
        "num_inference_steps": generation.num_inference_steps,
        "guidance_scale": generation.guidance_scale,
        "size": f"{generation.width}x{generation.height}",
        "prompt_truncated": generated.prompt_truncated,
        "negative_prompt_truncated": generated.negative_prompt_truncated,
    }


def device() -> str:
    """Such as 'TPU v5 lite x4': all that this host has is one replica's."""
    import jax

    devices = jax.local_devices()
    return f"{devices[0].device_kind} x{len(devices)}"


def replica_id() -> str:
    try:
        return serve.get_replica_context().replica_tag
    except RayServeException:  # outside Serve
        return "local"
