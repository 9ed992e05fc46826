"""Several simulated replicas: real engines, the real queue, book and router, and a virtual clock."""

from typing import Any

import numpy as np
import pytest

from app.engine.virtual import VirtualClock
from app.types import Generation
from benchmarks.load import equal_requests, mixed_requests
from benchmarks.load import request as request_of
from benchmarks.paced import Pace, PacedPipeline
from capacity.cluster_simulation import Arrival, Cluster, Outcome, Routing
from capacity.simulate import Load, Timings, pipeline_of, request
from capacity.simulate import simulate as simulate_one
from loadtest.arrivals import poisson

PACE = Pace(chips=4, step_s=0.1)
SIZE = (2, 2)


def device(clock: VirtualClock) -> PacedPipeline:
    return PacedPipeline(PACE, batch_buckets=(1, 2, 4), size=SIZE, clock=clock)


def equal(at: list[float], key: str | None = None, steps: int = 20) -> list[Arrival]:
    requests = equal_requests(len(at), SIZE, steps=steps, guidance_scale=1.0)
    return [Arrival(moment, generation, key) for moment, generation in zip(at, requests, strict=True)]


@pytest.mark.slow
def test_one_replica_behind_the_router_is_as_fast_as_the_engine_alone() -> None:
    timings = Timings({1: 0.1, 2: 0.1, 4: 0.1, 8: 0.2}, {1: 0.0, 2: 0.0, 4: 0.0})
    arrivals = poisson(24, np.random.default_rng(0)) * 0.8
    alone = simulate_one(timings, Load(arrivals, 20), gain=0.05, max_waiting=1000)
    load = Load(arrivals, 20)
    requests = [Arrival(float(at), request(number, load)) for number, at in enumerate(arrivals)]
    routed = Cluster(lambda clock: pipeline_of(timings, clock), 1, way_s=0.0).run(requests)
    assert routed.latencies.mean() == pytest.approx(alone.latencies.mean(), rel=0.05)


@pytest.mark.slow
def test_every_request_is_answered_and_the_book_is_empty_in_the_end() -> None:
    cluster = Cluster(device, 3)
    rng = np.random.default_rng(1)
    arrivals = [
        Arrival(float(at), generation)
        for at, generation in zip(poisson(24, rng) * 0.7, mixed_requests(24, SIZE, rng), strict=True)
    ]
    outcome = cluster.run(arrivals)
    assert not np.isnan(outcome.latencies).any()
    for replica in cluster.router.book.replicas.values():
        assert not replica.sent and replica.backlog_s() == 0
    assert not cluster.router.queue.active


def drained_s(routing: Routing, starting: int) -> float:
    cluster = Cluster(device, 1, routing=routing, start_s=0.5)
    cluster.at(0.0, lambda: cluster.scale(1 + starting))
    outcome = cluster.run(equal([0.0] * 100, steps=4))
    return float(outcome.latencies.max())


@pytest.mark.slow
def test_three_replicas_that_start_drain_a_backlog_in_at_most_0_35_of_the_time() -> None:
    assert drained_s("book", 3) <= 0.35 * drained_s("book", 0)
    assert drained_s("serve", 3) > 0.9 * drained_s("serve", 0), "of what waits in a replica, others get nothing"


def mixed(**fields: Any) -> Generation:
    return request_of(SIZE, 0, **fields)


def latency_of(outcome: Outcome, last: int) -> float:
    return float(np.quantile(outcome.latencies[-last:], 0.95))


@pytest.mark.slow
def test_a_flood_of_one_key_does_not_delay_another_beyond_its_share() -> None:
    rare = equal([0.55 + 1.1 * i for i in range(4)], key="rare", steps=10)
    alone = latency_of(Cluster(device, 2).run(rare), 4)
    flood = equal([0.0] * 80, key="flood", steps=5)
    assert latency_of(Cluster(device, 2).run([*flood, *rare]), 4) <= 1.5 * alone
    anonymous = [Arrival(arrival.at, arrival.generation) for arrival in [*flood, *rare]]
    assert latency_of(Cluster(device, 2).run(anonymous), 4) > 2 * alone


@pytest.mark.slow
def test_requests_that_wait_in_a_replica_move_to_one_that_starts() -> None:
    cluster = Cluster(device, 1, start_s=0.6)
    cluster.at(0.0, lambda: cluster.scale(2))
    outcome = cluster.run(equal([0.0] * 8, steps=40))
    assert cluster.moves == 4 and outcome.latencies.max() < 0.7 * 8.0
    assert not any(replica.sent for replica in cluster.router.book.replicas.values())


@pytest.mark.slow
def test_replicas_share_the_images_of_a_request() -> None:
    four_guided = Arrival(0.0, mixed(steps=20, guidance_scale=4.0, n=4))
    alone, shared = (float(Cluster(device, count).run([four_guided]).latencies[0]) for count in (1, 2))
    assert shared < 0.6 * alone
