"""The descriptions of the replicas and how long they are valid, on a clock that the tests set."""

import asyncio
from typing import Any

from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError

from app.api.messages import Description
from app.api.replica_watch import FRESH_S, STALE_S, ReplicaWatch

ONE, OTHER = Description(("euler",), "euler", "one"), Description(("ddim",), "ddim", "other")


class Replicas:
    def __init__(self, *answers: object) -> None:
        self.answers: tuple[object, ...] | Exception = answers
        self.rounds = 0
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.now = 100.0

    async def __call__(self) -> Any:
        self.rounds += 1
        await self.may_answer.wait()
        if isinstance(self.answers, Exception):
            raise self.answers
        return self.answers

    def watch(self) -> ReplicaWatch:
        return ReplicaWatch(self, lambda: self.now)


def test_a_fresh_description_is_not_requested_again() -> None:
    async def ask() -> None:
        replicas = Replicas(ONE)
        watch = replicas.watch()
        for _ in range(3):
            assert await watch.descriptions(0, 1) == (ONE,)
        assert replicas.rounds == 1
        replicas.now += 1.1 * FRESH_S
        assert await watch.descriptions(0, 1) == (ONE,)
        await asyncio.sleep(0)
        assert replicas.rounds == 2

    asyncio.run(ask())


def test_all_callers_share_one_round_of_questions() -> None:
    async def ask() -> None:
        replicas = Replicas(ONE)
        replicas.may_answer.clear()
        watch = replicas.watch()
        asking = [asyncio.ensure_future(watch.descriptions(0, 10)) for _ in range(200)]
        await asyncio.sleep(0)
        replicas.may_answer.set()
        assert await asyncio.gather(*asking) == [(ONE,)] * 200
        assert replicas.rounds == 1

    asyncio.run(ask())


def test_descriptions_of_busy_replicas_stay_valid_for_a_while_and_nobody_waits() -> None:
    async def ask() -> None:
        replicas = Replicas(ONE)
        watch = replicas.watch()
        await watch.descriptions(0, 1)
        replicas.may_answer.clear()
        replicas.now += 0.9 * STALE_S
        assert await watch.descriptions(0.01, 60) == (ONE,)
        replicas.now += 0.2 * STALE_S
        assert await watch.descriptions(0.01, 0.01) == ()

    asyncio.run(ask())


def test_a_cancelled_caller_does_not_stop_the_round_for_the_others() -> None:
    async def ask() -> None:
        replicas = Replicas(ONE)
        replicas.may_answer.clear()
        watch = replicas.watch()
        leaving, staying = (asyncio.ensure_future(watch.descriptions(0, 10)) for _ in range(2))
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.sleep(0)
        replicas.may_answer.set()
        assert await staying == (ONE,)

    asyncio.run(ask())


def test_when_no_replica_runs_the_descriptions_are_dropped() -> None:
    async def ask() -> None:
        replicas = Replicas(ONE)
        watch = replicas.watch()
        await watch.descriptions(0, 1)
        replicas.answers = DeploymentUnavailableError(DeploymentID("StableDiffusion"))
        replicas.now += 1.1 * FRESH_S
        assert await watch.descriptions(1, 1) == ()
        replicas.answers = (OTHER,)
        assert await watch.descriptions(1, 1) == (OTHER,)

    asyncio.run(ask())


def test_a_failed_round_gives_no_answer_and_is_repeated() -> None:
    async def ask() -> None:
        replicas = Replicas(ONE)
        watch = replicas.watch()
        await watch.descriptions(0, 1)
        replicas.now += 1.1 * FRESH_S
        replicas.answers = RuntimeError("Serve is confused")
        assert await watch.descriptions(1, 1) == (ONE,)
        replicas.answers = (None, "busy", OTHER, ONE, OTHER)
        assert await watch.descriptions(1, 1) == (OTHER, OTHER, ONE)

    asyncio.run(ask())
