"""The replicas as the ingress calls them, over a handle that answers at once."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from app.api.messages import ImageRequest, Moved
from app.api.replicas import PlacedAnswer
from app.api.replicas import Replicas as Routed
from app.api.settings import Encoding
from app.types import Generation
from tests.api.test_ingress import Method, Replicas

REQUEST = ImageRequest(Generation("a", "", 128, 128, 12, 3.5, 40, None, 1), Encoding(), 20.0)


def run(test: Callable[[Routed, Replicas], Awaitable[None]]) -> None:
    async def within_time() -> None:
        handle = Replicas()
        routed = Routed(handle, 10)
        await routed.refresh()
        async with asyncio.timeout(20):
            await test(routed, handle)

    asyncio.run(within_time())


@pytest.mark.parametrize("asked_for", [True, False])
def test_a_replica_is_avoided_that_lets_go_of_a_request_unless_the_ingress_has_asked_for_it(asked_for: bool) -> None:
    async def test(routed: Routed, handle: Replicas) -> None:
        handle.generate = Method(lambda request: Moved())
        answer = await routed.send(REQUEST)
        assert isinstance(answer, PlacedAnswer)
        answer.place.moving = asked_for
        assert await answer == Moved()
        (replica,) = routed.dispatch.router.book.replicas.values()
        assert replica.usable(routed.dispatch.clock()) is asked_for

    run(test)


def test_a_replica_is_told_which_requests_to_let_go_by_the_names_that_they_came_with() -> None:
    async def test(routed: Routed, handle: Replicas) -> None:
        released = Method(lambda places: "done")  # None would be an answer that never comes
        vars(handle)["let_go"] = released
        answer = await routed.send(REQUEST)
        assert isinstance(answer, PlacedAnswer)
        ((request,),) = handle.generate.calls
        assert request.place == answer.place.id
        await routed.let_go("replica-0", [request.place])
        assert released.calls == [([request.place],)]

    run(test)
