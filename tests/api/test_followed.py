"""A stream tells the place of its request while that waits in the ingress."""

import asyncio
from typing import Any

import pytest

from app.api.errors import ApiError
from app.api.followed import FollowedJourney
from app.api.messages import Accepted, Preview, Progress
from app.api.routing.costs import Work
from app.api.routing.queue import Queue, Ticket

WAITS = Progress("waiting", 3, 0, 20, 4.5)


class Journey:
    """Gets its first item when `gate` opens."""

    def __init__(self, *items: Any) -> None:
        self.items = iter(items)
        self.gate = asyncio.Event()
        self.cancelled = False

    async def next_item(self) -> Any:
        await self.gate.wait()
        item = next(self.items)
        if isinstance(item, Exception):
            raise item
        return item

    def cancel(self) -> None:
        self.cancelled = True


def test_the_place_is_told_until_a_replica_has_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.api.followed.PROGRESS_S", 0.001)

    async def follow() -> list[Any]:
        journey: Any = Journey(Accepted(), Preview(0, b"a"))
        followed = FollowedJourney(journey, lambda: None if journey.gate.is_set() else WAITS)
        await followed.admitted()
        first = await followed.next_item()
        journey.gate.set()
        return [first, await followed.next_item()]

    assert asyncio.run(follow()) == [WAITS, Preview(0, b"a")]


def test_a_refusal_comes_before_the_answer_begins() -> None:
    async def follow() -> None:
        journey: Any = Journey(ApiError(503, "Full.", None, "queue_full", 1.0))
        journey.gate.set()
        await FollowedJourney(journey, lambda: None).admitted()

    with pytest.raises(ApiError, match="Full"):
        asyncio.run(follow())


def test_a_client_that_leaves_the_queue_leaves_nothing_behind() -> None:
    async def follow() -> bool:
        journey: Any = Journey()
        followed = FollowedJourney(journey, lambda: WAITS)
        await followed.admitted()
        followed.cancel()
        await asyncio.wait({followed.accepted})
        return followed.accepted.cancelled() and journey.cancelled

    assert asyncio.run(follow())


def test_the_place_counts_what_goes_before_of_the_same_key_and_fairly_of_others() -> None:
    queue, work = Queue(), Work("64x64", 1, 2, 20)
    alices = [Ticket(work, device_s, 0.0, "alice") for device_s in (3.0, 1.0, 2.0)]
    bobs = [Ticket(work, 1.0, 0.0, "bob") for _ in range(2)]
    for ticket in (*alices, *bobs):
        queue.add(ticket)
    assert [queue.ahead(ticket) for ticket in alices] == [4, 1, 3]
    assert [queue.ahead_s(ticket) for ticket in alices[:2]] == [5.0, 1.0]
