"""Ingress and replicas in one process: replicas end, die and come while requests are on their way.

The replicas are real down to their engines' threads, over virtual pipelines. In place of Ray's handle stands one that
draws a replica by chance, also one that is ending.
"""

import asyncio
import itertools
import pickle
import random
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from app.api.errors import ApiError
from app.api.journey import Journey, StreamedJourney
from app.api.messages import ImageRequest, Images, Preview
from app.engine.virtual import number_of
from app.serving.replica import StableDiffusion
from tests.serving.test_metrics import recorded
from tests.serving.test_replica import SETTINGS, SPEC, asking, decoded, no_device

__all__ = ["no_device", "recorded"]  # fixtures

SEEDS = 3
REQUESTS, REPLICAS, FAULTS = 40, 3, 12
SPACING = 1000  # between seeds: more than any number of steps


class Cluster:
    """The replicas, and a handle's part of calling them. What is sent is pickled, as Ray would."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.replicas: list[Any] = []
        self.deaths: dict[Any, asyncio.Event] = {}
        self.ended: list[asyncio.Task[None]] = []
        self.numbers = itertools.count()

    def start(self) -> None:
        replica: Any = StableDiffusion(SPEC, **SETTINGS | {"max_waiting": REQUESTS})
        self.replicas.append(replica)
        self.deaths[replica] = asyncio.Event()

    def drain(self) -> None:
        """Requests may still be sent to it for a while."""
        replica = self.draw.choice([replica for replica in self.replicas if not replica.engine._draining])
        replica.engine.hand_over()

        async def end() -> None:
            await asyncio.sleep(0.01)
            if replica in self.replicas:  # else it was killed meanwhile
                self.replicas.remove(replica)
                await replica.shut_down()

        self.ended.append(asyncio.ensure_future(end()))
        self.start()

    def rebalance(self) -> None:
        """A replica is to let requests go, as the ingress has a better one."""
        replica = self.draw.choice(self.replicas)
        places = [*replica.places.futures]
        replica.places.let_go(self.draw.sample(places, len(places) // 2))

    def kill(self) -> None:
        replica = self.draw.choice(self.replicas)
        self.replicas.remove(replica)
        self.deaths[replica].set()
        self.ended.append(asyncio.ensure_future(replica.shut_down()))
        self.start()

    async def send(self, request: ImageRequest) -> Any:
        replica = self.draw.choice(self.replicas)
        return Response(replica.generate(self.placed(request)), self.deaths[replica])

    async def send_stream(self, request: ImageRequest) -> Any:
        replica = self.draw.choice(self.replicas)
        return Stream(replica.generate_stream(self.placed(request)), self.deaths[replica])

    def placed(self, request: ImageRequest) -> ImageRequest:
        placed: ImageRequest = copied(replace(request, place=f"{next(self.numbers)}"))
        return placed


def copied(message: Any) -> Any:
    return pickle.loads(pickle.dumps(message))


async def unless_dead(coroutine: Any, death: asyncio.Event) -> Any:
    """Raises ActorDiedError at once when the replica dies, as a handle does."""
    work, dying = asyncio.ensure_future(coroutine), asyncio.ensure_future(death.wait())
    try:
        await asyncio.wait({work, dying}, return_when=asyncio.FIRST_COMPLETED)
        if dying.done():
            raise ActorDiedError()
        return copied(work.result())
    finally:
        work.cancel()
        dying.cancel()
        await asyncio.gather(work, dying, return_exceptions=True)


class Response:
    def __init__(self, coroutine: Any, death: asyncio.Event) -> None:
        self.task = asyncio.ensure_future(unless_dead(coroutine, death))

    def __await__(self) -> Any:
        return self.task.__await__()

    def cancel(self) -> None:
        self.task.cancel()


class Stream:
    def __init__(self, items: AsyncIterator[Any], death: asyncio.Event) -> None:
        self.items, self.death = items, death

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> Any:
        async def next_item() -> Any:
            return await anext(self.items, None)

        item = await unless_dead(next_item(), self.death)
        if item is None:
            raise StopAsyncIteration
        return item

    def cancel(self) -> None:
        pass


async def pictured(cluster: Cluster, request: ImageRequest) -> Images | ApiError:
    try:
        if not request.stream:
            return await Journey(request).answer(cluster.send)
        journey, previews = StreamedJourney(request, cluster.send_stream), list[int]()
        while not isinstance(item := await journey.next_item(), Images):
            if isinstance(item, Preview):
                previews.append(item.index)
        assert previews == sorted(set(previews))
        return item
    except ApiError as error:
        return error


@pytest.mark.slow
def test_every_request_ends_in_its_own_picture_or_in_one_clear_error(no_device: None) -> None:
    seen = Counter[str]()
    for seed in range(SEEDS):
        seen.update(ended_well(random.Random(seed)))
    assert seen["moves"] and seen["lost"] < SEEDS * REQUESTS / 4, seen


def ended_well(draw: random.Random) -> Counter[str]:
    """Checks the answers of one run, and counts those that moved, began again or were lost."""

    async def serve() -> tuple[list[ImageRequest], list[Images | ApiError], list[Any]]:
        cluster = Cluster(draw)
        for _ in range(REPLICAS):
            cluster.start()
        requests = [
            asking(
                stream=(stream := draw.random() < 0.4),
                **{"n": 1 if stream else draw.randint(1, 3), "seed": SPACING * i, "timeout_s": 1e6},
                **{"num_inference_steps": draw.choice([4, 20, 300, 900]), "partial_images": 3 * stream},
            )
            for i in range(REQUESTS)
        ]
        answers = [asyncio.ensure_future(pictured(cluster, request)) for request in requests]
        for _ in range(FAULTS):
            await asyncio.sleep(draw.uniform(0.0, 0.05))
            draw.choice([cluster.drain, cluster.drain, cluster.rebalance, cluster.rebalance, cluster.kill])()
        outcomes = await asyncio.gather(*answers)
        await asyncio.gather(*cluster.ended)
        engines = [replica.engine.stats() for replica in cluster.deaths]
        for replica in cluster.replicas:
            await replica.shut_down()
        return requests, outcomes, engines

    requests, outcomes, engines = asyncio.run(serve())
    seen = Counter[str]()
    for request, outcome in zip(requests, outcomes, strict=True):
        if isinstance(outcome, ApiError):
            assert (outcome.status, outcome.code) == (503, "replica_lost") and outcome.retry_after_s
            seen["lost"] += 1
            continue
        generation = request.generation
        shown = [number_of(decoded(file)) for file in outcome.encoded]
        assert shown == [generation.seed + i + generation.num_inference_steps for i in range(generation.n)]
        seen.update(fact for fact in ("moves", "restarts") if fact in outcome.facts)
    assert all(stats["unfinished"] == 0 for stats in engines)
    return seen
