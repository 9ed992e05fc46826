"""What Serve's proxy does before and after any application's code: the callback that Serve calls at its start.

RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names `guards`, where `ray start` runs. It puts a protocol with limits into
uvicorn (app/api/proxy_protocol.py) and a middleware before Serve's own, which refuses what no application should see,
drops the headers that are Serve's private ones, and gives Serve's own refusals OpenAI's error shape. Applies to every
application on the cluster. Knows nothing of keys, routes or models, and must import nothing heavy.
"""

import asyncio
import contextlib
import logging
import re
import uuid
from collections.abc import Iterable

import uvicorn.config
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.errors import ApiError
from app.api.proxy_protocol import LINGER_BYTES, LINGER_S, refusal
from app.ray_internals.serve import (
    SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER,
    SERVE_HTTP_REQUEST_ID_HEADER,
    SERVE_HTTP_REQUEST_TIMEOUT_S_HEADER,
    SERVE_MULTIPLEXED_MODEL_ID,
    SERVE_SESSION_ID,
)

logger = logging.getLogger(f"ray.serve.{__name__}")

# The proxy and the ingress each keep a body until the ingress has read it. Far above body_bytes of any config, and
# room for images that a request may carry one day.
BODY_BYTES = 64 << 20
WITH_BODY = ("POST", "PUT", "PATCH")
LOST_RETRY_S = 5.0  # Serve starts another ingress in a few seconds

Headers = list[tuple[bytes, bytes]]


def plain(name: str) -> bytes:
    """Proxies before ours turn `_` into `-` or the other way round, and Serve takes some of its headers in both."""
    return name.lower().replace("_", "-").encode()


REQUEST_ID = plain(SERVE_HTTP_REQUEST_ID_HEADER)
PRIVATE = {
    *(plain(SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER), plain(SERVE_HTTP_REQUEST_TIMEOUT_S_HEADER)),
    *(plain(SERVE_MULTIPLEXED_MODEL_ID), plain(SERVE_SESSION_ID), REQUEST_ID),
}
TRACING = {b"traceparent", b"tracestate"}  # Serve decodes them as UTF-8, if tracing is on
HARMLESS_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")

# What Serve says in plain text when it refuses a request itself (ray/serve/_private, 2.60.0), and what is said here.
SERVES_OWN = [
    (rb"Path '.*' not found\. Ping .*", "No application is deployed at this path.", "not_found", None),
    (rb"Request \S+ timed out.*", "The request took longer than this cluster allows.", "timeout", None),
    (rb"Request dropped due to backpressure.*", "Too many requests are being answered; try again.", "queue_full", 1.0),
    (rb"Deployment.* failed to deploy\.", "The deployment failed, so nothing answers here.", "model_not_ready", 30.0),
    (
        rb"Route table is not populated yet\.|No replicas are available yet\.|This node is being drained\.",
        *("The API cannot take requests now; try again later.", "model_not_ready", 5.0),
    ),
]
MAY_BE_SERVES = (404, 408, 429, 503)


def guards() -> list[Middleware]:
    """Called once in each proxy, before uvicorn is configured."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = "app.api.proxy_protocol:BoundedProtocol"
    logger.info("app.api.proxy guards this proxy.")
    return [Middleware(Guard)]


class Guard:
    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        try:
            check(scope)
        except ApiError as error:
            await refuse(error, receive, send)
            return
        # A new list: uvicorn keeps the old one.
        headers = without_private(scope["headers"])
        request = Request(receive, send, headers[-1])
        try:
            await self.app({**scope, "headers": headers}, request.receive, request.send)
        except Exception:
            await request.end(ApiError(500, "The server failed on this request.", None, "internal_error"))
            raise
        # Serve answers nothing where the replica that should have answered is lost.
        lost = ApiError(503, "The server that answered was lost; try again.", None, "replica_lost", LOST_RETRY_S)
        await request.end(lost)


class Request:
    """Between uvicorn and Serve: what has come of the body, and whether an answer has begun."""

    def __init__(self, receive: Receive, send: Send, request_id: tuple[bytes, bytes]) -> None:
        self.from_client = receive
        self.to_client = send
        self.request_id = request_id
        self.body_bytes = 0
        self.gone = False
        self.begun = False
        self.held: Message | None = None  # the start of an answer that may be Serve's own

    async def receive(self) -> Message:
        """A body that is too large ends as if the client had gone: Serve then cancels what it has begun."""
        if self.body_bytes > BODY_BYTES:
            return {"type": "http.disconnect"}
        message = await self.from_client()
        self.gone = message["type"] == "http.disconnect"
        self.body_bytes += len(message.get("body", b""))
        return {"type": "http.disconnect"} if self.body_bytes > BODY_BYTES else message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start" and not self.begun:
            self.begun = True
            if message["status"] in MAY_BE_SERVES and content_type(message["headers"]).startswith(b"text/plain"):
                self.held = message
                return
        if self.held is not None:
            start, self.held = self.held, None
            if error := translated(start["status"], message.get("body", b"")):
                await self.answer(error, start["headers"])
                return
            await self.to_client(start)
        await self.to_client(message)

    async def end(self, error: ApiError) -> None:
        """After the application: an answer, if it gave none and somebody still waits for one."""
        if self.begun or self.gone:
            return
        if self.body_bytes > BODY_BYTES:
            await refuse(too_large(), self.from_client, self.to_client)
        else:
            await self.answer(error, [self.request_id])

    async def answer(self, error: ApiError, given: Iterable[tuple[bytes, bytes]]) -> None:
        """Serve's own Retry-After and X-Request-ID stay."""
        kept = [(name, value) for name, value in given if name.lower() in (b"retry-after", b"x-request-id")]
        headers, body = refusal(error)
        names = {name.lower() for name, _ in kept}
        headers = [pair for pair in headers if pair[0] not in names] + kept
        self.begun = True
        await self.to_client({"type": "http.response.start", "status": error.status, "headers": headers})
        await self.to_client({"type": "http.response.body", "body": body})


def check(scope: Scope) -> None:
    """What no application is to see."""
    headers: Headers = scope["headers"]
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) > 1 or not hosts and scope.get("http_version") != "1.0":
        raise ApiError(400, f"A request must have one Host header, got {len(hosts)}.", None, "invalid_host")
    lengths = [value for name, value in headers if name == b"content-length"]
    method = scope.get("method", "GET")
    if method not in WITH_BODY and (any(name == b"transfer-encoding" for name, _ in headers) or any(map(int, lengths))):
        raise ApiError(400, f"A {method} request must have no body.", None, "unexpected_body")
    if any(int(length) > BODY_BYTES for length in lengths):
        raise too_large()


def translated(status: int, body: bytes) -> ApiError | None:
    """In place of a refusal of Serve's own; another application's plain text is left as it is."""
    for pattern, message, code, retry_after_s in SERVES_OWN:
        if re.fullmatch(pattern, body, re.DOTALL):
            return ApiError(status, message, None, code, retry_after_s)
    return None


def too_large() -> ApiError:
    return ApiError(413, f"The body must be at most {BODY_BYTES} bytes.", None, "payload_too_large")


def without_private(headers: Headers) -> Headers:
    """With exactly one X-Request-ID, the last: the client's, if it can do no harm in a log."""
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
    """Answers at once and keeps nothing of a body. Then reads on for a moment: a client that still sends when the
    connection closes sees a reset and not the answer."""
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
