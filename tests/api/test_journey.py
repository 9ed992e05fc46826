"""Requests that change replicas on their way: what the next replica gets, and what the client sees."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from app.api.errors import ApiError
from app.api.journey import Journey, StreamedJourney
from app.api.messages import Accepted, ImageRequest, Images, Moved, Preview
from app.api.replica_calls import ReplicaLost
from app.api.settings import Encoding
from app.types import Generation, Resumed
from tests.api.test_ingress import Answer, Items, pictures

REQUEST = ImageRequest(Generation("a house", "", 128, 128, 12, 3.5, 7, None, 1), Encoding(), 5.0, partial_images=3)
RESUMED = Resumed((), (), 1, (False, False), 0.5, 1.0)
IMAGES = pictures(REQUEST)
REFUSED = ApiError(503, "Too late.", "timeout", "deadline_unmeetable", 2.0)


def answered(*outcomes: Any, request: ImageRequest = REQUEST) -> tuple[Images, list[ImageRequest]]:
    """The answer of replicas with these outcomes, and the request as each of them got it."""
    sent: list[ImageRequest] = []

    async def send(request: ImageRequest) -> Any:
        sent.append(request)
        return Answer(outcomes[len(sent) - 1])

    async def answer() -> Images:
        return await Journey(request).answer(send)

    return asyncio.run(answer()), sent


def streamed(*streams: Sequence[Any]) -> tuple[list[Any], list[ImageRequest], list[Items]]:
    """What the client gets of replicas with these streams, what each of them got, and the streams."""
    sent: list[ImageRequest] = []
    items = [Items(stream) for stream in streams]

    async def send(request: ImageRequest) -> Any:
        sent.append(request)
        return items[len(sent) - 1]

    async def listen() -> list[Any]:
        journey = StreamedJourney(REQUEST, send)
        seen: list[Any] = []
        while not (seen and isinstance(seen[-1], Images)):
            seen.append(await journey.next_item())
        return seen

    return asyncio.run(listen()), sent, items


def test_an_answer_that_stays_in_its_place_says_nothing_of_moves() -> None:
    images, sent = answered(IMAGES)
    assert images == IMAGES and sent == [REQUEST]


def test_a_request_goes_on_elsewhere_with_what_was_made_of_it() -> None:
    images, sent = answered(Moved(RESUMED), Moved(None), IMAGES)
    assert images.facts == {**IMAGES.facts, "moves": 2}
    assert [request.resumed for request in sent] == [None, RESUMED, None]
    assert [request.moved for request in sent] == [False, True, True]
    assert all(request.generation == REQUEST.generation for request in sent)
    assert 0 < sent[2].age_s and sent[2].timeout_s == pytest.approx(5.0 - sent[2].age_s)


def test_a_replica_that_takes_nothing_any_more_is_no_move() -> None:
    images, sent = answered(Moved(accepted=False), Moved(accepted=False), IMAGES)
    assert images.facts == IMAGES.facts
    assert not any(request.moved for request in sent), "the usual limits hold for a request that nobody has accepted"


def test_a_moved_request_that_meets_a_draining_replica_keeps_its_state() -> None:
    images, sent = answered(Moved(RESUMED), Moved(accepted=False), IMAGES)
    assert images.facts["moves"] == 1 and sent[2].resumed == RESUMED and sent[2].moved


@pytest.mark.parametrize("end", [ActorDiedError(), asyncio.CancelledError(), Moved(lost=True)], ids=repr)
def test_a_lost_request_begins_again_once(end: Any) -> None:
    images, sent = answered(end, IMAGES)
    assert images.facts == {**IMAGES.facts, "restarts": 1}
    assert sent[1] == replace(REQUEST, moved=True, age_s=sent[1].age_s, timeout_s=sent[1].timeout_s)
    with pytest.raises(ReplicaLost):
        answered(end, end, IMAGES)


@pytest.mark.parametrize("streaming", [False, True], ids=["plain", "stream"])
def test_nothing_begins_again_for_a_client_that_goes_after_its_replica_was_cancelled(streaming: bool) -> None:
    """Ray cancels what a request has called, too: about one client of a dozen was drawn for, and counted, twice."""
    sent: list[ImageRequest] = []

    async def send(request: ImageRequest) -> Any:
        sent.append(request)
        return Items([]) if streaming else Answer(asyncio.CancelledError())

    async def leave() -> None:
        waiting = StreamedJourney(REQUEST, send).next_item() if streaming else Journey(REQUEST).answer(send)
        client: asyncio.Future[Any] = asyncio.ensure_future(waiting)
        await asyncio.sleep(0.05)
        client.cancel()
        with pytest.raises(asyncio.CancelledError):
            await client

    asyncio.run(leave())
    assert len(sent) == 1


def test_what_was_made_is_gone_with_the_replica_that_had_it() -> None:
    images, sent = answered(Moved(RESUMED), ActorDiedError(), IMAGES)
    assert sent[2].resumed is None and images.facts == {**IMAGES.facts, "moves": 1, "restarts": 1}


def test_the_next_replica_may_refuse() -> None:
    with pytest.raises(ApiError) as caught:
        answered(ActorDiedError(), REFUSED)
    assert caught.value.code == "deadline_unmeetable"


def test_a_request_does_not_look_for_a_replica_beyond_its_deadline() -> None:
    with pytest.raises(ApiError) as caught:
        answered(*[Moved(accepted=False)] * 9, request=replace(REQUEST, timeout_s=0.1))
    assert (caught.value.status, caught.value.message) == (504, "No picture within 0.1 s; the request was dropped.")


def test_a_stream_goes_on_without_a_gap_or_a_repeat() -> None:
    first, second, third = (Preview(index, bytes([index])) for index in range(3))
    seen, sent, _ = streamed([Accepted(), first, Moved(RESUMED)], [Accepted(), second, third, IMAGES])
    assert seen == [Accepted(), first, second, third, replace(IMAGES, facts={**IMAGES.facts, "moves": 1})]
    assert sent[1].resumed == RESUMED and sent[1].partial_images == 3


@pytest.mark.parametrize("end", [[ActorDiedError()], []], ids=["dead", "ended"])
def test_a_lost_stream_begins_again_and_shows_no_preview_twice(end: list[Any]) -> None:
    first, second = (Preview(index, bytes([index])) for index in range(2))
    seen, _, items = streamed([Accepted(), first, *end], [Accepted(), first, second, IMAGES])
    assert seen[:-1] == [Accepted(), first, second] and seen[-1].facts["restarts"] == 1
    assert items[0].cancelled and not items[1].cancelled


def test_a_client_that_leaves_stops_the_work_where_it_is_now() -> None:
    items = [Items([Accepted(), Moved(RESUMED)]), Items([Accepted(), None])]

    async def leave() -> None:
        streams, moved = iter(items), asyncio.Event()

        async def send(request: ImageRequest) -> Any:
            if request.moved:
                moved.set()
            return next(streams)

        journey = StreamedJourney(REQUEST, send)
        await journey.next_item()
        waiting = asyncio.ensure_future(journey.next_item())
        await moved.wait()
        await asyncio.sleep(0)
        journey.cancel()
        waiting.cancel()

    asyncio.run(leave())
    assert items[1].cancelled
