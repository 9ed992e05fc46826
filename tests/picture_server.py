"""A fake image server on loopback. The prompt selects what it does: wait, refuse, break off, or send a bad image."""

import asyncio
import base64
import json
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from itertools import cycle
from typing import Any

import numpy as np
from aiohttp import web
from PIL import Image

SIZE = "16x16"
NEAR = cycle((0, 1))


@dataclass
class Server:
    url: str = ""
    seen: list[dict[str, Any]] = field(default_factory=list)  # the fields of each request, in order
    stall: tuple[int, float] | None = None  # the number of the request that blocks all, and for how long
    gate: asyncio.Lock = field(default_factory=asyncio.Lock)
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


def picture(seed: int, size: str = SIZE, form: str = "PNG") -> bytes:
    width, height = map(int, size.split("x"))
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return encoded(pixels, form)


def encoded(pixels: np.ndarray, form: str = "PNG") -> bytes:
    file = BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def drawn(fields: dict[str, Any]) -> bytes:
    """The image that the prompt's first word selects."""
    match fields["prompt"].split()[0]:
        case "blank":
            return encoded(np.full((16, 16, 3), 200, np.uint8))
        case "small":
            return picture(int(fields["seed"]), "8x8")
        case "garbage":
            return b"\x89PNG but not really"
        case "fickle":
            return picture(random.randrange(2**32))
        case "near":  # one grey level away, every other time
            base = np.full((16, 16, 3), 100, np.uint8)
            base[:8] = 50
            return encoded(base + np.uint8(next(NEAR)))
    return picture(int(fields["seed"]), fields.get("size", SIZE))


@contextmanager
def picture_server() -> Iterator[Server]:
    server = Server()
    started, loop = threading.Event(), asyncio.new_event_loop()

    async def handle(request: web.Request) -> web.StreamResponse:
        fields = dict(request.query) if request.method == "GET" else await request.json()
        fields["method"] = request.method
        server.seen.append(fields)
        if server.stall and len(server.seen) == server.stall[0]:
            async with server.gate:
                await asyncio.sleep(server.stall[1])
        async with server.gate:  # while a request stalls, so do all others
            pass
        word, _, value = fields["prompt"].partition(" ")
        match word:
            case "delay":
                await asyncio.sleep(float(value))
            case "turn":  # one at a time
                async with server.turn:
                    await asyncio.sleep(float(value))
            case "status":
                error = {"message": "in words", "code": "because"}
                return web.json_response({"error": error}, status=int(value[:3]), headers={"Retry-After": "1"})
            case "drop":
                assert request.transport
                request.transport.abort()
                return web.Response()
            case "reset":
                response = web.StreamResponse(headers={"Content-Length": "100000"})
                await response.prepare(request)
                await response.write(b"{" * 5000)
                assert request.transport
                request.transport.abort()
                return response
        files = [drawn(fields)] * (int(fields.get("n", 1)) - (word == "fewer"))
        if request.method == "GET":
            return web.Response(body=files[0], content_type="image/png", headers={"Server-Timing": "denoise;dur=12.5"})
        images = [base64.b64encode(file).decode() for file in files]
        if fields.get("stream"):
            return await streamed(request, images[0], word)
        return web.json_response({"data": [{"b64_json": image} for image in images], "timings": {"denoise_s": 0.0125}})

    async def models(request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "noise", "defaults": {"size": SIZE}}]})

    async def serve() -> web.AppRunner:
        app = web.Application()
        app.add_routes([web.post("/v1/images/{kind}", handle), web.get("/imagine", handle)])
        app.add_routes([web.get("/v1/models", models)])
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        return runner

    def work() -> None:
        asyncio.set_event_loop(loop)
        runner = loop.run_until_complete(serve())
        started.set()
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=work)
    thread.start()
    started.wait(10)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


async def streamed(request: web.Request, picture: str, word: str) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    events: list[tuple[str, object]] = [("image_generation.partial_image", {"b64_json": picture})]
    if word == "fail":
        events.append(("error", {"error": {"message": "lost", "code": "replica_lost"}}))
    elif word != "halt":
        events.append(("image_generation.completed", {"b64_json": picture}))
    await response.write(b": still at work\n\n")
    for name, data in events:
        await asyncio.sleep(0.05)
        event = f"event: {name}\ndata: {json.dumps(data)}\n\n"
        await response.write((event.replace("\n", "\r\n") if word == "crlf" else event).encode())
    return response
