"""The tools of benchmarks/: the baseline, the paced pipeline, the loads and the figures. Speed itself is not tested."""

import asyncio
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from app.builders import Args
from app.diffusion.models.config import UNetConfig
from app.engine.engine import Engine
from app.engine.virtual import Done, State, number_of
from app.types import ActiveSlot, Generation
from benchmarks.against_torch import CASES, read
from benchmarks.figures import Figure, missed, table_of
from benchmarks.load import MIXED_KINDS, equal_requests, mixed_requests, offer, request
from benchmarks.overhead import ask as ask_over_http
from benchmarks.overhead import read_config
from benchmarks.paced import Pace, PacedPipeline
from benchmarks.whole_batch import (
    Picture,
    Place,
    Setting,
    WholeBatch,
    batch_seconds,
    draw,
    next_batch,
    ranked,
    simulate,
)
from loadtest.arrivals import poisson

SIZE = (16, 8)
WAIT_S = 60.0
FAST = Pace(chips=2, step_s=1e-4, decode_steps=1.0)


@pytest.fixture
def paced() -> PacedPipeline:
    return PacedPipeline(FAST, batch_buckets=[1, 2, 4], size=SIZE)


class Recorded(PacedPipeline):
    """Records the active rows and the count of every step. `fail` makes the next step raise."""

    def __init__(self) -> None:
        super().__init__(FAST, batch_buckets=[1, 2, 4], size=SIZE)
        self.steps: list[tuple[int, int]] = []
        self.fail = False

    def step(self, state: State, active: Sequence[ActiveSlot], count: int) -> tuple[State, Done]:
        if self.fail:
            self.fail = False
            raise RuntimeError("step failed")
        self.steps.append((sum(slot.rows for slot in active), count))
        return super().step(state, active, count)


def ask(seed: int, *, steps: int = 3, **other: Any) -> Generation:
    return request(SIZE, seed, steps=steps, **other)


def shown(pixels: np.ndarray) -> list[int]:
    assert pixels.shape[1:] == (SIZE[1], SIZE[0], 3) and pixels.dtype == np.uint8
    return [number_of(image) for image in pixels]


def inserted(pipeline: PacedPipeline, state: State, slot: int) -> State:
    """The state with a guided image of a hundred steps in the slot."""
    (prompt,) = pipeline.encode(["a boat"])
    return pipeline.insert(state, slot, prompt, prompt, pipeline.table(None, 100), 7.5, 0)


# The paced pipeline


def test_a_paced_picture_is_its_seed_and_its_steps(paced: PacedPipeline) -> None:
    state, pixels = draw(paced, paced.empty_state(SIZE), [Picture(ask(10), 0), Picture(ask(20), 1)])
    assert shown(pixels) == [13, 24]
    _, pixels = draw(paced, state, [Picture(ask(250, steps=7), 0)])
    assert shown(pixels) == [257]


def test_paced_steps_are_flat_up_to_the_chips_and_then_in_proportion() -> None:
    pipeline = PacedPipeline(Pace(chips=8, step_s=0.01, decode_steps=3), batch_buckets=[1, 4, 8, 16], size=SIZE)
    assert pipeline.row_buckets == (1, 2, 4, 8, 16, 32)
    assert [pipeline.step_s[SIZE, rows] for rows in pipeline.row_buckets] == [0.01, 0.01, 0.01, 0.01, 0.02, 0.04]
    assert pipeline.decode_buckets == (1, 4, 8) and set(pipeline.decode_s.values()) == {0.03}


def test_verbs_queue_on_the_device_and_wait_returns_when_the_step_is_done(paced: PacedPipeline) -> None:
    began = time.monotonic()
    active = [ActiveSlot(0, True), ActiveSlot(1, True)]  # four rows on two chips
    state = inserted(paced, inserted(paced, paced.empty_state(SIZE), 0), 1)
    state, first = paced.step(state, active, 50)
    _, second = paced.step(state, active, 50)
    assert second.ready_at - first.ready_at == pytest.approx(50 * 2e-4)
    assert first.ready_at >= began + 50 * 2e-4
    paced.wait(second)
    assert time.monotonic() >= second.ready_at


def test_a_consumed_state_cannot_be_used_again(paced: PacedPipeline) -> None:
    state = inserted(paced, paced.empty_state(SIZE), 0)
    paced.step(state, [ActiveSlot(0, True)], 1)
    with pytest.raises(AssertionError, match="used again"):
        paced.step(state, [ActiveSlot(0, True)], 1)


# The baseline


def place(since: float, kind: str = "", number: int = 0) -> Place:
    return Place(since, kind, None, number)


def test_a_batch_runs_when_it_is_full_or_its_oldest_picture_has_waited() -> None:
    queue = [place(1.0), place(2.0), place(3.0)]
    assert next_batch(queue, 3.0, Setting(4, 5.0)) == ([], 6.0)
    assert next_batch(queue, 6.0, Setting(4, 5.0)) == (queue, 6.0)
    assert next_batch(queue, 3.0, Setting(2, 5.0)) == (queue[:2], 3.0)
    assert next_batch([], 3.0, Setting(2, 5.0)) == ([], float("inf"))


def test_kinds_do_not_share_a_batch_and_the_oldest_goes_first() -> None:
    queue = [place(1.0, "a"), place(2.0, "b"), place(3.0, "a"), place(3.5, "b")]
    assert next_batch(queue, 4.0, Setting(2, 0.0))[0] == [queue[0], queue[2]]
    assert next_batch(queue, 4.0, Setting(8, 3.5)) == ([], 4.5)
    assert next_batch(queue[1:], 4.0, Setting(2, 9.0))[0] == [queue[1], queue[3]], (
        "a full batch runs although an older picture waits"
    )


@pytest.fixture
def recorded() -> Recorded:
    return Recorded()


def served(pipeline: Recorded, setting: Setting, requests: Sequence[Generation]) -> list[Any]:
    server = WholeBatch(pipeline, setting)
    try:
        return [future.result(WAIT_S) for future in [server.submit(generation) for generation in requests]]
    finally:
        server.close()


def test_whole_batches_answer_each_request_with_its_own_pictures(recorded: Recorded) -> None:
    requests = [ask(10), ask(20, n=3), ask(30, steps=5), ask(40, guidance_scale=1.0)]
    pictures = served(recorded, Setting(4, 0.05), requests)
    assert [shown(pixels) for pixels in pictures] == [[13], [23, 24, 25], [35], [43]]


def test_a_request_may_need_several_batches(recorded: Recorded) -> None:
    (pictures,) = served(recorded, Setting(2, 0.0), [ask(10, n=5)])
    assert shown(pictures) == [13, 14, 15, 16, 17]
    assert recorded.steps == [(4, 3), (4, 3), (2, 3)]


def test_an_unguided_picture_costs_a_row_and_a_padded_batch_costs_a_full_one(recorded: Recorded) -> None:
    requests = [ask(10, guidance_scale=1.0)]
    assert served(recorded, Setting(4, 0.0), requests)[0].shape[0] == 1
    assert served(recorded, Setting(4, 0.0, padded=True), requests)[0].shape[0] == 1
    assert recorded.steps == [(1, 3), (4, 3)]


def test_a_failed_batch_fails_its_requests_and_the_next_batch_runs(recorded: Recorded) -> None:
    recorded.fail = True
    server = WholeBatch(recorded, Setting(1, 0.0))
    try:
        with pytest.raises(RuntimeError, match="step failed"):
            server.submit(ask(10)).result(WAIT_S)
        assert shown(server.submit(ask(20)).result(WAIT_S)) == [23]
    finally:
        server.close()


def test_the_simulation_is_the_baseline_on_a_virtual_clock() -> None:
    pipeline = PacedPipeline(Pace(chips=4, step_s=1.0), batch_buckets=[1, 2, 4], size=SIZE)
    requests = [ask(seed, steps=10, guidance_scale=1.0) for seed in range(3)]
    arrivals = np.array([0.0, 1.0, 2.0])
    assert batch_seconds(pipeline, [Picture(generation, 0) for generation in requests]) == 10.0
    assert simulate(pipeline, Setting(4, 0.0), requests, arrivals).tolist() == [10.0, 19.0, 18.0]
    assert simulate(pipeline, Setting(4, 2.0), requests, arrivals).tolist() == [12.0, 11.0, 10.0]
    assert simulate(pipeline, Setting(1, 0.0), requests, arrivals).tolist() == [10.0, 19.0, 28.0]
    longer = [requests[0], replace(requests[1], num_inference_steps=5), requests[2]]
    assert simulate(pipeline, Setting(4, 2.0), longer, arrivals).tolist() == [12.0, 16.0, 10.0]
    together = [replace(requests[0], n=3)]  # the last picture counts
    assert simulate(pipeline, Setting(2, 0.0), together, arrivals[:1]).tolist() == [20.0]


def test_settings_are_ranked_by_their_simulated_score() -> None:
    pipeline = PacedPipeline(Pace(chips=4, step_s=1.0), batch_buckets=[1, 2, 4], size=SIZE)
    offers = [([ask(seed, steps=10, guidance_scale=1.0) for seed in range(3)], np.array([0.0, 1.0, 2.0]))]
    ranking = ranked(pipeline, [1, 4], [0.0, 2.0], offers, lambda _, latencies: float(latencies.mean()))
    assert [(setting.batch, setting.wait_s) for _, setting in ranking] == [(4, 2.0), (4, 0.0), (1, 0.0)]
    assert [score for score, _ in ranking] == sorted(score for score, _ in ranking)


# The loads


def test_mixed_requests_have_every_kind_and_are_the_same_each_time() -> None:
    first, again = (mixed_requests(40, SIZE, np.random.default_rng(3)) for _ in range(2))
    assert first == again and len(first) == 40
    assert (
        len({(each.num_inference_steps, each.guidance_scale, each.n) for each in first[:32]}) == len(MIXED_KINDS) == 32
    )


@pytest.mark.slow
def test_latency_counts_from_the_intended_arrival_and_an_error_is_raised() -> None:
    def submit(generation: Generation) -> "Future[Any]":
        future: Future[Any] = Future()
        if generation.seed < 2:
            future.set_result(np.zeros((generation.n, 1)))
        else:
            future.set_exception(RuntimeError("no picture"))
        return future

    requests = equal_requests(3, SIZE, steps=3, guidance_scale=1.0)
    offered = offer(submit, requests[:2], poisson(2, np.random.default_rng(0)) / 1000)
    assert (offered.latencies >= 0).all() and offered.makespan_s > 0
    with pytest.raises(RuntimeError, match="no picture"):
        offer(submit, requests, np.zeros(3))
    with pytest.raises(AssertionError, match="got"):
        offer(lambda _: submit(requests[0]), [replace(requests[0], n=2)], np.zeros(1))


@pytest.fixture
def engine(paced: PacedPipeline) -> Iterator[Engine]:
    engine = Engine(paced, max_waiting=1000)
    engine.start()
    yield engine
    engine.close()


def test_the_engine_and_the_baseline_make_the_same_pictures(engine: Engine, recorded: Recorded) -> None:
    requests = mixed_requests(40, SIZE, np.random.default_rng(5))
    by_engine = [future.result(WAIT_S).pixels for future in [engine.submit(generation) for generation in requests]]
    by_baseline = served(recorded, Setting(4, 0.0), requests)
    assert list(map(shown, by_engine)) == list(map(shown, by_baseline))


def test_http_clients_send_each_request_once_and_a_refusal_is_an_error() -> None:
    requests = [ask(seed, guidance_scale=2.0) for seed in range(7)]
    bodies: list[dict[str, Any]] = []

    async def answer(incoming: web.Request) -> web.Response:
        bodies.append(await incoming.json())
        return web.Response(status=200 if len(bodies) <= 7 else 503, body=b"full")

    async def served() -> None:
        app = web.Application()
        app.router.add_post("/", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            url = f"http://127.0.0.1:{runner.addresses[0][1]}/"
            await ask_over_http(url, requests, 3)
            assert sorted(body["seed"] for body in bodies) == list(range(7))
            assert all(body["num_inference_steps"] == 3 and body["guidance_scale"] == 2.0 for body in bodies)
            with pytest.raises(RuntimeError, match="The server answers 503: b'full'"):
                await ask_over_http(url, requests, 3)
        finally:
            await runner.cleanup()

    asyncio.run(served())


def test_the_baselines_config_is_the_shipped_one_with_a_single_replica() -> None:
    config = read_config()
    (replica,) = [
        deployment for deployment in config["applications"][0]["deployments"] if deployment["name"] == "StableDiffusion"
    ]
    assert replica["num_replicas"] == 1 and "autoscaling_config" not in replica
    assert Args(**config["applications"][0]["args"])


# The figures


def test_a_bar_holds_for_the_median_of_the_runs() -> None:
    latency = Figure("device", "workload", "p50", 0.7)
    throughput = Figure("device", "workload", "images/s", 0.95, at_most=False)
    reported = Figure("device", "workload", "p99", None)
    for figure in (latency, throughput, reported):
        for ours in (6.0, 6.5, 9.0):
            figure.add(ours, 10.0)
    assert (latency.met, throughput.met, reported.met) == (True, False, None)
    assert missed([latency, throughput]) and not missed([latency, reported])
    assert table_of([latency, throughput, reported], "title").row_count == 1 + 3
    assert latency.facts()["met"] is True and latency.facts()["ours"] == [6.0, 6.5, 9.0]


@pytest.mark.parametrize("name", CASES)
def test_the_networks_that_are_compared_with_pytorch_are_supported(name: str) -> None:
    problems: list[str] = []
    UNetConfig.from_json(read(CASES[name]), problems)
    assert not problems
