"""The misbehaving clients of a soak test: they hang up, never read, or send requests that must be refused.

Clients that want pictures are those of the load test (loadtest/client.py).
"""

import asyncio
import contextlib
import json
import re
import socket
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from benchmarks.soak.load import BAD_REQUESTS, GENERATIONS

TIMEOUT_S = 150.0  # above the server's own timeout, so that the server has to answer in time
UNREAD_S = 40.0  # how long a client that never reads stays connected
PREVIEW = b"image_generation.partial_image"
LONGEST_EVENT = 1 << 22

Outcome = tuple[str, int | None, str | None]  # outcome, status, error


def code_of(error: str | None) -> str | None:
    """The code of an error in OpenAI's format, as the load test's records or the server write it."""
    match = re.search(r'^\d{3} (\w+):|"code": "(\w+)"', error or "")
    return match and (match[1] or match[2])


async def ask_badly(session: aiohttp.ClientSession, url: str, name: str) -> Outcome:
    bad = BAD_REQUESTS[name]
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with session.request(
        bad.method, url + bad.path, data=bad.body, headers=bad.headers, timeout=timeout
    ) as answer:
        text = (await answer.read()).decode("utf8", "replace")
        if answer.status == bad.status and refusal_of(text):
            return "ok", answer.status, None
        outcome = "shed" if answer.status in (429, 503) else "wrong_answer"
        return outcome, answer.status, f"{name} must get {bad.status} and got {answer.status}: {text[:200]}"


def refusal_of(text: str) -> bool:
    """Whether the text is an error in OpenAI's format without a traceback."""
    try:
        return {"message", "type", "param", "code"} <= set(json.loads(text)["error"]) and "Traceback" not in text
    except (ValueError, KeyError, TypeError):
        return False


async def hang_up(url: str, request: Mapping[str, Any]) -> Outcome:
    """Sends a request and closes the connection at once, or for a stream after the first preview."""
    host, port = urlsplit(url).hostname, urlsplit(url).port
    reader, writer = await asyncio.open_connection(host, port, limit=LONGEST_EVENT)
    try:
        writer.write(head(url, request))
        await writer.drain()
        if request.get("stream"):
            status = int((await reader.readline()).split()[1])
            if status != 200:
                body = (await reader.read()).partition(b"\r\n\r\n")[2].decode("utf8", "replace")
                return ("shed" if status in (429, 503) else "refused"), status, body[:400]
            await reader.readuntil(PREVIEW)
        return "left", None, None
    except asyncio.IncompleteReadError as ended:
        words = ended.partial.decode("utf8", "replace")
        outcome = "server_error" if "event: error" in words else "reset"
        return outcome, 200, words[words.find("event: error") :][:400]
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def never_read(url: str, request: Mapping[str, Any]) -> Outcome:
    with socket.socket() as unread:
        unread.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        unread.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(unread, (urlsplit(url).hostname, urlsplit(url).port))
        await loop.sock_sendall(unread, head(url, request))
        await asyncio.sleep(UNREAD_S)
    return "unread", None, None


def head(url: str, request: Mapping[str, Any]) -> bytes:
    body = json.dumps(request).encode()
    lines = (
        f"POST {GENERATIONS} HTTP/1.1",
        f"Host: {urlsplit(url).netloc}",
        "Connection: close",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    )
    return "\r\n".join([*lines, "", ""]).encode() + body
