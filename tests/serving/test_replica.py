"""The replica's class, called as Serve calls it: the real engine, over a fake pipeline."""

import asyncio
import json
import logging
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import fields, replace
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from ray.serve._private.common import DeploymentID
from ray.serve._private.config import DeploymentConfig
from ray.serve._private.replica import UserCallableWrapper

from app.api.errors import ApiError
from app.api.messages import Accepted, Description, ImageRequest, Images, Moved, Preview, Progress
from app.api.parts import parts_of
from app.api.settings import Encoding
from app.engine.engine import Engine
from app.engine.errors import DeadlineUnmeetable, EngineStopped, QueueFull
from app.engine.virtual import number_of
from app.serving.refusals import refusal
from app.serving.replica import StableDiffusion
from app.types import Capabilities, Generation, PipelineSpec, RequestDefaults
from tests.clusters import soon as soon_true
from tests.fake_pipeline import SMALL, FakePipeline
from tests.serving.test_metrics import Recorded, recorded

__all__ = ["recorded"]  # a fixture

WIDTH, HEIGHT = SMALL
ASKED = ImageRequest(Generation("a secret garden", "fog", WIDTH, HEIGHT, 5, 4.0, 2**32 - 1, None, 2), Encoding(), 60.0)
SPEC = PipelineSpec("/models/tiny", sizes=(SMALL,), batch_buckets=(1, 2), max_steps=50, programs=Path("/programs"))


class Pipeline(FakePipeline):
    samplers = ("ddim", "pndm")
    notes = ("The checkpoint names another.",)
    request_defaults = RequestDefaults(4, 1.0)
    request_fields = ("target_size",)
    events: list[Any]

    @classmethod
    def load(cls, spec: PipelineSpec) -> "Pipeline":
        pipeline = cls(sizes=(SMALL,), decode_time=lambda size, images: 0.01)
        pipeline.events = [("load", spec)]
        return pipeline

    def warmup(self) -> None:
        self.events.append("warmup")


class CompileWatch:
    def __init__(self) -> None:
        self.count = 0
        self.watching = False

    def ready(self) -> None:
        self.watching = True

    def close(self) -> None:
        self.watching = False


@pytest.fixture
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        sys.modules, "app.diffusion.pipeline", SimpleNamespace(Pipeline=Pipeline)
    )  # the real ones import JAX
    monkeypatch.setitem(sys.modules, "app.aot.compile", SimpleNamespace(CompileWatch=CompileWatch))
    monkeypatch.setattr("app.serving.description.device", lambda: "abacus x2")


SETTINGS: dict[str, Any] = {
    "name": "tiny",
    "max_waiting": 2,
    "images_at_once": 1,
    "admission_gain": 0.125,
    "prompt_cache": 16,
    "encoding_threads": 3,
    "stall_s": 60.0,
}


@pytest.fixture
def replica(no_device: None) -> Iterator[Any]:
    replica: Any = StableDiffusion(SPEC, **SETTINGS)
    yield replica
    replica.pipeline.open()
    asyncio.run(replica.shut_down())
    assert not replica.pipeline.broken


def asking(stream: bool = False, **changes: Any) -> ImageRequest:
    request = {field.name: changes.pop(field.name) for field in fields(ImageRequest) if field.name in changes}
    return replace(ASKED, stream=stream, generation=replace(ASKED.generation, **changes), **request)


def generate(replica: Any, **changes: Any) -> Any:
    return asyncio.run(replica.generate(asking(**changes)))


def streamed(replica: Any, **changes: Any) -> list[Any]:
    async def listen() -> list[Any]:
        return [item async for item in replica.generate_stream(asking(stream=True, **{"n": 1} | changes))]

    return asyncio.run(listen())


def decoded(encoded: bytes) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(encoded)))


def outcomes(recorded: Recorded) -> list[str]:
    return [tags["outcome"] for name, _, tags in recorded if name == "imagine_requests"]


def soon(event: threading.Event) -> bool:
    return event.wait(20)


def test_a_replica_is_warm_before_it_watches_for_compiles_and_starts_its_engine(replica: Any) -> None:
    assert replica.pipeline.events == [("load", SPEC), "warmup"]
    assert replica.compiles.watching and replica.engine.healthy
    assert (replica.engine.max_waiting, replica.engine.images_at_once, replica.engine.gain) == (2, 1, 0.125)
    assert replica.encoders.threads._max_workers == 3


def test_a_stream_tells_how_far_it_is_where_the_request_asks_for_it(
    replica: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.serving.replica.PROGRESS_S", 0.01)
    replica.pipeline.gates["step"].clear()

    async def listen() -> list[Any]:
        items: list[Any] = []
        async for item in replica.generate_stream(asking(stream=True, n=1, progress=True)):
            items.append(item)
            if len(items) == 4:
                replica.pipeline.open()
        return items

    accepted, *progress, images = asyncio.run(listen())
    assert isinstance(accepted, Accepted) and isinstance(images, Images) and len(progress) >= 3
    assert all(isinstance(item, Progress) and item.total_steps == 5 and item.left_s > 0 for item in progress)
    assert progress[0].status in ("waiting", "running") and progress[0].steps == 0


def test_an_answer_says_what_made_it_and_how_long_that_took(replica: Any) -> None:
    images = generate(replica)
    assert isinstance(images, Images)
    assert images.seeds == (2**32 - 1, 0)
    assert images.facts == {
        "seed": 2**32 - 1,
        "sampler": "ddim",
        "num_inference_steps": 5,
        "guidance_scale": 4.0,
        "size": f"{WIDTH}x{HEIGHT}",
        "prompt_truncated": False,
        "negative_prompt_truncated": False,
    }
    assert set(images.timings) == {"queue_s", "denoise_s", "decode_s", "encode_s", "device_s"}
    assert all(seconds >= 0 for seconds in images.timings.values()) and images.timings["device_s"] > 0


def test_each_png_holds_the_seed_that_makes_it_alone(replica: Any) -> None:
    files = generate(replica).encoded
    assert [number_of(decoded(file)) for file in files] == [2**32 - 1 + 5, 0 + 5]
    first, second = (Image.open(BytesIO(file)).info for file in files)
    assert first == {
        "prompt": "a secret garden",
        "negative_prompt": "fog",
        "model": "tiny",
        "Software": "imagine-tpu",
        "seed": str(2**32 - 1),
        "sampler": "ddim",
        "num_inference_steps": "5",
        "guidance_scale": "4.0",
        "size": f"{WIDTH}x{HEIGHT}",
        "prompt_truncated": "false",
        "negative_prompt_truncated": "false",
    }
    assert second == first | {"seed": "0"}


def test_the_encoding_that_was_asked_for_is_used_for_previews_too(replica: Any) -> None:
    for output_format in ("webp", "jpeg"):
        encoding = Encoding.model_validate({"output_format": output_format})
        images = generate(replica, encoding=encoding)
        assert Image.open(BytesIO(images.encoded[0])).format == output_format.upper()
        _, preview, _ = streamed(replica, encoding=encoding, partial_images=1)
        assert Image.open(BytesIO(preview.encoded)).format == output_format.upper()


def test_files_are_made_in_the_replicas_own_threads(replica: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    names = []

    def encode(*_: Any, **__: Any) -> bytes:
        names.append(threading.current_thread().name)
        return b"file"

    monkeypatch.setattr("app.serving.image_metadata.encode", encode)
    generate(replica)
    streamed(replica, partial_images=2)
    assert len(names) == 2 + 3 and all(name.startswith("encode_") for name in names)


def test_a_stream_is_acceptance_previews_in_order_and_the_same_picture(replica: Any) -> None:
    accepted, first, second, images = streamed(replica, partial_images=2, seed=100)
    assert accepted == Accepted()
    assert isinstance(first, Preview) and isinstance(second, Preview) and (first.index, second.index) == (0, 1)
    seen = [number_of(decoded(preview.encoded)) for preview in (first, second)]
    assert 100 < seen[0] < seen[1] < 105, "pictures in the making"
    assert isinstance(images, Images) and images.encoded == generate(replica, n=1, seed=100).encoded


def test_a_stream_without_previews_says_that_it_is_accepted_before_it_is_done(replica: Any) -> None:
    async def listen() -> list[Any]:
        replica.pipeline.gates["step"].clear()
        stream = replica.generate_stream(asking(stream=True, n=1))
        items = [await anext(stream)]
        assert replica.engine.stats()["unfinished"] == 1
        replica.pipeline.open()
        return items + [item async for item in stream]

    assert [type(item) for item in asyncio.run(listen())] == [Accepted, Images]


def held(replica: Any) -> Future[Any]:
    """A request that runs until `replica.pipeline.open()`."""
    replica.pipeline.gates["step"].clear()
    future: Future[Any] = replica.engine.submit(ASKED.generation)
    assert soon(replica.pipeline.reached["step"])
    return future


@pytest.mark.parametrize("ask", [generate, lambda *a, **k: streamed(*a, **k)[0]], ids=["whole", "stream"])
def test_an_expected_refusal_is_returned_so_that_serve_logs_no_failure(
    replica: Any, ask: Callable[..., Any], recorded: Recorded
) -> None:
    def refused(**changes: Any) -> tuple[int, str, str | None, str]:
        error = pickle.loads(pickle.dumps(ask(replica, **changes)))
        assert isinstance(error, ApiError)
        assert (error.retry_after_s or 0) > 0 or error.status == 400
        return error.status, error.code, error.param, error.message

    sentence = "sampler must be one of ddim, pndm, got lcm."
    assert refused(sampler="lcm") == (400, "invalid_value", "sampler", sentence)
    status, code, param, sentence = refused(timeout_s=0.001)
    assert (status, code, param) == (503, "deadline_unmeetable", "timeout")
    running = held(replica)
    waiting = [replica.engine.submit(ASKED.generation) for _ in range(2)]
    assert refused() == (503, "queue_full", None, "The queue is full; try again later.")
    assert outcomes(recorded) == ["invalid", "deadline", "queue_full"]
    replica.pipeline.open()
    replica.engine.drain(20)
    assert running.done() and all(isinstance(future.exception(20), EngineStopped) for future in waiting)
    assert ask(replica) == Moved(accepted=False)
    assert outcomes(recorded)[3:] == ["stopped"]


def test_a_deadline_that_is_missed_narrowly_does_not_read_as_if_it_were_met() -> None:
    error = refusal(DeadlineUnmeetable(2.01, 0.1), asking(timeout_s=2.0))
    assert error.message == (
        "This would be ready in 2.1 s, and timeout is 2 s; try again later or with a longer timeout."
    )
    assert (error.retry_after_s, refusal(QueueFull(2.5), ASKED).retry_after_s) == (0.1, 2.5)


@pytest.mark.parametrize("ask", [generate, lambda *a, **k: streamed(*a, **k)[-1]], ids=["whole", "stream"])
def test_a_request_whose_engine_stops_must_begin_again(
    replica: Any, ask: Callable[..., Any], recorded: Recorded
) -> None:
    closing = threading.Thread(target=replica.engine.close)
    replica.pipeline.gates["step"].clear()

    def stop() -> None:
        assert soon(replica.pipeline.reached["step"])
        closing.start()
        replica.pipeline.open()

    stopping = threading.Thread(target=stop)
    stopping.start()
    answer = ask(replica, num_inference_steps=50)
    stopping.join()
    closing.join()
    assert answer == Moved(lost=True)
    assert outcomes(recorded) == ["stopped"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_request_goes_on_in_another_replica_with_what_was_made_of_it(no_device: None, stream: bool) -> None:
    async def move() -> tuple[Any, Any, Any]:
        first: Any = StableDiffusion(SPEC, **SETTINGS)
        second: Any = StableDiffusion(SPEC, **SETTINGS)
        held_in(first.pipeline, "step")
        begun = asyncio.ensure_future(whole_or_stream(first, stream, n=1, num_inference_steps=50, seed=3))
        assert await asyncio.to_thread(soon, first.pipeline.reached["step"])
        first.engine.hand_over()
        first.pipeline.open()
        moved = pickle.loads(pickle.dumps(await begun))
        request = {"n": 1, "num_inference_steps": 50, "seed": 3, "moved": True, "resumed": moved.resumed}
        other = await whole_or_stream(
            second, stream, **{**request, "num_inference_steps": moved.resumed.images[0].steps_left - 1}
        )
        images = await whole_or_stream(second, stream, **request)
        taken = sum(call.count for replica in (first, second) for call in replica.pipeline.of("step"))
        for replica in (first, second):
            await replica.shut_down()
        return images, other, taken

    images, other, taken = asyncio.run(move())
    assert number_of(decoded(images.encoded[0])) == 53 and taken == 50
    assert other == Moved(lost=True), "its table has fewer steps than are left"


def test_the_ingress_may_have_one_request_back(replica: Any) -> None:
    async def ask() -> list[Any]:
        held_in(replica.pipeline, "step")
        first = asyncio.ensure_future(replica.generate(asking(n=1, seed=3, place="first")))
        assert await asyncio.to_thread(soon, replica.pipeline.reached["step"])
        second = asyncio.ensure_future(replica.generate(asking(n=1, seed=4, place="second")))
        await asyncio.sleep(0)
        await replica.let_go(["first", "unknown"])
        replica.pipeline.open()
        return [await first, await second]

    moved, images = asyncio.run(ask())
    assert isinstance(moved, Moved) and moved.accepted and not moved.lost
    assert number_of(decoded(images.encoded[0])) == 4 + 5
    assert not replica.places.futures


@pytest.mark.parametrize("ask", [generate, streamed])
def test_a_failure_on_the_device_is_no_refusal(replica: Any, ask: Callable[..., Any], recorded: Recorded) -> None:
    replica.pipeline.fail("step")
    with pytest.raises(RuntimeError, match="step failed"):
        ask(replica)
    assert outcomes(recorded) == ["failed"]
    assert isinstance(generate(replica), Images), "the next one is served"


def test_cancelling_a_request_frees_its_slots_and_leaves_others_alone(replica: Any, recorded: Recorded) -> None:
    async def leave() -> Any:
        replica.pipeline.abandoned = lambda seed: seed in (2, 3)
        replica.pipeline.gates["step"].clear()
        staying, leaving = (asyncio.ensure_future(replica.generate(asking(seed=seed))) for seed in (1, 2))
        await asyncio.to_thread(soon, replica.pipeline.reached["step"])
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        replica.pipeline.open()
        return await staying

    images = asyncio.run(leave())
    assert [number_of(decoded(file)) for file in images.encoded] == [1 + 5, 2 + 5]
    assert sorted(outcomes(recorded)) == ["cancelled", "completed"]
    assert replica.engine.stats()["active_slots"] == 0


@pytest.mark.parametrize("after", [0, 1], ids=["accepted", "a preview"])
def test_a_stream_that_is_cancelled_frees_its_slot(replica: Any, after: int, recorded: Recorded) -> None:
    async def leave() -> None:
        replica.pipeline.abandoned = lambda seed: True
        gate = replica.pipeline.gates["step" if not after else "decode"]
        gate.clear()
        stream = replica.generate_stream(asking(stream=True, n=1, partial_images=1, num_inference_steps=50))
        for _ in range(1 + after):
            await anext(stream)
        waiting = asyncio.ensure_future(anext(stream))  # as Serve has it: always in wait for the next item
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(leave())
    replica.pipeline.open()
    assert isinstance(generate(replica), Images)
    assert outcomes(recorded) == ["cancelled", "completed"]
    assert replica.engine.stats()["active_slots"] == 0


def test_a_request_leaves_one_line_that_tells_times_and_not_the_prompt(
    replica: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="ray.serve"):
        generate(replica)
    (record,) = [record for record in caplog.records if record.name.endswith("app.serving.replica")]
    assert record.name.startswith("ray.serve.")
    assert f"n=2 size={WIDTH}x{HEIGHT} steps=5 sampler=ddim queue_s=0." in record.getMessage()
    assert "device_s=0." in record.getMessage()
    assert "secret" not in record.getMessage() and "fog" not in record.getMessage()


def test_a_request_in_parts_has_one_outcome(replica: Any, recorded: Recorded) -> None:
    for part in parts_of(ASKED, 1):
        assert asyncio.run(replica.generate(part)).encoded
    assert outcomes(recorded) == ["completed"]
    assert replica.engine.stats()["requests"]["completed"] == 1


def test_a_finished_request_is_measured_from_its_arrival_to_its_files(replica: Any, recorded: Recorded) -> None:
    images = generate(replica)
    values = {(name, *tags.values()): value for name, value, tags in recorded}
    assert values["imagine_images",] == 2
    total = values["imagine_time_to_first_image_seconds",]
    assert total >= sum(images.timings[f"{phase}_s"] for phase in ("queue", "denoise", "decode", "encode"))
    assert values["imagine_phase_seconds", "denoise"] == images.timings["denoise_s"]


def test_a_replica_names_its_model_its_sizes_and_what_stands_in_its_checkpoint(replica: Any) -> None:
    expected = Description(
        *(("ddim", "pndm"), "ddim", "tiny", ("8x8",), ("The checkpoint names another.",), 4, 1.0, ("target_size",)),
        Capabilities(edits=True, masks=True),
    )
    assert asyncio.run(replica.describe()) == expected
    assert generate(replica).model == "tiny"


def test_statistics_are_the_engines_and_what_the_replica_is(replica: Any) -> None:
    generate(replica)
    replica.compiles.count = 3
    stats = json.loads(json.dumps(asyncio.run(replica.stats())))
    assert stats["requests"]["completed"] == 1 and stats["num_slots"] == 4
    assert (stats["replica"], stats["device"], stats["compiles_after_ready"]) == ("local", "abacus x2", 3)
    assert stats["ready_s"] > 0 and stats["pid"] > 0


def test_statistics_tell_when_each_part_of_the_start_was_over(replica: Any) -> None:
    before = asyncio.run(replica.stats())["milestones"]
    assert list(before) == ["process", "constructor", "weights", "warm"]
    assert sorted(before.values()) == list(before.values())
    generate(replica)
    after = asyncio.run(replica.stats())["milestones"]
    generate(replica)
    assert time.time() >= after["first_image"] >= before["warm"]
    assert asyncio.run(replica.stats())["milestones"] == after == before | {"first_image": after["first_image"]}


def test_serves_questions_keep_the_gauges_current(replica: Any, recorded: Recorded) -> None:
    running = held(replica)
    stats = asyncio.run(replica.record_autoscaling_stats())
    asyncio.run(replica.check_health())
    replica.pipeline.open()
    running.result(20)
    assert stats["unfinished"] == 1.0 and stats["backlog_s"] > 0
    assert all(isinstance(value, float) for value in stats.values()), "Ray takes nothing else"
    assert [value for name, value, _ in recorded if name == "imagine_active_slots"] == [1, 1]


def test_health_is_the_engines_and_its_death_is_logged_once(replica: Any, caplog: pytest.LogCaptureFixture) -> None:
    asyncio.run(replica.check_health())
    replica.engine.close()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="The engine has stopped."):
            asyncio.run(replica.check_health())
    assert sum("this replica is unhealthy" in record.getMessage() for record in caplog.records) == 1


# As Serve holds it


def held_by_serve(**changes: Any) -> UserCallableWrapper:
    """Serve's own wrapper, which constructs a replica, calls it and ends it, on the event loop that runs."""
    return UserCallableWrapper(
        StableDiffusion,
        (SPEC,),
        {**SETTINGS, **changes},
        deployment_id=DeploymentID("StableDiffusion", "tests"),
        run_sync_methods_in_threadpool=False,
        run_user_code_in_separate_thread=False,
        local_testing_mode=True,
        deployment_config=DeploymentConfig(),
        actor_id="none",
    )


def threads_of_ours() -> list[str]:
    names = ("engine", "encode", "fetch", "stall watch", "profiler")
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(names)]


def nobody_left() -> bool:
    """The watch's thread ends at its next look."""
    return soon_true(lambda: not threads_of_ours(), 20)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_serve_ends_a_replica_and_requests_that_have_begun_still_get_their_files(no_device: None, stream: bool) -> None:
    async def end() -> tuple[Any, Any]:
        serve = held_by_serve()
        await serve.initialize_callable()
        replica: Any = serve.user_callable
        held_in(replica.pipeline, "read")  # the picture is denoised and on its way
        begun = asyncio.ensure_future(whole_or_stream(replica, stream, n=2 - stream))
        assert await asyncio.to_thread(soon, replica.pipeline.reached["read"])
        ending = asyncio.ensure_future(serve.call_destructor())
        assert await asyncio.to_thread(soon_true, lambda: replica.engine._draining)
        refused = await replica.generate(asking())
        assert not ending.done() and not begun.done(), "the loop goes on while the replica drains"
        replica.pipeline.open()
        images, _ = await asyncio.gather(begun, ending)
        assert not replica.compiles.watching and not replica.engine.healthy
        return images, refused

    images, refused = asyncio.run(end())
    assert isinstance(images, Images) and len(images.encoded) == 2 - stream
    assert [decoded(file).shape for file in images.encoded] == [(HEIGHT, WIDTH, 3)] * (2 - stream)
    assert refused == Moved(accepted=False)
    assert nobody_left()


def held_in(pipeline: Pipeline, verb: str) -> None:
    pipeline.gates[verb].clear()


async def whole_or_stream(replica: Any, stream: bool, **changes: Any) -> Any:
    request = asking(stream=stream, **changes)
    if not stream:
        return await replica.generate(request)
    return [item async for item in replica.generate_stream(request)][-1]


@pytest.mark.parametrize("broken", ["Pipeline.warmup", "CompileWatch.ready", "Engine.start", "Profiler"])
def test_serve_ends_a_replica_whose_constructor_failed(
    no_device: None, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def fail(*arguments: Any, **named: Any) -> None:
        raise ValueError("no such device")

    owner, _, method = broken.partition(".")
    target = {"Pipeline": Pipeline, "CompileWatch": CompileWatch, "Engine": Engine}.get(owner)
    if target is None:
        monkeypatch.setattr("app.serving.replica.Profiler", fail)
    else:
        monkeypatch.setattr(target, method, fail)

    async def end() -> None:
        serve = held_by_serve()
        with pytest.raises(ValueError, match="no such device"):
            await serve.initialize_callable()
        replica: Any = serve.user_callable
        await serve.call_destructor()
        assert "compiles" not in vars(replica) or not replica.compiles.watching

    asyncio.run(end())
    assert nobody_left()


def test_a_replica_that_nobody_ends_leaves_no_coroutine_that_nobody_awaits(no_device: None) -> None:
    """Warnings are errors here. Collected as garbage, it ends its threads itself."""
    replica = StableDiffusion(SPEC, **SETTINGS)
    asyncio.run(replica.shut_down())
    replica.__del__()
    other = StableDiffusion(SPEC, **SETTINGS)
    other.__del__()
    other.__del__()
    assert not other.engine.healthy
    StableDiffusion.__new__(StableDiffusion).__del__()
    assert nobody_left()


# A device that hangs


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("verb", ["step", "wait", "read", "encode", "decode"])
def test_a_device_that_hangs_lets_all_requests_go_at_once_and_its_replica_is_unhealthy(
    no_device: None, verb: str, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def hang() -> None:
        serve = held_by_serve(stall_s=0.2)
        await serve.initialize_callable()
        replica: Any = serve.user_callable
        assert isinstance(await whole_or_stream(replica, stream, n=1), Images)
        await replica.check_health()
        held_in(replica.pipeline, verb)
        request = [whole_or_stream(replica, stream, n=1, seed=seed, prompt="new") for seed in range(2)]
        for answer in await asyncio.gather(*request):
            assert answer in (Moved(lost=True), Moved())
        assert await replica.generate(asking()) == Moved(accepted=False)
        for _ in range(3):
            with pytest.raises(RuntimeError, match="^The device does not answer: "):
                await replica.check_health()
        async with asyncio.timeout(20):
            await serve.call_destructor()
        assert not replica.pipeline.gates[verb].is_set()
        replica.pipeline.open()

    asyncio.run(hang())
    lines = [record.getMessage() for record in caplog.records if "does not answer" in record.getMessage()]
    gives_up, unhealthy = (line.partition(" s. ")[2] for line in lines)
    assert gives_up.startswith("The engine gives up. Unfinished: ")
    assert unhealthy == "So this replica is unhealthy, and Serve will replace it."
    assert nobody_left()
