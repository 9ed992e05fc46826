"""Protects Serve's HTTP proxy: a callback that Serve calls when the proxy starts.

The environment variable RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH of `ray start` names `guards`. That gives uvicorn a
protocol with limits (proxy_protocol.py), and puts a middleware in front of Serve's. The middleware refuses malformed
requests, drops Serve's private headers, and gives Serve's own errors OpenAI's shape.

Applies to every application on the cluster. Knows nothing of API keys, routes or models. Every proxy imports this
module, so it must import nothing heavy.
"""

import asyncio
import contextlib
import logging
import re
import uuid
from collections import Counter
from collections.abc import Iterable

import uvicorn.config
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.errors import ApiError
from app.api.proxy_bodies import Body
from app.api.proxy_protocol import LINGER_BYTES, LINGER_S, refusal
from app.ray_internals.serve import (
    SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER,
    SERVE_HTTP_REQUEST_ID_HEADER,
    SERVE_HTTP_REQUEST_TIMEOUT_S_HEADER,
    SERVE_MULTIPLEXED_MODEL_ID,
    SERVE_SESSION_ID,
)

logger = logging.getLogger(f"ray.serve.{__name__}")

WITH_BODY = ("POST", "PUT", "PATCH")
SERVE_ROUTES = "/-/routes"  # where Serve lists its applications for everybody
LOST_RETRY_S = 5.0  # Serve starts another ingress in a few seconds

Headers = list[tuple[bytes, bytes]]


def plain(name: str) -> bytes:
    """Other proxies turn `_` into `-` or the reverse, and Serve accepts some of its headers in both spellings."""
    return name.lower().replace("_", "-").encode()


REQUEST_ID = plain(SERVE_HTTP_REQUEST_ID_HEADER)
PRIVATE = {
    *(plain(SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER), plain(SERVE_HTTP_REQUEST_TIMEOUT_S_HEADER)),
    *(plain(SERVE_MULTIPLEXED_MODEL_ID), plain(SERVE_SESSION_ID), REQUEST_ID),
}
TRACING = {b"traceparent", b"tracestate"}  # with tracing on, Serve decodes them as UTF-8
HARMLESS_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")

# The plain texts of Serve's own errors (Ray 2.60.0), and what replaces them: message, code and Retry-After.
TRANSLATIONS = [
    (rb"Path '.*' not found\. Ping .*", "No application is deployed at this path.", "not_found", None),
    (rb"Request \S+ timed out.*", "The request took longer than this cluster allows.", "timeout", None),
    (rb"Request dropped due to backpressure.*", "Too many requests are being answered; try again.", "queue_full", 1.0),
    (rb"Deployment.* failed to deploy\.", "The deployment failed, so nothing answers here.", "model_not_ready", 30.0),
    (
        rb"Route table is not populated yet\.|No replicas are available yet\.|This node is being drained\.",
        *("The API cannot take requests now; try again later.", "model_not_ready", 5.0),
    ),
]
SERVE_ERRORS = (404, 408, 429, 503)


def guards() -> list[Middleware]:
    """Serve calls this once in each proxy, before it configures uvicorn."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = "app.api.proxy_protocol:BoundedProtocol"
    logger.info("app.api.proxy guards this proxy.")
    return [Middleware(Guard)]


class Guard:
    """The middleware in front of Serve's."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.held: Counter[bool] = Counter()  # bytes of bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        body = Body(scope["path"], self.held)
        try:
            check_head(scope, body)
        except ApiError as error:
            await refuse(error, receive, send)
            return
        # A new list: uvicorn keeps the old one.
        headers = without_private(scope["headers"])
        request = Request(receive, send, headers[-1], body)
        try:
            await self.app({**scope, "headers": headers}, request.receive, request.send)
        except Exception:
            await request.end(ApiError(500, "The server failed on this request.", None, "internal_error"))
            raise
        finally:
            body.end()
        # Serve sends no answer at all if the replica is lost.
        lost = ApiError(503, "The server that answered was lost; try again.", None, "replica_lost", LOST_RETRY_S)
        await request.end(lost)


class Request:
    """Passes messages between uvicorn and Serve, counts the body, and knows whether an answer has begun."""

    def __init__(self, receive: Receive, send: Send, request_id: tuple[bytes, bytes], body: Body) -> None:
        self.from_client = receive
        self.to_client = send
        self.request_id = request_id
        self.body = body
        self.disconnected = False
        self.begun = False
        self.held: Message | None = None  # the start of an answer that may be an error of Serve's

    async def receive(self) -> Message:
        """A body above a limit ends as if the client had disconnected, so Serve cancels the request."""
        if self.body.excess:
            return {"type": "http.disconnect"}
        message = await self.from_client()
        self.disconnected = message["type"] == "http.disconnect"
        return message if self.body.take(len(message.get("body", b""))) else {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start" and not self.begun:
            self.begun = True
            if message["status"] in SERVE_ERRORS and content_type(message["headers"]).startswith(b"text/plain"):
                self.held = message
                return
        if self.held is not None:
            start, self.held = self.held, None
            if error := translate(start["status"], message.get("body", b"")):
                await self.answer(error, start["headers"])
                return
            await self.to_client(start)
        await self.to_client(message)

    async def end(self, error: ApiError) -> None:
        """Sends an answer if the application sent none and the client still waits."""
        if self.begun or self.disconnected:
            return
        if self.body.excess:
            await refuse(self.body.excess, self.from_client, self.to_client)
        else:
            await self.answer(error, [self.request_id])

    async def answer(self, error: ApiError, serve_headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Keeps Serve's own Retry-After and X-Request-ID."""
        kept = [(name, value) for name, value in serve_headers if name.lower() in (b"retry-after", b"x-request-id")]
        headers, body = refusal(error)
        names = {name.lower() for name, _ in kept}
        headers = [pair for pair in headers if pair[0] not in names] + kept
        self.begun = True
        await self.to_client({"type": "http.response.start", "status": error.status, "headers": headers})
        await self.to_client({"type": "http.response.body", "body": body})


def check_head(scope: Scope, body: Body) -> None:
    """Refuses a head that no application should get."""
    headers: Headers = scope["headers"]
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) > 1 or not hosts and scope.get("http_version") != "1.0":
        raise ApiError(400, f"A request must have one Host header, got {len(hosts)}.", None, "invalid_host")
    lengths = [value for name, value in headers if name == b"content-length"]
    method = scope.get("method", "GET")
    if method not in WITH_BODY and (any(name == b"transfer-encoding" for name, _ in headers) or any(map(int, lengths))):
        raise ApiError(400, f"A {method} request must have no body.", None, "unexpected_body")
    if scope["path"].endswith(SERVE_ROUTES):
        raise ApiError(404, "Serve's list of applications is closed here.", None, "not_found")
    for length in lengths:
        body.check_length(int(length))


def translate(status: int, body: bytes) -> ApiError | None:
    """The error for an error text of Serve's. Other plain text of an application has no translation."""
    for pattern, message, code, retry_after_s in TRANSLATIONS:
        if re.fullmatch(pattern, body, re.DOTALL):
            return ApiError(status, message, None, code, retry_after_s)
    return None


def without_private(headers: Headers) -> Headers:
    """Without Serve's private headers. The last header is X-Request-ID: the client's if it is safe in a log."""
    ids = [value for name, value in headers if plain(name.decode("latin-1")) == REQUEST_ID]
    known = ids[0] if len(ids) == 1 and HARMLESS_ID.fullmatch(ids[0]) else str(uuid.uuid4()).encode()
    kept = [
        (name, value)
        for name, value in headers
        if plain(name.decode("latin-1")) not in PRIVATE and (value.isascii() or name not in TRACING)
    ]
    return [*kept, (SERVE_HTTP_REQUEST_ID_HEADER.encode(), known)]


def content_type(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    return next((value for name, value in headers if name.lower() == b"content-type"), b"")


async def refuse(error: ApiError, receive: Receive, send: Send) -> None:
    """Answers at once, then discards the body for a moment: a client that is still sending when the connection closes
    sees a reset instead of the answer."""
    headers, body = refusal(error)
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    discarded = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            while discarded < LINGER_BYTES:
                message = await receive()
                discarded += len(message.get("body", b""))
                if message["type"] != "http.request" or not message.get("more_body"):
                    break
    await send({"type": "http.response.body", "body": b""})
