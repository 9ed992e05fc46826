"""200 clients at once on a real local cluster, many of which disconnect. The others get the images that a single client
gets, and nothing is left running. tests/on_cluster/test_api.py runs this on its cluster.
"""

import asyncio
import base64
import contextlib
import json
import random
import socket
from io import BytesIO
from typing import Any

import aiohttp
import numpy as np
from PIL import Image

from tests.clusters import fetch, soon

STAYING, AT_ONCE, DURING_STREAM = 140, 40, 20
LONG = {"prompt": "gone", "num_inference_steps": 100}  # the request of clients that disconnect
WAYS = ("plain", "stream", "imagine")
RETRY_S = 0.5  # a client waits this long when the queue is full

Picture = tuple[int, np.ndarray]  # seed and pixels


def total(api: str) -> dict[str, Any]:
    status, body, _ = fetch(f"{api}/v1/stats")
    assert status == 200
    stats: dict[str, Any] = json.loads(body)["total"]
    return stats


def idle(api: str) -> bool:
    now = total(api)
    return bool(now["replicas"]) and not now["unfinished"] and not now["active_slots"]


def kinds(samplers: list[str]) -> list[tuple[str, dict[str, Any]]]:
    """Twelve different requests, each with the way to send it."""
    pairs = []
    for i in range(12):
        way = WAYS[i % 3]
        request: dict[str, Any] = {
            "prompt": f"a red house under a yellow sun, number {i}",
            "seed": 2**32 - 5 + i if i < 5 else 1000 + i,
            "num_inference_steps": 2 + i % 3,
            "guidance_scale": 1 + 3 * (i % 2),
            "sampler": samplers[i % len(samplers)],
        }
        request |= {"stream": True, "partial_images": 1} if way == "stream" else {}
        pairs.append((way, request | ({"n": 2} if way == "plain" else {})))
    return pairs


async def draw(session: aiohttp.ClientSession, api: str, way: str, request: dict[str, Any]) -> list[Picture]:
    while True:
        if way == "imagine":
            pending = session.get(f"{api}/imagine", params=request)
        else:
            pending = session.post(f"{api}/v1/images/generations", json=request)
        async with pending as answer:
            content = await answer.read()
        if answer.status == 200:
            break
        assert answer.status == 503 and json.loads(content)["error"]["code"] == "queue_full", content
        await asyncio.sleep(RETRY_S)
    if way == "imagine":
        return [(int(answer.headers["X-Seed"]), pixels(content))]
    if way == "plain":
        return [(image["seed"], pixels(base64.b64decode(image["b64_json"]))) for image in json.loads(content)["data"]]
    name, data = content.split(b"\n\n")[-2].split(b"\n")
    assert name == b"event: image_generation.completed", content
    event = json.loads(data.removeprefix(b"data: "))
    return [(event["seed"], pixels(base64.b64decode(event["b64_json"])))]


def pixels(file: bytes) -> np.ndarray:
    with Image.open(BytesIO(file)) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def assert_equal(pictures: list[Picture], alone: list[Picture]) -> None:
    assert [seed for seed, _ in pictures] == [seed for seed, _ in alone]
    for (_, image), (_, other) in zip(pictures, alone, strict=True):
        assert abs(image - other).max() <= 1, "neighbours may change the bucket, and the bucket the last bit of a float"


def head(fields: dict[str, Any]) -> bytes:
    body = json.dumps(fields).encode()
    kind = f"Content-Type: application/json\r\nContent-Length: {len(body)}"
    return f"POST /v1/images/generations HTTP/1.1\r\nHost: 127.0.0.1\r\n{kind}\r\n\r\n".encode() + body


async def hang_up(api: str, heard: bytes) -> None:
    """Sends a request and disconnects once the answer has `heard` in it; at once if that is empty."""
    host, _, port = api.removeprefix("http://").partition(":")
    refused = True
    while refused:
        reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 22)
        writer.write(head(LONG | ({"stream": True, "partial_images": 3} if heard else {})))
        await writer.drain()
        refused = bool(heard) and b" 503 " in await reader.readline()
        if refused:
            await asyncio.sleep(RETRY_S)
        elif heard:
            await reader.readuntil(heard)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def of_200_clients_some_disconnect_and_the_others_get_the_images_of_a_single_client(api: str) -> None:
    (model,) = json.loads(fetch(f"{api}/v1/models")[1])["data"]
    requests = kinds(model["samplers"])
    rng = random.Random(14)

    async def crowd() -> None:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=300)) as session:
            alone = [await draw(session, api, way, request) for way, request in requests]
            assert len({image.tobytes() for pictures in alone for _, image in pictures}) == 16, "all are different"
            before = await asyncio.to_thread(total, api)
            choices = [i % len(requests) for i in range(STAYING)]
            clients = [draw(session, api, *requests[i]) for i in choices]
            leavers = [hang_up(api, b"") for _ in range(AT_ONCE)]
            leavers += [hang_up(api, b"image_generation.partial_image") for _ in range(DURING_STREAM)]
            work: list[Any] = [*clients, *leavers]
            order = rng.sample(range(len(work)), len(work))
            answers = dict(zip(order, await asyncio.gather(*(work[i] for i in order)), strict=True))
            for i, choice in enumerate(choices):
                assert_equal(answers[i], alone[choice])
            assert await asyncio.to_thread(soon, lambda: idle(api))
            after = await asyncio.to_thread(total, api)
            done = {name: after["requests"][name] - before["requests"].get(name, 0) for name in after["requests"]}
            assert done["completed"] == STAYING, f"not one of those who left was drawn to its end: {done}"
            assert not done.get("failed"), done
            assert DURING_STREAM <= done["cancelled"] <= AT_ONCE + DURING_STREAM, done
            assert after["compiles_after_ready"] == 0
            assert_equal(await draw(session, api, *requests[0]), alone[0])

    asyncio.run(crowd())


def unread_streams_end_and_delay_nobody(api: str) -> None:
    host, _, port = api.removeprefix("http://").partition(":")
    request = {"prompt": "a blue boat", "seed": 3, "num_inference_steps": 4}
    alone = fetch(f"{api}/v1/images/generations", request)
    before = total(api)["requests"]["completed"]
    with contextlib.ExitStack() as stack:
        for _ in range(10):
            unread = stack.enter_context(socket.socket())
            unread.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            unread.connect((host, int(port)))
            unread.sendall(head(LONG | {"num_inference_steps": 20, "stream": True, "partial_images": 3}))
        assert soon(lambda: total(api)["requests"]["completed"] == before + 10 and idle(api), timeout_s=120)
        answer = fetch(f"{api}/v1/images/generations", request)
    (first,), (second,) = (json.loads(body)["data"] for _, body, _ in (alone, answer))
    assert first["seed"] == second["seed"] == 3
    assert abs(pixels(base64.b64decode(first["b64_json"])) - pixels(base64.b64decode(second["b64_json"]))).max() <= 1
