"""Step-level batching: a waiting queue, slots, and one thread that runs the step loop. Knows nothing of Ray, HTTP, JAX
or model weights.

Between any two steps pictures join, leave and overtake: the requests of a size stand in line by what is left of them,
with ageing, and the first few of the line share the next step, as many as make images come fastest
(app/engine/scheduler.py).
Several sizes take turns. The thread dispatches ahead of the device, but while nobody waits only just ahead, so that a
newcomer finds a place in the very next step; and it never waits for a picture: another thread fetches those. A third
one notices when the device no longer answers either of them (app/engine/stall.py); the engine then gives up.
"""

import contextlib
import dataclasses
import logging
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, InvalidStateError
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol

import numpy as np

from app.diffusion.samplers import SamplerTable
from app.engine.request import Generated, Group, Lines, Picture, Preview, Request, answer_s, backlog_s, place_s
from app.engine.scheduler import Arrivals, Decoding, Profile, Work
from app.engine.stall import STALL_S, StallWatch
from app.engine.worker import Worker
from app.types import ActiveSlot, Generation, InvalidField, Size

logger = logging.getLogger(f"ray.serve.{__name__}")  # the tree that Serve writes to its files

# Several steps share a dispatch up to this: while a newcomer would share the next one, and while it would not. Who
# cancels, or would overtake, waits no longer for it.
DISPATCH_S, CLOSED_DISPATCH_S = 0.01, 0.05
AHEAD = 1  # dispatches beyond the one that the device is at
# The next dispatch is made so long before the device has nothing left to do, and so many times the usual difference of
# a step from what was expected of it; so that the device never idles.
LEAD_S, LEAD_SPREADS = 0.002, 4
FAILURES = 3  # of one verb in a row before the engine gives up, so that Serve replaces the replica
LOGGED = "logged_by_engine"  # attribute of an exception
CLOSE_S = 30.0  # how long `close` waits for what its threads are at


class Verbs(Protocol):
    """What the engine needs of a pipeline; tests give it a fake. Verbs only dispatch; `wait`, and np.asarray of what
    `decode` returns, block."""

    num_slots: int
    sizes: tuple[Size, ...]
    row_buckets: tuple[int, ...]
    decode_buckets: tuple[int, ...]
    default_sampler: str

    @property
    def step_s(self) -> Mapping[tuple[Size, int], float]: ...  # seconds of a step by size and row bucket
    @property
    def decode_s(self) -> Mapping[tuple[Size, int], float]: ...

    def table(self, sampler: str | None, num_inference_steps: int) -> SamplerTable: ...
    def empty_state(self, size: Size) -> Any: ...
    def encode(self, texts: Sequence[str]) -> list[Any]: ...
    def insert(
        self,
        state: Any,
        slot: int,
        prompt: Any,
        negative_prompt: Any,
        table: SamplerTable,
        guidance_scale: float,
        seed: int,
    ) -> Any: ...
    def step(self, state: Any, active: Sequence[ActiveSlot], count: int) -> tuple[Any, Any]: ...
    def decode(self, state: Any, slots: Sequence[int]) -> Any: ...
    def preview(self, state: Any, slot: int) -> Any: ...
    def wait(self, done: Any) -> None: ...


class QueueFull(Exception):
    """Nothing was queued; `retry_after_s` says when a place should be free."""

    def __init__(self, retry_after_s: float):
        super().__init__(f"the queue is full; retry in {retry_after_s:.1f} s")
        self.retry_after_s = retry_after_s


class DeadlineUnmeetable(Exception):
    """Nothing was queued: it would take `estimate_s`. After `retry_after_s` it should fit, if nothing else comes."""

    def __init__(self, estimate_s: float, retry_after_s: float):
        super().__init__(f"it would take {estimate_s:.1f} s; retry in {retry_after_s:.1f} s")
        self.estimate_s = estimate_s
        self.retry_after_s = retry_after_s


class EngineStopped(Exception):
    """The engine's thread has ended, by `close` or by a failure."""


class EngineStalled(EngineStopped):
    """The device has not answered for so long that the engine has given up."""


class _GivenUp(RuntimeError):
    """A verb has failed too often; ends the thread."""


@dataclasses.dataclass(eq=False)
class _Dispatch:
    group: Group
    done: Any
    bucket: int
    count: int
    seconds: float  # as expected when it was made
    at: float
    alone: bool  # nothing but steps since the dispatch before, so that its time is theirs
    doubted: bool = False  # under way when another failed: what spoilt that one may have spoilt it too
    ended: float = math.inf  # when the first of the threads that wait for it saw it done
    denoised: list[Picture] = dataclasses.field(default_factory=list)  # whose last step it has


class Engine:
    """Owns the thread, the line of each size, and the denoising states."""

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
        """`images_at_once` overrides what the measured step times say. A verb that takes longer than `stall_s`, and
        many times longer than it should, means that the device is lost. `start` starts the threads, and tests without
        it call `tick`."""
        self.pipeline = pipeline
        self.max_waiting = max_waiting
        self.images_at_once = images_at_once
        self.gain = gain
        self.clock = clock
        self.started = clock()
        self._groups = {size: self._new_group(size) for size in pipeline.sizes}
        self._changed = threading.Condition()  # guards what `submit` and the thread share: arrivals and each line
        self._arrivals: list[Request] = []
        self._arrived = Arrivals()
        self._unfinished: set[Request] = set()
        self._stopping = self._draining = False
        self._thread: threading.Thread | None = None
        self._flight: deque[_Dispatch] = deque()
        self._last_done = 0.0
        self._only_steps = True
        self._spread_s = 0.0  # mean difference of what a dispatch takes from what was expected
        self._failures = dict.fromkeys(("encode", "step", "decode"), 0)  # in a row
        self._stepped = True  # since a decode failed
        self._texts: OrderedDict[str, Any] = OrderedDict()
        self._prompt_cache = prompt_cache
        self._hits = self._misses = 0
        self._busy_s = 0.0
        self._outcomes = dict.fromkeys(("completed", "cancelled", "failed", "queue_full", "deadline"), 0)
        # One thread, so that a request's previews and its picture arrive in the order in which the device makes them.
        self._fetcher = fetcher or Worker("fetch")
        # Device-seconds of steps that nobody has seen done, of all decodes, and of those whose pixels were fetched.
        self._stepping_s = self._decoding_s = self._decoded_s = 0.0
        self._watch = StallWatch(stall_s, self._stall, clock)

    # --- for any thread

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        self._watch.start()

    @property
    def stalled(self) -> str:
        """A sentence on which verb the device does not answer; empty while it answers."""
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
        on_preview: Preview | None = None,
    ) -> "Future[Generated]":
        """Raises QueueFull, DeadlineUnmeetable, EngineStopped, or InvalidField for what this checkpoint cannot do.

        Cancelling the future frees its slots at the next step. `on_preview` is called from another thread, with a
        number from 0 and the picture as it looks by then, uint8 [H, W, 3]; where there are fewer steps than
        `previews` asks for, less often.
        """
        size = (generation.width, generation.height)
        if size not in self._groups:
            declared = ", ".join(f"{width}x{height}" for width, height in self._groups)
            raise InvalidField("size", f"size must be one of {declared}, got {size[0]}x{size[1]}.")
        if previews and on_preview is None:
            raise ValueError(f"previews must be 0 without on_preview, got {previews}.")
        table = self.pipeline.table(generation.sampler, generation.num_inference_steps)
        request = Request.of(generation, table, self.clock(), previews, on_preview)
        with self._changed:
            if self._draining or not self.healthy:
                raise self._stopped()
            if sum(waiting.began is None for waiting in self._unfinished) >= self.max_waiting:
                self._outcomes["queue_full"] += 1
                raise QueueFull(place_s(self._lines()))
            if timeout_s < math.inf:
                group, lines = self._groups[size], self._lines()
                if (estimate_s := answer_s(request, group, lines)) > timeout_s:
                    self._outcomes["deadline"] += 1
                    # Those that it could overtake now will have less left by then, or have waited longer.
                    last_s = answer_s(request, group, lines, last=True)
                    raise DeadlineUnmeetable(estimate_s, max(last_s - timeout_s, 0.1))
            self._unfinished.add(request)
            self._arrivals.append(request)
            self._changed.notify()
        request.future.add_done_callback(partial(self._left, request))
        return request.future

    def stats(self) -> dict[str, Any]:
        """What it does right now, and has done; plain numbers, for JSON."""
        with self._changed:
            lines = self._lines()
            waiting = [request for request in self._unfinished if request.began is None]
            asked, run = (sum(getattr(g, name) for g in lines) for name in ("rows_asked", "rows_run"))
            return {
                "waiting": len(waiting),
                "unfinished": len(self._unfinished),
                "active_slots": sum(self.pipeline.num_slots - len(group.free) for group in lines),
                "num_slots": self.pipeline.num_slots * len(lines),
                "backlog_s": sum(backlog_s(group, line) for group, line in lines.items()),
                "bucket_fill": asked / run if run else 1.0,
                "sizes": {
                    f"{group.size[0]}x{group.size[1]}": {
                        "step_s": {str(rows): seconds for rows, seconds in group.profile.table().items()},
                        "images_at_once": group.images_at_once,
                        "active": self.pipeline.num_slots - len(group.free),
                        "waiting": sum(picture.slot is None for picture in line),
                        "steps": group.steps,
                    }
                    for group, line in lines.items()
                },
                "admission": "measured" if self.images_at_once is None else "fixed",
                "gain": self.gain,
                "prompt_cache": {"entries": len(self._texts), "hits": self._hits, "misses": self._misses},
                "requests": dict(self._outcomes),
                "device_busy_s": self._busy_s,
                "uptime_s": self.clock() - self.started,
            }

    def drain(self, timeout_s: float) -> None:
        """Lets those finish that have begun, refuses the others, and closes; after `timeout_s` whatever is left."""
        deadline = self.clock() + timeout_s
        with self._changed:  # `_admit` begins requests under it too, so none can be both refused and begun
            self._draining = True
            waiting = [request for request in self._unfinished if request.began is None]
            for request in waiting:
                request.refused = True
        for request in waiting:
            finish(request.future, EngineStopped("the engine is stopping"))
        with self._changed:
            while self._unfinished and self.healthy and (left := deadline - self.clock()) > 0:
                self._changed.wait(min(left, 0.5))
        self.close()

    def close(self) -> None:
        """Ends the threads, after what they are at; every unfinished request fails with EngineStopped."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._give_up()  # before the threads have ended, as their device may hang
        deadline = time.monotonic() + CLOSE_S
        self._await(self._thread, deadline)
        self._fetcher.shutdown(wait=False)
        if isinstance(self._fetcher, Worker):  # ended with the process while inside JAX, it might abort the process
            self._await(self._fetcher.thread, deadline)
        self._watch.stop()

    def _await(self, thread: threading.Thread | None, deadline: float) -> None:
        """Its end, unless the device does not answer it."""
        if thread is threading.current_thread():
            return
        while thread and thread.is_alive() and not self.stalled and time.monotonic() < deadline:
            thread.join(timeout=0.1)

    # --- the thread

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    while not (self._stopping or self._arrivals or self._flight or self._waiting_for_steps()):
                        self._changed.wait()
                    if self._stopping:
                        return
                self.tick()
                self._pause()
        except BaseException:
            logger.exception("The engine's thread failed.")
        finally:
            self._give_up()

    def tick(self) -> bool:
        """One turn of the loop; whether there was anything to do."""
        self._check()
        self._take_arrivals()
        self._free_cancelled()
        group = self._next()
        if group is None:
            return self._settle(0)
        running: list[Picture] = []
        try:
            running = self._admit(group)
            if running:
                self._advance(group, running)
        except _GivenUp:
            raise
        except Exception as error:
            self._fail_group(group, error)
        self._retire(group, [picture for picture in running if picture.steps_left])
        self._settle(AHEAD)
        return True

    def _pause(self) -> None:
        if (pause_s := self.pause_s()) > 0:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping, timeout=pause_s)

    def pause_s(self) -> float:
        """Until shortly before the device has done what it was given, if who comes by then could share the next step:
        not where others wait already, or where sharing does not pay."""
        if not self._flight or not all(group.open for group in self._groups.values() if group.requests):
            return 0.0
        last = self._flight[-1]
        ends = max(self._last_done, last.at) + last.count * last.group.profile.step_s(last.bucket)
        return ends - LEAD_S - LEAD_SPREADS * self._spread_s - self.clock()

    def _take_arrivals(self) -> None:
        with self._changed:
            for request in self._arrivals:
                group = self._group(request)
                if not group.requests:  # back from idling: no claim to the time that it did not use
                    groups = self._groups.values()
                    # Where all idle, none owes for time that nobody else wanted.
                    turns = [g.turn for g in groups if g.requests] or [max(g.turn for g in groups)]
                    group.turn = max(group.turn, min(turns))
                group.requests.append(request)
                self._arrived.note(request.since, backlog_s(group, request.pictures))
            self._arrivals.clear()

    def _free_cancelled(self) -> None:
        for group in self._groups.values():
            if gone := [request for request in group.requests if request.future.done()]:
                with self._changed:
                    for request in gone:
                        self._leave(group, request)

    def _next(self) -> Group | None:
        """Sizes take turns by device time, in proportion to how many pictures each has in line."""
        return min((group for group in self._groups.values() if group.requests), key=lambda g: g.turn, default=None)

    def _admit(self, group: Group) -> list[Picture]:
        """The pictures that share the next step; those of them that wait go into free slots."""
        line = group.pictures()
        seated, free = [], len(group.free)
        for picture in line:
            if picture.slot is not None or free > 0:
                seated.append(picture)
                free -= picture.slot is None
        work = [picture.work for picture in seated]
        group.coming = self._others(group) + len({p.request for p in line} - {p.request for p in seated})
        group.images_at_once = group.share(work)
        chosen = group.filled(seated, group.images_at_once)
        group.open = free > 0 and group.share([*work, Work(steps=1, rows=2)]) > len(line)
        self._encode([picture.request for picture in chosen if picture.request.texts is None])
        admitted = []
        for picture in chosen:
            request = picture.request
            if request.texts is None:  # its prompt could not be encoded; it has failed
                continue
            if picture.slot is None:
                with self._changed:
                    if request.refused:
                        continue
                    if request.began is None:
                        request.began = self.clock()
                    picture.slot = group.free.pop()
                seed, scale = request.seeds[picture.number], request.generation.guidance_scale
                self._only_steps = False
                with self._call("insert"):
                    group.state = self.pipeline.insert(
                        group.state, picture.slot, *request.texts, request.table, scale, seed
                    )
            admitted.append(picture)
        return admitted

    def _others(self, group: Group) -> float:
        """Requests of other sizes, and those that should come before the device is idle."""
        backlog = sum(
            backlog_s(g, [p for request in g.requests for p in request.pictures]) for g in self._groups.values()
        )
        waiting = sum(len(other.requests) for other in self._groups.values() if other is not group)
        return waiting + self._arrived.coming(self.clock(), backlog)

    def _encode(self, requests: Sequence[Request]) -> None:
        """Gives each its encoded texts, of which those that were seen lately cost nothing."""
        requests = list(dict.fromkeys(requests))
        texts = [text for r in requests for text in (r.generation.prompt, r.generation.negative_prompt)]
        unseen = [text for text in dict.fromkeys(texts) if text not in self._texts]
        self._hits += len(texts) - len(unseen)
        self._misses += len(unseen)
        if unseen:
            self._only_steps = False
            try:
                with self._call("encode"):
                    encoded = self.pipeline.encode(unseen)
                self._texts.update(zip(unseen, encoded, strict=True))
                self._note("encode", failed=False)
            except Exception as error:
                self._log(f"Encoding {len(unseen)} prompts failed", error)
                known = self._texts.keys()
                for request in requests:
                    if not {request.generation.prompt, request.generation.negative_prompt} <= known:
                        self._fail(request, error)
                self._note("encode", failed=True)
                requests = [request for request in requests if not request.future.done()]
                texts = [text for text in texts if text in known]
        for request in requests:
            request.texts = (self._texts[request.generation.prompt], self._texts[request.generation.negative_prompt])
        for text in texts:
            self._texts.move_to_end(text)
        while len(self._texts) > self._prompt_cache:
            self._texts.popitem(last=False)

    def _advance(self, group: Group, pictures: Sequence[Picture]) -> None:
        """One dispatch: steps up to DISPATCH_S, and up to the first that somebody ends or shows."""
        active = [
            ActiveSlot(picture.slot, picture.request.rows == 2) for picture in pictures if picture.slot is not None
        ]
        rows = sum(slot.rows for slot in active)
        bucket, step_s = group.profile.bucket(rows), group.profile.step_s(rows)
        until = (picture.steps_left - (picture.previews[-1] if picture.previews else 0) for picture in pictures)
        count = min(min(until), max(1, int((DISPATCH_S if group.open else CLOSED_DISPATCH_S) / step_s)))
        self._stepping_s += count * step_s
        with self._call("step"):
            group.state, done = self.pipeline.step(group.state, active, count)
        dispatch = _Dispatch(group, done, bucket, count, count * step_s, self.clock(), self._only_steps)
        self._flight.append(dispatch)
        self._only_steps = True
        group.turn += count * step_s / sum(len(request.pictures) for request in group.requests)
        group.steps += count
        group.rows_asked = group.rows_asked * 0.99 + rows
        group.rows_run = group.rows_run * 0.99 + bucket
        with self._changed:
            for picture, lane in zip(pictures, active, strict=True):
                picture.steps_left -= count
                if not picture.steps_left:
                    picture.last_dispatch = dispatch
                    dispatch.denoised.append(picture)
                picture.request.device_s += count * step_s * lane.rows / rows
        for picture in pictures:
            if picture.previews and picture.previews[-1] == picture.steps_left:
                self._preview(group, picture)

    def _preview(self, group: Group, picture: Picture) -> None:
        request = picture.request
        picture.previews.pop()
        number = request.previewed
        request.previewed += 1
        assert picture.slot is not None and request.on_preview is not None
        self._only_steps = False
        try:
            with self._call("preview"):
                pixels = self.pipeline.preview(group.state, picture.slot)
        except Exception as error:
            self._log("A preview failed", error)
            return
        self._fetcher.submit(self._show, request, number, pixels)

    def _retire(self, group: Group, running: Sequence[Picture]) -> None:
        """Finished pictures are decoded, in as few programs as pays, and leave their slots at once."""
        pictures = [picture for request in group.requests for picture in request.pictures]
        finished = [picture for picture in pictures if not picture.steps_left]
        others = len(pictures) - len(finished)
        step_s = group.profile.step_s(sum(picture.request.rows for picture in running)) if running else 0.0
        next_s = min((picture.steps_left * step_s for picture in running), default=math.inf)
        while finished and group.decoding.due(len(finished), next_s, others):
            bucket = group.decoding.bucket(len(finished))
            batch, finished = finished[:bucket], finished[bucket:]
            self._only_steps = False
            decode_s = group.decoding.decode_s[bucket]
            self._decoding_s += decode_s
            try:
                with self._call("decode"):
                    pixels = self.pipeline.decode(group.state, [p.slot for p in batch if p.slot is not None])
            except Exception as error:
                self._decoding_s -= decode_s
                self._log(f"A decode of {group.name} failed", error)
                for picture in batch:
                    self._fail(picture.request, error)
                self._note("decode", failed=True)
                finished = [p for p in finished if p.slot is not None]  # others of those requests left with them
                continue
            with self._changed:
                for picture in batch:
                    request = picture.request
                    request.device_s += decode_s / len(batch)
                    request.pictures.remove(picture)
                    self._free(group, picture)
                    if not request.pictures:
                        group.requests.remove(request)
            self._busy_s += decode_s
            self._fetcher.submit(self._fetch, batch, decode_s, pixels)

    def _settle(self, ahead: int) -> bool:
        """Waits until no more than `ahead` dispatches are in flight, and learns from their times."""
        waited = bool(self._flight)
        while len(self._flight) > ahead:
            dispatch = self._flight.popleft()
            asked = self.clock()
            try:
                with self._call("wait"):
                    self.pipeline.wait(dispatch.done)
            except Exception as error:
                self._stepping_s -= dispatch.seconds
                # Pictures that it, or what came after it, denoised may have left for the fetching thread already.
                for spoilt in (dispatch, *(later for later in self._flight if later.group is dispatch.group)):
                    for picture in spoilt.denoised:
                        finish(picture.request.future, error)
                self._fail_group(dispatch.group, error, counts=not dispatch.doubted)
                continue
            now = self.clock()
            self._stepping_s -= dispatch.seconds
            dispatch.ended = min(dispatch.ended, now)
            self._note("step", failed=False)
            self._stepped = True
            spent = now - max(self._last_done, dispatch.at)
            step_s = dispatch.group.profile.step_s(dispatch.bucket)
            # Where it was done before anybody looked, it took at most so long.
            if dispatch.alone and (now - asked > 1e-4 or spent < dispatch.count * step_s):
                self._spread_s += 0.1 * (abs(spent - dispatch.count * step_s) - self._spread_s)
                dispatch.group.profile.observe(dispatch.bucket, spent / dispatch.count)
                step_s = dispatch.group.profile.step_s(dispatch.bucket)
            # What else ran in between, a decode, is counted already.
            self._busy_s += spent if dispatch.alone else min(spent, dispatch.count * step_s)
            self._last_done = now
        return waited

    def _fail_group(self, group: Group, error: Exception, counts: bool = True) -> None:
        """A step or an insert that fails has consumed the state and with it every picture that had begun."""
        self._log(f"A step of {group.name} failed", error)
        self._flight = deque(dispatch for dispatch in self._flight if dispatch.group is not group)
        self._stepping_s = sum(dispatch.seconds for dispatch in self._flight)
        for dispatch in self._flight:
            dispatch.doubted = True
        self._texts.clear()  # it may be an encoding that failed
        for request in [request for g in self._groups.values() for request in g.requests]:
            if any(picture.slot is None for picture in request.pictures):
                request.texts = None
        for request in [r for r in group.requests if any(p.slot is not None for p in r.pictures)]:
            self._fail(request, error)
        with self._call("empty_state"):
            group.state = self.pipeline.empty_state(group.size)
        if counts:
            self._note("step", failed=True)

    def _note(self, verb: str, *, failed: bool) -> None:
        """How a verb went. One that always fails ends the engine, as a new replica may fare better."""
        self._failures[verb] = self._failures[verb] + 1 if failed else 0
        self._check()

    def _check(self) -> None:
        for verb, count in self._failures.items():
            if count >= FAILURES:
                raise _GivenUp(f"{verb} failed {count} times in a row")

    # --- what becomes of requests

    def _fetch(self, batch: Sequence[Picture], decode_s: float, handle: Any) -> None:
        """In the fetching thread: waits for the device and completes what is complete. Whatever fails here, the
        requests of these pictures end."""
        try:
            images = self._pixels(batch, handle)
        except BaseException as error:
            with self._changed:
                if self._stepped:  # else it may be a step that failed, and with it all that it left to be decoded
                    self._failures["decode"] += 1
                self._stepped = False
            for picture in batch:  # those of its pictures that still run leave at the next tick, in the engine's thread
                finish(picture.request.future, error)
            self._log("Decoded pixels could not be fetched", error)
            return
        finally:
            self._decoded_s += decode_s
        self._failures["decode"] = 0
        for picture, image in zip(batch, images, strict=True):
            try:
                self._complete(picture, image)
            except BaseException as error:
                finish(picture.request.future, error)
                self._log("A request could not be completed", error)

    def _pixels(self, batch: Sequence[Picture], handle: Any) -> np.ndarray:
        """Of these pictures; on the way, when the device finished their last steps."""
        with self._call("read"):
            for picture in batch:
                dispatch = picture.last_dispatch
                if dispatch.ended == math.inf:  # the engine's thread has not waited for it yet
                    with contextlib.suppress(Exception):  # the pixels fail with it
                        self.pipeline.wait(dispatch.done)
                    dispatch.ended = min(dispatch.ended, self.clock())
            images = np.asarray(handle)
        if images.ndim != 4 or len(images) < len(batch):
            raise ValueError(f"decode must return {len(batch)} or more pictures, got an array of shape {images.shape}.")
        return images[: len(batch)]

    def _complete(self, picture: Picture, image: np.ndarray) -> None:
        request = picture.request
        request.pixels[picture.number] = image
        request.denoised = max(request.denoised, picture.last_dispatch.ended)
        if len(request.pixels) == request.generation.n:
            finish(request.future, request.generated(self.pipeline.default_sampler, self.clock()))

    def _show(self, request: Request, number: int, handle: Any) -> None:
        """In the fetching thread. A preview that fails is no reason to lose the picture."""
        try:
            if not request.future.done() and request.on_preview is not None:
                with self._call("read"):
                    pixels = np.asarray(handle)[0]
                request.on_preview(number, pixels)
        except Exception as error:
            self._log("A preview failed", error)

    def _fail(self, request: Request, error: Exception) -> None:
        finish(request.future, error)
        group = self._group(request)
        with self._changed:
            self._leave(group, request)

    def _leave(self, group: Group, request: Request) -> None:
        for picture in request.pictures:
            self._free(group, picture)
        request.pictures.clear()
        if request in group.requests:
            group.requests.remove(request)

    def _free(self, group: Group, picture: Picture) -> None:
        if picture.slot is not None:
            group.free.append(picture.slot)
            picture.slot = None

    def _left(self, request: Request, future: "Future[Generated]") -> None:
        """However it ended; also wakes a thread that has nothing else to do than to free its slots."""
        outcome = "cancelled" if future.cancelled() else "failed" if future.exception() else "completed"
        with self._changed:
            self._unfinished.discard(request)
            self._outcomes[outcome] += 1
            self._changed.notify_all()

    def _give_up(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
            unfinished = list(self._unfinished)
        for request in unfinished:
            finish(request.future, self._stopped())

    def _stopped(self) -> EngineStopped:
        return EngineStalled(self.stalled) if self.stalled else EngineStopped("the engine has stopped")

    def _stall(self, sentence: str) -> None:
        """In the watch's thread; that of the engine may never return from its verb."""
        logger.error("%s The engine gives up.", sentence)
        self._give_up()

    def _call(self, verb: str) -> AbstractContextManager[None]:
        """Around a verb: it may have to wait for all that the device was given before."""
        return self._watch.call(verb, self._stepping_s + self._decoding_s - self._decoded_s)

    def _log(self, what: str, error: BaseException) -> None:
        """With its traceback, the first time: a failed step fails what depends on it too, in both threads."""
        if getattr(error, LOGGED, False):
            return
        setattr(error, LOGGED, True)  # remembered by the engine, it would keep what its frames hold
        logger.error("%s: %s", what, error, exc_info=error)

    def _lines(self) -> Lines:
        """The lock is held."""
        arrived = [picture for request in self._arrivals for picture in request.pictures]
        return {
            group: [*group.pictures(), *(picture for picture in arrived if picture.request.size == group.size)]
            for group in self._groups.values()
        }

    def _waiting_for_steps(self) -> bool:
        return any(group.requests for group in self._groups.values())

    def _group(self, request: Request) -> Group:
        return self._groups[request.size]

    def _new_group(self, size: Size) -> Group:
        pipeline = self.pipeline
        return Group(
            size,
            pipeline.empty_state(size),
            Profile({rows: pipeline.step_s[size, rows] for rows in pipeline.row_buckets}),
            Decoding({images: pipeline.decode_s[size, images] for images in pipeline.decode_buckets}),
            free=list(range(pipeline.num_slots))[::-1],
            gain=self.gain,
            fixed=self.images_at_once,
        )


def finish(future: "Future[Generated]", outcome: Generated | BaseException) -> None:
    """Sets the outcome unless the client has cancelled, at this very moment perhaps."""
    try:
        if isinstance(outcome, BaseException):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
    except InvalidStateError:
        pass
