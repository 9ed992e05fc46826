"""Requests wait for their places on an event loop, with replicas that are only reports."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

import pytest

from app.api.errors import ApiError
from app.api.messages import Report
from app.api.routing.dispatch import Dispatch, Place
from app.types import Generation
from tests.api.routing.test_router import report

GENERATION = Generation("a", "", 64, 64, 10, 1.0, 0, None, 1)


class Ingress:
    def __init__(self) -> None:
        self.reports: list[Report] = [report("a")]
        self.error: ApiError | None = None
        self.let_go: list[tuple[str, list[str]]] = []
        self.dispatch = Dispatch(100, self.poll, self.wake, self.names, self.let_go_of)

    async def let_go_of(self, replica: str, places: Sequence[str]) -> None:
        self.let_go.append((replica, sorted(places)))

    async def poll(self) -> None:
        names = [report.replica for report in self.reports]
        self.dispatch.reported(self.reports, names, polled=True)

    async def wake(self) -> None:
        if self.error:
            raise self.error
        await asyncio.Event().wait()

    async def names(self) -> list[str]:
        return [report.replica for report in self.reports]

    async def enter(self, seed: int = 0) -> Place:
        return await self.dispatch.enter(replace(GENERATION, seed=seed), 600.0)


def run(test: Callable[[Ingress], Awaitable[None]]) -> None:
    async def within_time() -> None:
        async with asyncio.timeout(20):
            await test(Ingress())

    asyncio.run(within_time())


def test_a_request_gets_its_place_at_once_and_leaves_nothing_behind() -> None:
    async def test(ingress: Ingress) -> None:
        await ingress.poll()
        with await ingress.enter() as place:
            assert place.replica == "a" and ingress.dispatch.stats()["replicas"]["a"]["requests"] == 1
        assert ingress.dispatch.stats()["replicas"]["a"]["requests"] == 0
        assert not ingress.dispatch.waiting and not ingress.dispatch.places

    run(test)


def test_a_request_waits_until_a_replica_reports() -> None:
    async def test(ingress: Ingress) -> None:
        reports, ingress.reports = ingress.reports, []
        entering = asyncio.ensure_future(ingress.enter())
        await asyncio.sleep(0)
        assert not entering.done() and ingress.dispatch.stats()["waiting"] == 1
        ingress.reports = reports
        (await entering).leave()

    run(test)


def test_a_request_in_parts_waits_and_ends_once_in_the_statistics() -> None:
    async def test(ingress: Ingress) -> None:
        ingress.reports = []
        parts = [
            asyncio.ensure_future(ingress.dispatch.enter(GENERATION, 600.0, siblings=1, counted=counted))
            for counted in (False, True)
        ]
        await asyncio.sleep(0)
        assert len(ingress.dispatch.waiting) == 2 and ingress.dispatch.stats()["waiting"] == 1
        for part in parts:
            part.cancel()
        await asyncio.wait(parts)
        assert ingress.dispatch.stats()["ended"]["cancelled"] == 1

    run(test)


def test_a_client_that_goes_takes_its_request_out_of_the_queue() -> None:
    async def test(ingress: Ingress) -> None:
        ingress.reports = []
        entering = asyncio.ensure_future(ingress.enter())
        await asyncio.sleep(0)
        entering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await entering
        stats = ingress.dispatch.stats()
        assert (stats["waiting"], stats["ended"]["cancelled"]) == (0, 1)

    run(test)


def test_requests_fail_where_no_replica_will_start() -> None:
    async def test(ingress: Ingress) -> None:
        ingress.reports, ingress.error = [], ApiError(503, "It has failed.", None, "deployment_failed", 30.0)
        with pytest.raises(ApiError, match="It has failed"):
            await ingress.enter()

    run(test)


def test_the_last_answers_of_a_replica_that_ends_do_not_list_it_again() -> None:
    async def test(ingress: Ingress) -> None:
        await ingress.poll()
        ingress.dispatch.gone("a")
        ingress.dispatch.reported([report("a")])
        assert not ingress.dispatch.stats()["replicas"]

    run(test)


def test_a_replica_that_starts_gets_requests_that_wait_in_another() -> None:
    async def test(ingress: Ingress) -> None:
        await ingress.poll()
        places = [await ingress.enter(seed) for seed in range(4)]
        for place in places:
            place.sent.rests_until = 0.0
        ingress.reports = [report("a", 4, 20.0), report("b")]
        await ingress.poll()
        moving = [place for place in places if place.sent in ingress.dispatch.router.book.replicas["b"].sent]
        assert len(moving) == 2
        await asyncio.sleep(0)
        assert ingress.let_go == [("a", sorted(place.id for place in moving))]
        assert [place.moving for place in places] == [place in moving for place in places]
        for place in moving:
            place.leave()
        again = await ingress.dispatch.enter(GENERATION, 600.0, again=True, age_s=5.0, left=[7])
        assert again.replica == "b" and again.sent.left == [7.0]
        assert ingress.dispatch.stats()["rebalanced"] == 2
        for place in [*places, again]:
            place.leave()

    run(test)
