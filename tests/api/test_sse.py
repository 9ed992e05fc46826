"""Streamed answers: OpenAI's client over real HTTP, with the real routes and a fake replica."""

import asyncio
import base64
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import openai
import pytest
import uvicorn
from openai import OpenAI
from openai.types import ImageGenCompletedEvent, ImageGenPartialImageEvent
from ray.exceptions import ActorDiedError

from app.api import sse
from app.api.errors import ApiError
from app.api.ingress import APIIngress
from app.api.messages import Accepted, Images, Preview, Progress
from app.api.protocol import parse_body
from app.api.sse import events
from tests.api.test_ingress import SERVICE, Replicas, local_client, pictures, stream_of
from tests.clusters import soon

PATIENT = replace(SERVICE, limits=SERVICE.limits.model_copy(update={"timeout_s": 30.0}))
ASKED = parse_body(b'{"prompt": "a", "seed": 7, "stream": true, "partial_images": 2}', SERVICE)


@pytest.fixture
def replicas() -> Replicas:
    return Replicas()


@pytest.fixture
def address(replicas: Replicas) -> Iterator[str]:
    """The routes behind a real HTTP server, on a port of its own."""
    with serving(APIIngress(replicas, PATIENT)) as address:
        yield address


@contextmanager
def serving(ingress: APIIngress) -> Iterator[str]:
    app = ingress.__serve_build_asgi_app__()
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)


@pytest.fixture
def client(address: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_openais_client_gets_images(client: OpenAI) -> None:
    answer = client.images.generate(model="tiny", prompt="a red house", n=2, size="256x128", extra_body={"seed": 7})
    assert [base64.b64decode(image.b64_json or "") for image in answer.data or []] == [b"png 7", b"png 8"]
    assert (answer.size, answer.output_format) == ("256x128", "png")
    type(answer).model_validate(answer.to_dict())


def test_openais_client_streams_previews_and_the_image(client: OpenAI) -> None:
    stream = client.images.generate(
        prompt="a", stream=True, partial_images=2, output_format="webp", extra_body={"seed": 7, "sampler": "euler"}
    )
    first, second, last = list(stream)
    for index, partial in enumerate((first, second)):
        assert isinstance(partial, ImageGenPartialImageEvent) and partial.partial_image_index == index
        assert base64.b64decode(partial.b64_json) == f"preview {index}".encode()
    assert isinstance(last, ImageGenCompletedEvent) and base64.b64decode(last.b64_json) == b"webp 7"
    for event in (first, second, last):
        type(event).model_validate(event.to_dict())  # the client itself lets anything through
        assert (event.size, event.output_format, event.background) == ("128x128", "webp", "opaque")
        assert abs(event.created_at - time.time()) < 60
    assert {"seed": 7, "sampler": "euler", "model": "tiny", "prompt_truncated": False}.items() <= last.to_dict().items()
    timings: Any = last.to_dict()["timings"]
    assert list(timings) == ["ingress_s", "queue_s", "denoise_s", "device_s"] and timings["denoise_s"] == 1.25


def test_without_previews_a_stream_is_one_event(client: OpenAI) -> None:
    (only,) = client.images.generate(prompt="a", stream=True)
    assert isinstance(only, ImageGenCompletedEvent)


def test_an_error_before_the_first_event_has_its_status(client: OpenAI, replicas: Replicas) -> None:
    replicas.generate_stream.outcome = lambda _: [ApiError(503, "Full.", None, "queue_full", 3.0)]
    with pytest.raises(openai.InternalServerError) as caught:
        client.images.generate(prompt="a", stream=True)
    assert (caught.value.status_code, caught.value.code) == (503, "queue_full")
    assert caught.value.response.headers["retry-after"] in ("3", "4"), "with up to a quarter of chance"


def test_a_client_that_disconnects_stops_the_work(client: OpenAI, replicas: Replicas) -> None:
    replicas.generate_stream.outcome = lambda _: [Accepted(), Preview(0, b"preview"), None]
    stream = client.images.generate(prompt="a", stream=True, partial_images=1)
    assert next(stream).type == "image_generation.partial_image"
    (items,) = replicas.generate_stream.answers
    assert not items.cancelled
    stream.close()
    assert soon(lambda: items.cancelled)


def test_a_client_that_disconnects_before_the_first_event_stops_the_work(address: str, replicas: Replicas) -> None:
    replicas.generate_stream.outcome = lambda _: [Accepted(), None]
    host, _, port = address.removeprefix("http://").partition(":")
    body = b'{"prompt": "a", "stream": true}'
    head = f"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        assert soon(lambda: bool(replicas.generate_stream.answers))
        assert connection.recv(15) == b"HTTP/1.1 200 OK"  # accepted
    assert soon(lambda: replicas.generate_stream.answers[0].cancelled)


FAILURES: list[tuple[Any, str]] = [
    (ApiError(503, "Stopping.", None, "replica_lost", 1.0), "replica_lost"),
    (ActorDiedError(), "replica_lost"),
    (asyncio.CancelledError(), "replica_lost"),
    (StopAsyncIteration(), "replica_lost"),
    (None, "timeout"),
]


@pytest.mark.parametrize(("failure", "code"), FAILURES, ids=[repr(case[0])[:20] for case in FAILURES])
def test_a_failure_after_the_first_event_is_an_event_that_openais_client_raises(
    client: OpenAI, replicas: Replicas, failure: Any, code: str
) -> None:
    replicas.generate_stream.outcome = lambda _: [Accepted(), Preview(0, b"preview"), failure]
    stream = client.images.generate(prompt="a", stream=True, partial_images=1, extra_body={"timeout": 0.5})
    assert next(stream).type == "image_generation.partial_image"
    with pytest.raises(openai.APIError) as caught:
        next(stream)
    assert caught.value.code == code and caught.value.type == "server_error"
    assert soon(lambda: replicas.generate_stream.answers[0].cancelled)


def test_progress_is_an_event_that_openais_client_passes_on(client: OpenAI, replicas: Replicas) -> None:
    progress = Progress("waiting", 2, 0, 20, 3.14159)
    replicas.generate_stream.outcome = lambda request: [Accepted(), progress, pictures(request)]
    first, last = list(client.images.generate(prompt="a", stream=True, extra_body={"progress": True, "seed": 7}))
    assert (str(first.type), last.type) == ("image_generation.progress", "image_generation.completed")
    facts = {"status": "waiting", "ahead": 2, "steps": 0, "total_steps": 20, "left_s": 3.142}
    assert facts.items() <= first.to_dict().items()


def test_an_event_is_two_lines_and_proxies_do_not_buffer_it(replicas: Replicas) -> None:
    body = {"prompt": "a", "stream": True, "partial_images": 1}
    with local_client(APIIngress(replicas, SERVICE)) as client:
        response = client.post("/v1/images/generations", json=body)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-store" and response.headers["x-accel-buffering"] == "no"
    partial, completed, end = response.text.split("\n\n")
    assert partial.startswith("event: image_generation.partial_image\ndata: {") and end == ""
    assert completed.startswith("event: image_generation.completed\ndata: {")
    for event in (partial, completed):
        kind, data = event.split("\n")
        assert json.loads(data.removeprefix("data: "))["type"] == kind.removeprefix("event: ")


def test_comments_keep_a_silent_connection_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 0.01)

    async def listen() -> list[bytes]:
        items = iter(list(stream_of(ASKED))[1:])
        go_on = asyncio.Event()

        async def next_item() -> Preview | Images:
            await go_on.wait()
            go_on.clear()
            return next(items)

        seen = []
        async for chunk in events(next_item, ASKED, "tiny"):
            seen.append(chunk)
            if seen[-2:] == [sse.KEEP_ALIVE] * 2:
                go_on.set()
        return seen

    seen = asyncio.run(listen())
    assert [chunk for chunk in seen if chunk != sse.KEEP_ALIVE] == [c for c in seen if c.startswith(b"event: ")]
    assert len(seen) - seen.count(sse.KEEP_ALIVE) == 3 and seen.count(sse.KEEP_ALIVE) >= 6
    assert sse.KEEP_ALIVE.startswith(b":") and sse.KEEP_ALIVE.endswith(b"\n\n")


def test_a_client_that_disconnects_leaves_no_task_behind() -> None:
    async def leave() -> bool:
        cancelled = asyncio.Event()

        async def next_item() -> Images:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.set()
                raise
            return pictures(ASKED)

        listening = asyncio.ensure_future(anext(aiter(events(next_item, ASKED, "tiny"))))
        await asyncio.sleep(0.01)
        listening.cancel()
        async with asyncio.timeout(5):
            await cancelled.wait()
        return True

    assert asyncio.run(leave())
