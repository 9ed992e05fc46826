"""A request of several images as several requests that replicas make side by side."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from starlette.testclient import TestClient

from app.api.errors import ApiError
from app.api.ingress import APIIngress
from app.api.messages import ImageRequest, Images
from app.api.parts import answer_of_parts, joined, parts_of
from app.api.settings import Encoding
from app.types import SEEDS, Generation
from tests.api.test_ingress import DESCRIPTION, SERVICE, Answer, Replicas, local_client, pictures, post

REQUEST = ImageRequest(Generation("a", "", 128, 128, 12, 3.5, 40, None, 3), Encoding(), 20.0)


@pytest.fixture
def replicas() -> Replicas:
    """Two, in which two rows share a step."""
    replicas = Replicas()
    replicas.running = [DESCRIPTION, DESCRIPTION]
    return replicas


@pytest.fixture
def client(replicas: Replicas) -> Iterator[TestClient]:
    with local_client(APIIngress(replicas, SERVICE)) as client:
        client.get("/v1/models")  # the ingress knows its replicas then
        yield client


def test_the_parts_make_the_same_images() -> None:
    request = replace(REQUEST, generation=replace(REQUEST.generation, seed=SEEDS - 1))
    parts = parts_of(request, 2)
    assert [(part.generation.seed, part.generation.n, part.siblings, part.counted) for part in parts] == [
        (SEEDS - 1, 2, 1, False),
        (1, 1, 2, True),
    ]
    assert parts_of(request, 3) == [request]


def test_an_answer_has_the_images_in_order_and_the_timings_of_the_slowest_part() -> None:
    first, second = (pictures(part) for part in parts_of(REQUEST, 2))
    second = replace(second, facts={**second.facts, "moves": 2}, timings={**second.timings, "queue_s": 9.0})
    whole = joined([first, second])
    assert whole.seeds == (40, 41, 42) and whole.encoded == (b"png 40", b"png 41", b"png 42")
    assert whole.facts == {**pictures(REQUEST).facts, "moves": 2}
    assert whole.timings == {"queue_s": 9.0, "denoise_s": 1.25, "device_s": 1.5}


def test_a_part_that_fails_ends_the_others() -> None:
    answers: list[Answer] = []

    async def send(request: ImageRequest) -> Any:
        refused = ApiError(503, "It is full.", None, "queue_full", 1.0)
        answers.append(Answer(None if request.generation.seed == 40 else refused))
        return answers[-1]

    async def ask() -> Images:
        async with asyncio.timeout(20):
            return await answer_of_parts(parts_of(REQUEST, 2), send)

    with pytest.raises(ApiError, match="It is full"):
        asyncio.run(ask())
    assert answers[0].cancelled


def test_replicas_share_a_request_that_none_of_them_could_run_at_once(client: TestClient, replicas: Replicas) -> None:
    answer = post(client, prompt="a", n=3, seed=7).json()
    assert [data["seed"] for data in answer["data"]] == [7, 8, 9] and answer["seed"] == 7
    assert sorted(request.generation.seed for (request,) in replicas.generate.calls) == [7, 8, 9]
    assert answer["timings"]["device_s"] == 3 * 0.75


def test_what_one_replica_can_run_at_once_stays_whole(client: TestClient, replicas: Replicas) -> None:
    post(client, prompt="a", n=2, guidance_scale=1)
    assert [request.generation.n for (request,) in replicas.generate.calls] == [2]


def test_a_request_stays_whole_while_two_models_run(replicas: Replicas) -> None:
    replicas.running = [replace(DESCRIPTION, model="tiny"), replace(DESCRIPTION, model="other")]
    with local_client(APIIngress(replicas, SERVICE)) as client:
        client.get("/v1/models")
        post(client, prompt="a", n=3)
    assert [request.generation.n for (request,) in replicas.generate.calls] == [3]
