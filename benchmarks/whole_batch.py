"""The baseline: a server of whole batches over the same pipeline, which works as the predecessor does.

It waits until a batch is full or its oldest picture has waited long enough. Then it runs all steps in one dispatch,
decodes and answers. Requests that arrive meanwhile wait for the next batch.

The baseline is as good as this design allows. Pictures with unlike samplers, guidance and negative prompts share a
batch, as long as size and number of steps are equal. An unguided picture costs a single row. The pictures of a request
may run in several batches. The encoder gets each text of a batch once. A batch is padded to the smallest compiled
bucket only, unless `padded` asks for the predecessor's way.

`simulate` is the same server on a virtual clock. `ranked` uses it to find the settings that are worth a real run.
"""

import threading
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from app.engine.verbs import Verbs
from app.types import SEEDS, ActiveSlot, Generation
from loadtest.arrivals import Seconds

Images = npt.NDArray[np.uint8]  # [n, H, W, 3]


@dataclass(frozen=True)
class Setting:
    """The batch size, and how long to wait for a full batch. With `padded` each batch costs as much as a full one."""

    batch: int
    wait_s: float
    padded: bool = False

    def __str__(self) -> str:
        return f"batch {self.batch}{' padded' if self.padded else ''}, wait {self.wait_s:.3g} s"


PREDECESSOR = Setting(batch=64, wait_s=10.0, padded=True)


class Place(NamedTuple):
    """A picture in the queue. Pictures of the same `kind`, which is size and number of steps, can share a batch."""

    since: float
    kind: Hashable
    request: Any
    number: int  # of the picture within its request


class Picture(NamedTuple):
    generation: Generation
    number: int

    @property
    def guided(self) -> bool:
        return self.generation.guided

    @property
    def rows(self) -> int:
        return self.generation.rows


def next_batch(queue: Sequence[Place], now: float, setting: Setting) -> tuple[list[Place], float]:
    """The batch to run now, or no batch and the time at which to look again.

    `queue` is in the order of arrival. The kind whose oldest picture has waited longest goes first.
    """
    kinds: dict[Hashable, list[Place]] = {}
    for place in queue:
        kinds.setdefault(place.kind, []).append(place)
    look_again = float("inf")
    for places in kinds.values():  # in the order of their oldest pictures
        due = places[0].since + setting.wait_s
        if len(places) >= setting.batch or now >= due:
            return places[: setting.batch], now
        look_again = min(look_again, due)
    return [], look_again


def kind_of(pipeline: Verbs, generation: Generation) -> Hashable:
    table = pipeline.table(generation.sampler, generation.num_inference_steps)
    return generation.width, generation.height, len(table)


def draw(pipeline: Verbs, state: Any, pictures: Sequence[Picture]) -> tuple[Any, Images]:
    """Draws pictures of the same size and number of steps with nothing but the pipeline's verbs."""
    generations = [picture.generation for picture in pictures]
    texts = list(dict.fromkeys(text for each in generations for text in (each.prompt, each.negative_prompt)))
    encoded = dict(zip(texts, pipeline.encode(texts), strict=True))
    for slot, (generation, number) in enumerate(pictures):
        state = pipeline.insert(
            state,
            slot,
            encoded[generation.prompt],
            encoded[generation.negative_prompt],
            pipeline.table(generation.sampler, generation.num_inference_steps),
            generation.guidance_scale,
            (generation.seed + number) % SEEDS,
        )
    active = [ActiveSlot(slot, picture.guided) for slot, picture in enumerate(pictures)]
    state, _ = pipeline.step(
        state, active, len(pipeline.table(generations[0].sampler, generations[0].num_inference_steps))
    )
    parts = list(in_parts(range(len(pictures)), pipeline.decode_buckets[-1]))
    decoded = [pipeline.decode(state, part) for part in parts]
    return state, np.concatenate([np.asarray(pixels)[: len(part)] for pixels, part in zip(decoded, parts, strict=True)])


def in_parts(slots: range, most: int) -> Iterable[range]:
    return (slots[first : first + most] for first in range(0, len(slots), most))


@dataclass
class _Request:
    """A request. Its future is set when its last picture is done."""

    generation: Generation
    future: "Future[Images]" = field(default_factory=Future)
    pixels: dict[int, Images] = field(default_factory=dict)


class WholeBatch:
    """Owns the queue, the state and a thread. `submit` returns a future of all pixels, as the engine's does."""

    def __init__(self, pipeline: Verbs, setting: Setting):
        self.pipeline = pipeline
        self.setting = setting
        self._queue: list[Place] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._states = {size: pipeline.empty_state(size) for size in pipeline.sizes}
        self._thread = threading.Thread(target=self._run, name="whole-batch", daemon=True)
        self._thread.start()

    def submit(self, generation: Generation) -> "Future[Images]":
        request = _Request(generation)
        kind = kind_of(self.pipeline, generation)
        with self._changed:
            now = time.monotonic()
            self._queue += [Place(now, kind, request, number) for number in range(generation.n)]
            self._changed.notify()
        return request.future

    def close(self) -> None:
        """Ends the thread after its current batch. Requests that still wait are dropped."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while batch := self._next():
            pictures = [Picture(place.request.generation, place.number) for place in batch]
            size = (pictures[0].generation.width, pictures[0].generation.height)
            if self.setting.padded:
                pictures += [pictures[-1]] * (self.setting.batch - len(pictures))
            try:
                self._states[size], pixels = draw(self.pipeline, self._states[size], pictures)
            except Exception as error:
                for place in batch:
                    if not place.request.future.done():
                        place.request.future.set_exception(error)
                self._states[size] = self.pipeline.empty_state(size)
                continue
            for place, picture in zip(batch, pixels, strict=False):
                answer(place, picture)

    def _next(self) -> list[Place]:
        """Waits for the next batch. It is empty when the server closes."""
        with self._changed:
            while not self._stopping:
                batch, look_again = next_batch(self._queue, time.monotonic(), self.setting)
                if batch:
                    taken = set(map(id, batch))
                    self._queue = [place for place in self._queue if id(place) not in taken]
                    return batch
                self._changed.wait(None if look_again == float("inf") else look_again - time.monotonic())
        return []


def answer(place: Place, picture: Images) -> None:
    request: _Request = place.request
    request.pixels[place.number] = picture
    if len(request.pixels) == request.generation.n and not request.future.done():
        request.future.set_result(np.stack([request.pixels[number] for number in range(request.generation.n)]))


def simulate(pipeline: Verbs, setting: Setting, requests: Sequence[Generation], arrivals: Seconds) -> Seconds:
    """The latency of each request from this server on a virtual clock, with the pipeline's measured times."""
    places = [
        Place(float(at), kind_of(pipeline, request), index, number)
        for index, (request, at) in enumerate(zip(requests, arrivals, strict=True))
        for number in range(request.n)
    ]
    finished = np.zeros(len(requests))
    queue: list[Place] = []
    now, arrived = 0.0, 0
    while queue or arrived < len(places):
        while arrived < len(places) and places[arrived].since <= now:
            queue.append(places[arrived])
            arrived += 1
        batch, look_again = next_batch(queue, now, setting)
        if not batch:
            now = min([look_again, *(place.since for place in places[arrived : arrived + 1])])
            continue
        now += batch_seconds(pipeline, [Picture(requests[place.request], place.number) for place in batch])
        taken = set(map(id, batch))
        queue = [place for place in queue if id(place) not in taken]
        for place in batch:
            finished[place.request] = now  # a later picture of the request overwrites it
    return finished - arrivals


def batch_seconds(pipeline: Verbs, pictures: Sequence[Picture]) -> float:
    """How long `draw` takes, by the pipeline's own measurements."""
    first = pictures[0].generation
    size = (first.width, first.height)
    rows = sum(picture.rows for picture in pictures)
    bucket = next(bucket for bucket in pipeline.row_buckets if bucket >= rows)
    evaluations = len(pipeline.table(first.sampler, first.num_inference_steps))
    decoding = 0.0
    for part in in_parts(range(len(pictures)), pipeline.decode_buckets[-1]):
        decoding += pipeline.decode_s[size, next(b for b in pipeline.decode_buckets if b >= len(part))]
    return pipeline.launch_s[size, bucket] + evaluations * pipeline.step_s[size, bucket] + decoding


def ranked(
    pipeline: Verbs,
    batches: Sequence[int],
    waits_s: Sequence[float],
    offers: Sequence[tuple[Sequence[Generation], Seconds]],
    score: Callable[[Sequence[Generation], Seconds], float],
) -> list[tuple[float, Setting]]:
    """Simulates each batch size with each wait on the given arrivals; the setting with the lowest mean score first."""
    scored = []
    for batch in batches:
        for wait_s in waits_s if batch > 1 else [0.0]:
            setting = Setting(batch, wait_s)
            scores = [score(requests, simulate(pipeline, setting, requests, arrivals)) for requests, arrivals in offers]
            scored.append((float(np.mean(scores)), setting))
    return sorted(scored, key=lambda pair: (pair[0], pair[1].batch, pair[1].wait_s))
