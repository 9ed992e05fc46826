"""How a replica hands its requests over: a real engine over the virtual pipeline, and Serve's word on others."""

import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from ray import serve
from ray.serve.schema import ServeStatus

from app.engine.engine import Engine
from app.engine.errors import HandedOver
from app.serving.draining import LAST_S, Drain, drain_with_serve
from tests.engine.driver import wide
from tests.fake_pipeline import WAIT_S, FakePipeline, flat, numbers, request


@pytest.fixture
def fake() -> FakePipeline:
    return wide(flat)


@pytest.fixture
def engine(fake: FakePipeline) -> Iterator[Engine]:
    engine = Engine(fake, max_waiting=20)
    engine.start()
    yield engine
    fake.open()
    engine.close()
    assert not fake.broken


def test_requests_leave_at_once_where_another_replica_runs(engine: Engine, fake: FakePipeline) -> None:
    fake.gates["wait"].clear()
    future = engine.submit(request(steps=10**6))
    assert fake.reached["step"].wait(WAIT_S)
    Drain(engine, lambda: True).begin(60.0)
    fake.open()
    error = future.exception(WAIT_S)
    assert isinstance(error, HandedOver) and error.resumed


def test_a_lone_replica_goes_on_until_another_runs(engine: Engine, fake: FakePipeline) -> None:
    fake.gates["wait"].clear()
    future, looked, another = engine.submit(request(steps=10**6)), threading.Event(), threading.Event()

    def others_run() -> bool:
        looked.set()
        return another.is_set()

    Drain(engine, others_run).begin(1e6)
    assert looked.wait(WAIT_S) and not future.done()
    another.set()
    fake.open()
    assert isinstance(future.exception(WAIT_S), HandedOver)


def test_a_lone_replica_finishes_what_it_can(engine: Engine) -> None:
    future = engine.submit(request(steps=20))
    drain = Drain(engine, lambda: False)
    drain.run(1e6)
    assert numbers(future.result(0)) == [30]


def test_what_is_left_at_the_end_leaves_even_if_no_other_replica_runs_yet(engine: Engine, fake: FakePipeline) -> None:
    fake.gates["wait"].clear()
    future = engine.submit(request(steps=10**6))
    Drain(engine, lambda: False).run(LAST_S)
    fake.open()
    assert isinstance(future.exception(WAIT_S), HandedOver)


def test_a_drain_ends_with_its_replica(engine: Engine, fake: FakePipeline) -> None:
    fake.gates["wait"].clear()
    future = engine.submit(request(steps=10**6))
    drain = Drain(engine, lambda: False)
    drain.ended.set()
    drain.run(1e6)
    assert not future.done()


@pytest.mark.parametrize(
    ("states", "leaves"), [({"STOPPING": 1, "RUNNING": 2}, True), ({"STOPPING": 1}, False), ({}, False)]
)
def test_whether_another_replica_runs_is_what_serves_status_says(
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    states: dict[str, int],
    leaves: bool,
) -> None:
    """Serve's own status, whose states are plain strings where they are declared as an enum."""
    deployment = SimpleNamespace(replica_states=states)
    application = SimpleNamespace(deployments={"StableDiffusion": deployment})
    context = SimpleNamespace(app_name="app", deployment="StableDiffusion")
    monkeypatch.setattr(serve, "get_replica_context", lambda: context)
    monkeypatch.setattr(serve, "status", lambda: SimpleNamespace(applications={"app": application}))
    monkeypatch.setattr("app.serving.draining.on_shutdown", lambda callback: None)
    assert drain_with_serve(engine).others_run() is leaves
    monkeypatch.setattr(serve, "status", ServeStatus)  # which has no applications, as while one is undeployed
    assert drain_with_serve(engine).others_run() is False and not caplog.records
