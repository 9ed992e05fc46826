"""A waiting queue and one thread that denoises: one request at a time, in order. Knows nothing of Ray or HTTP."""

import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, InvalidStateError
from typing import Any, Protocol

import numpy as np

from app.protocol import SEEDS, Generation
from app.samplers import SamplerTable

logger = logging.getLogger(f"ray.serve.{__name__}")  # the tree that Serve writes to its files


class Verbs(Protocol):
    """What the engine needs of a pipeline; tests give it a fake."""

    num_slots: int
    sizes: tuple[tuple[int, int], ...]
    default_sampler: str

    def table(self, sampler: str | None, num_inference_steps: int) -> SamplerTable: ...
    def empty_state(self, size: tuple[int, int]) -> Any: ...
    def encode(self, prompt: str, negative_prompt: str) -> Any: ...
    def insert(
        self, state: Any, slot: int, embeddings: Any, table: SamplerTable, guidance_scale: float, seed: int
    ) -> Any: ...
    def step(self, state: Any, slots: range) -> Any: ...
    def decode(self, state: Any, slots: range) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Generated:
    """The pictures of one request and what it took to make them."""

    pixels: np.ndarray  # uint8 [n, H, W, 3]
    seeds: tuple[int, ...]
    sampler: str
    prompt_truncated: bool
    negative_prompt_truncated: bool
    queue_s: float
    denoise_s: float
    decode_s: float


class QueueFull(Exception):
    """Nothing was queued; `retry_after_s` says when a place should be free."""

    def __init__(self, retry_after_s: float):
        super().__init__(f"the queue is full; retry in {retry_after_s:.1f} s")
        self.retry_after_s = retry_after_s


class EngineStopped(Exception):
    """The engine's thread has ended, by `close` or by a failure."""


@dataclasses.dataclass(frozen=True)
class _Waiting:
    generation: Generation
    table: SamplerTable
    future: "Future[Generated]"
    since: float


class Engine:
    """Owns the thread, the queue and the denoising states."""

    def __init__(self, pipeline: Verbs, *, max_waiting: int):
        self.pipeline = pipeline
        self.max_waiting = max_waiting
        self._lock = threading.Lock()
        self._waiting: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._unfinished: set[Future[Generated]] = set()
        self._busy_s = 1.0  # a running mean of one request's seconds
        self._stopping = False
        self._states = {size: pipeline.empty_state(size) for size in pipeline.sizes}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def healthy(self) -> bool:
        return self._thread.is_alive() and not self._stopping

    def submit(self, generation: Generation) -> "Future[Generated]":
        """Raises QueueFull, EngineStopped, or ValueError for what this checkpoint cannot do.

        Cancelling the future frees its place: at once if it waits, at the next step if it runs.
        """
        size = (generation.width, generation.height)
        if size not in self._states:
            declared = ", ".join(f"{width}x{height}" for width, height in self._states)
            raise ValueError(f"size must be one of {declared}, got {size[0]}x{size[1]}.")
        table = self.pipeline.table(generation.sampler, generation.num_inference_steps)
        future: Future[Generated] = Future()
        with self._lock:
            if not self.healthy:
                raise EngineStopped("the engine has stopped")
            if len(self._unfinished) > self.max_waiting:  # one runs, the others wait
                raise QueueFull(self._busy_s)
            self._unfinished.add(future)
            self._waiting.put(_Waiting(generation, table, future, time.monotonic()))
        future.add_done_callback(self._forget)
        return future

    def stats(self) -> dict[str, float]:
        return {"unfinished": float(len(self._unfinished))}

    def close(self) -> None:
        """Ends the thread at its next step; every unfinished request fails with EngineStopped."""
        with self._lock:
            self._stopping = True
            self._waiting.put(None)
        self._thread.join(timeout=30)

    def _forget(self, future: "Future[Generated]") -> None:
        with self._lock:
            self._unfinished.discard(future)

    def _run(self) -> None:
        try:
            while (waiting := self._waiting.get()) is not None and not self._stopping:
                if not waiting.future.cancelled():
                    self._serve(waiting)
        except BaseException:
            logger.exception("The engine's thread failed.")
        finally:
            with self._lock:
                self._stopping = True
                unfinished = list(self._unfinished)
            for future in unfinished:
                finish(future, EngineStopped("the engine has stopped"))

    def _serve(self, waiting: _Waiting) -> None:
        began = time.monotonic()
        try:
            generated = self._generate(waiting, began)
        except Exception as error:
            finish(waiting.future, error)
            # A step that failed half way has consumed its state: start from free slots.
            self._states = {size: self.pipeline.empty_state(size) for size in self.pipeline.sizes}
            return
        if generated is not None:
            self._busy_s += 0.2 * (time.monotonic() - began - self._busy_s)
            finish(waiting.future, generated)

    def _generate(self, waiting: _Waiting, began: float) -> Generated | None:
        """None where the request was cancelled on the way."""
        generation, table = waiting.generation, waiting.table
        size = (generation.width, generation.height)
        seeds = tuple((generation.seed + i) % SEEDS for i in range(generation.n))
        embeddings = self.pipeline.encode(generation.prompt, generation.negative_prompt)
        pixels, denoise_s, decode_s = [], 0.0, 0.0
        for group in groups(seeds, self.pipeline.num_slots):
            started = time.monotonic()
            state, slots = self._states[size], range(len(group))
            for slot, seed in enumerate(group):
                state = self.pipeline.insert(state, slot, embeddings, table, generation.guidance_scale, seed)
            for _ in range(len(table)):
                state = self.pipeline.step(state, slots)
                self._states[size] = state
                if waiting.future.cancelled() or self._stopping:
                    return None
            decoding = time.monotonic()
            pixels.append(np.asarray(self.pipeline.decode(state, slots))[: len(group)])
            denoise_s += decoding - started
            decode_s += time.monotonic() - decoding
        return Generated(
            pixels=np.concatenate(pixels),
            seeds=seeds,
            sampler=generation.sampler or self.pipeline.default_sampler,
            prompt_truncated=embeddings.prompt_truncated,
            negative_prompt_truncated=embeddings.negative_prompt_truncated,
            queue_s=began - waiting.since,
            denoise_s=denoise_s,
            decode_s=decode_s,
        )


def groups(seeds: tuple[int, ...], size: int) -> Iterator[tuple[int, ...]]:
    for first in range(0, len(seeds), size):
        yield seeds[first : first + size]


def finish(future: "Future[Generated]", outcome: Generated | Exception) -> None:
    """Sets the outcome unless the client has cancelled, at this very moment perhaps."""
    try:
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
    except InvalidStateError:
        pass
