"""The replica's class, called as Serve calls it, over a fake pipeline and a fake engine."""

import asyncio
import logging
import pickle
import sys
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from io import BytesIO
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from app.engine import EngineStopped, Generated, QueueFull
from app.protocol import ApiError, Description, Encoding, Generation, Images
from app.server import StableDiffusion

GENERATION = Generation("a secret garden", "fog", 16, 8, 5, 4.0, 2**32 - 1, None, 2)
PNG = Encoding(output_format="png")


class FakePipeline:
    samplers = ("euler", "pndm")
    default_sampler = "pndm"
    events: list[Any]

    @classmethod
    def load(cls, model: str, **options: Any) -> "FakePipeline":
        pipeline = cls()
        pipeline.events = [("load", model, options)]
        return pipeline

    def warmup(self) -> None:
        self.events.append("warmup")


class FakeEngine:
    def __init__(self, pipeline: FakePipeline, *, max_waiting: int) -> None:
        pipeline.events.append(("engine", max_waiting))
        self.healthy = True
        self.closed = False
        self.answer: Callable[[Future[Generated]], None] = lambda future: future.set_result(generated())
        self.refusal: Exception | None = None
        self.futures: list[Future[Generated]] = []

    def submit(self, generation: Generation) -> Future[Generated]:
        if self.refusal:
            raise self.refusal
        self.futures.append(Future())
        self.answer(self.futures[-1])
        return self.futures[-1]

    def close(self) -> None:
        self.closed = True


def generated() -> Generated:
    pixels = np.stack([np.full((8, 16, 3), level, np.uint8) for level in (10, 200)])
    return Generated(pixels, (2**32 - 1, 0), "pndm", True, False, 0.25, 1.5, 0.125)


@pytest.fixture
def replica(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(sys.modules, "app.pipeline", SimpleNamespace(Pipeline=FakePipeline))  # the real one imports JAX
    monkeypatch.setattr("app.server.Engine", FakeEngine)
    return StableDiffusion(
        "/models/tiny",
        name="tiny",
        revision=None,
        dtype="float32",
        sizes=[(16, 8)],
        batch_buckets=[1, 2],
        max_steps=50,
        max_waiting=7,
    )


def generate(replica: Any, encoding: Encoding = PNG, **changes: Any) -> Any:
    return asyncio.run(replica.generate(replace(GENERATION, **changes), encoding))


def test_a_replica_is_warm_before_its_engine_starts(replica: Any) -> None:
    options = {"revision": None, "dtype": "float32", "sizes": [(16, 8)], "batch_buckets": [1, 2], "max_steps": 50}
    assert replica.pipeline.events == [("load", "/models/tiny", options), "warmup", ("engine", 7)]


def test_an_answer_says_what_made_it_and_how_long_that_took(replica: Any) -> None:
    images = generate(replica)
    assert isinstance(images, Images)
    assert images.seeds == (2**32 - 1, 0)
    assert images.facts == {
        "seed": 2**32 - 1,
        "sampler": "pndm",
        "num_inference_steps": 5,
        "guidance_scale": 4.0,
        "size": "16x8",
        "prompt_truncated": True,
        "negative_prompt_truncated": False,
    }
    assert images.timings["encode_s"] > 0
    assert {**images.timings, "encode_s": 0} == {"queue_s": 0.25, "denoise_s": 1.5, "decode_s": 0.125, "encode_s": 0}


def test_each_png_holds_the_seed_that_makes_it_alone(replica: Any) -> None:
    first, second = (Image.open(BytesIO(encoded)) for encoded in generate(replica).encoded)
    assert (np.asarray(first).max(), np.asarray(second).min()) == (10, 200)
    assert first.info == {
        "prompt": "a secret garden",
        "negative_prompt": "fog",
        "model": "tiny",
        "Software": "imagine-tpu",
        "seed": str(2**32 - 1),
        "sampler": "pndm",
        "num_inference_steps": "5",
        "guidance_scale": "4.0",
        "size": "16x8",
        "prompt_truncated": "true",
        "negative_prompt_truncated": "false",
    }
    assert second.info["seed"] == "0"


def test_the_encoding_that_was_asked_for_is_used(replica: Any) -> None:
    for output_format in ("webp", "jpeg"):
        images = generate(replica, Encoding.model_validate({"output_format": output_format}))
        assert Image.open(BytesIO(images.encoded[0])).format == output_format.upper()


@pytest.mark.parametrize(
    ("refusal", "status", "param", "message"),
    [
        (QueueFull(2.5), 503, None, "The queue is full; try again later."),
        (EngineStopped("gone"), 503, None, "The replica is stopping; try again."),
        (
            ValueError("sampler must be one of euler, got pndm."),
            400,
            "sampler",
            "sampler must be one of euler, got pndm.",
        ),
        (ValueError("Something else."), 400, None, "Something else."),
    ],
)
def test_an_expected_refusal_is_returned_so_that_serve_logs_no_failure(
    replica: Any, refusal: Exception, status: int, param: str | None, message: str
) -> None:
    replica.engine.refusal = refusal
    error = pickle.loads(pickle.dumps(generate(replica)))
    assert isinstance(error, ApiError)
    assert (error.status, error.param, error.message) == (status, param, message)
    assert error.retry_after_s == {"QueueFull": 2.5, "EngineStopped": 1.0}.get(type(refusal).__name__)


def test_an_engine_that_stops_under_a_request_asks_the_client_to_try_again(replica: Any) -> None:
    replica.engine.answer = lambda future: future.set_exception(EngineStopped("gone"))
    assert generate(replica).status == 503


def test_a_failure_on_the_device_is_no_refusal(replica: Any) -> None:
    replica.engine.answer = lambda future: future.set_exception(ValueError("Incompatible shapes"))
    with pytest.raises(ValueError, match="Incompatible shapes"):
        generate(replica)


def test_cancelling_a_request_cancels_it_in_the_engine(replica: Any) -> None:
    async def leave() -> None:
        waiting = asyncio.ensure_future(replica.generate(GENERATION, PNG))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    replica.engine.answer = lambda future: None
    asyncio.run(leave())
    assert replica.engine.futures[0].cancelled()


def test_a_request_leaves_one_line_that_tells_times_and_not_the_prompt(
    replica: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="ray.serve"):
        generate(replica)
    (record,) = caplog.records
    assert record.name.startswith("ray.serve.")
    assert "n=2 size=16x8 steps=5 sampler=pndm queue_s=0.250 denoise_s=1.500 decode_s=0.125" in record.getMessage()
    assert "secret" not in record.getMessage() and "fog" not in record.getMessage()


def test_a_replica_describes_what_stands_in_its_checkpoint(replica: Any) -> None:
    assert asyncio.run(replica.describe()) == Description(("euler", "pndm"), "pndm")


def test_health_is_the_engines(replica: Any) -> None:
    asyncio.run(replica.check_health())
    replica.engine.healthy = False
    with pytest.raises(RuntimeError, match="The engine has stopped."):
        asyncio.run(replica.check_health())


def test_the_destructor_closes_the_engine_if_there_is_one(replica: Any) -> None:
    replica.__del__()
    assert replica.engine.closed
    StableDiffusion.__new__(StableDiffusion).__del__()
