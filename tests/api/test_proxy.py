"""The proxy's protocol and middleware over real sockets: uvicorn with app/api/proxy_protocol.py, and app/api/proxy.py
in front of a test application. tests/on_cluster/test_front.py tests both in Serve's real proxy."""

import ast
import asyncio
import contextlib
import operator
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from app.api import proxy, proxy_bodies, proxy_protocol
from app.api.proxy_protocol import HEAD_BYTES, HEADERS, PIPELINED, BoundedProtocol
from tests.clusters import soon
from tests.raw_http import answers, ask, chunks, closed, connected, head, received

CHUNKED = "Transfer-Encoding: chunked"
Answer = Callable[[Scope, Receive, Send], Awaitable[None]]


async def hello(scope: Scope, receive: Receive, send: Send) -> None:
    await say(send, 200, b"hello", "text/plain")


async def say(send: Send, status: int, body: bytes, kind: str, *headers: tuple[bytes, bytes]) -> None:
    content = [(b"content-type", kind.encode()), (b"content-length", str(len(body)).encode()), *headers]
    await send({"type": "http.response.start", "status": status, "headers": content})
    await send({"type": "http.response.body", "body": body})


@dataclass
class Application:
    """The application behind the middleware, in the place of Serve's proxy."""

    answer: Answer = hello
    scopes: list[Scope] = field(default_factory=list)
    ended: list[bool] = field(default_factory=list)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        try:
            await self.answer(scope, receive, send)
        finally:
            self.ended.append(True)

    def headers(self, name: bytes) -> list[bytes]:
        return [value for known, value in self.scopes[-1]["headers"] if known == name]


class Server:
    """One server for all tests. Each test sets the application behind it."""

    application: Application
    port: int

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.application(scope, receive, send)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    with guarded(server) as server.port:
        yield server


@pytest.fixture
def application(server: Server) -> Application:
    server.application = Application()
    return server.application


@pytest.fixture
def port(server: Server, application: Application) -> int:
    return server.port


@contextmanager
def guarded(application: Answer) -> Iterator[int]:
    config = uvicorn.Config(
        proxy.Guard(application), http=BoundedProtocol, log_level="critical", lifespan="off", timeout_keep_alive=30
    )
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = server.force_exit = True
            thread.join(10)


# The head


@pytest.mark.parametrize(
    "request_",
    [
        head("GET", "/", f"X: {'a' * HEAD_BYTES}"),
        head("GET", "/" + "a" * HEAD_BYTES),
        head("GET", "/?" + "a" * HEAD_BYTES),
        head("GET", "/", *(f"X-{i}: {'a' * 1000}" for i in range(80))),
        head("GET", "/", f"{'X' * HEAD_BYTES}: a"),
        head("GET", "/", *(f"X-{i}: a" for i in range(HEADERS + 1))),
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * (2 << 20),
        b"\r\n" * HEAD_BYTES,
        head("POST", "/", CHUNKED) + b"5\r\nhello\r\n0\r\nX: " + b"a" * (2 * HEAD_BYTES),
        head("POST", "/", CHUNKED) + b"5;" + b"a" * (2 * HEAD_BYTES),
    ],
    ids=["value", "path", "query", "values", "name", "count", "endless", "empty lines", "trailer", "chunk extension"],
)
def test_a_head_above_a_limit_is_refused_and_the_connection_closes(
    application: Application, port: int, request_: bytes
) -> None:
    async def wait_for_the_body(scope: Scope, receive: Receive, send: Send) -> None:
        while (message := await receive()).get("more_body"):
            pass
        assert message["type"] == "http.disconnect"

    application.answer = wait_for_the_body
    with connected(port) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(request_)
        data = received(connection)
    if application.scopes:  # the request has begun, so the connection can only be closed
        assert not data and soon(lambda: bool(application.ended))
    else:
        (answer,) = answers(data)
        assert (answer.status, answer.error["code"]) == (431, "headers_too_large")
    application.answer = hello
    assert ask(port, head()).status == 200


def test_a_head_within_the_limits_is_accepted(application: Application, port: int) -> None:
    headers = [f"X-{i}: {'b' * 100}" for i in range(HEADERS - 1)]
    path = "/?" + "a" * (HEAD_BYTES - len(head("GET", "/?", *headers)))
    assert len(head("GET", path, *headers)) == HEAD_BYTES
    assert ask(port, head("GET", path, *headers)).status == 200
    assert len(application.scopes[0]["query_string"]) == len(path) - 2
    assert application.headers(b"x-126") == [b"b" * 100]


def test_each_request_on_a_connection_has_its_own_limits(port: int) -> None:
    with connected(port) as connection:
        for _ in range(5):
            connection.sendall(head("GET", "/", f"X: {'a' * (HEAD_BYTES // 2)}"))
            assert answers(received(connection, 1))[0].status == 200


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\nGET / HTTP/1.1\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\nPOST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n",
    ],
)
def test_an_unfinished_head_times_out(port: int, monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    """A byte from time to time does not extend the deadline."""
    first, separator, second = sent.rpartition(b"\r\n\r\n")
    with contextlib.ExitStack() as stack:
        if separator:
            connection = stack.enter_context(connected(port))
            connection.sendall(first + separator)
            assert answers(received(connection, 1))[0].status == 200
        monkeypatch.setattr(proxy_protocol, "HEAD_S", 0.4)
        if not separator:
            connection = stack.enter_context(connected(port))
        connection.sendall(second)
        connection.settimeout(0.1)
        data = b""
        for _ in range(100):
            try:
                if second:
                    connection.sendall(b"a")
                piece = connection.recv(65536)
            except TimeoutError:
                continue
            except ConnectionResetError:
                break
            data += piece
            if not piece:
                break
        else:
            raise AssertionError("the connection is still open")
    if second and data:
        assert answers(data)[0].error["code"] == "timeout"


def test_a_body_may_take_as_long_as_the_application_allows(
    application: Application, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy_protocol, "HEAD_S", 1.0)
    monkeypatch.setattr(proxy_protocol, "UNREAD_BODY_S", 1.0)

    async def echo(scope: Scope, receive: Receive, send: Send) -> None:
        body = b""
        while (message := await receive()).get("more_body"):
            body += message["body"]
        await say(send, 200, body + message["body"], "text/plain")

    application.answer = echo
    with connected(port) as connection:
        connection.sendall(head("POST", "/", "Content-Length: 5"))
        for byte in b"hello":
            assert not closed_within(connection, 0.4)
            connection.sendall(bytes([byte]))
        assert answers(received(connection, 1))[0].body == b"hello"


def closed_within(connection: socket.socket, seconds: float) -> bool:
    before = connection.gettimeout()
    connection.settimeout(seconds)
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    finally:
        connection.settimeout(before)


def test_the_rest_of_a_body_after_its_answer_times_out(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy_protocol, "UNREAD_BODY_S", 0.3)
    with connected(port) as connection:
        connection.sendall(head("POST", "/", "Content-Length: 100"))
        assert answers(received(connection, 1))[0].status == 200
        assert closed(connection)


def test_a_client_that_reads_nothing_of_its_answer_is_disconnected(
    application: Application, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy_protocol, "WRITE_S", 0.3)

    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        watch = asyncio.ensure_future(receive())
        while not watch.done():
            await send({"type": "http.response.body", "body": b"a" * 65536, "more_body": True})
            await asyncio.sleep(0)

    application.answer = endless
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", port))
        connection.sendall(head())
        assert soon(lambda: bool(application.ended), 20)


def test_a_client_that_reads_slowly_gets_the_whole_answer(
    application: Application, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deadlines pass one after another, each as soon as something has been read since the one before."""
    due: deque[tuple[BoundedProtocol, int]] = deque()
    unsent = operator.methodcaller("get_write_buffer_size")
    monkeypatch.setattr(BoundedProtocol, "expect_reading", lambda self: due.append((self, unsent(self.transport))))

    async def large(scope: Scope, receive: Receive, send: Send) -> None:
        await say(send, 200, b"a" * (24 << 20), "text/plain")

    application.answer = large
    deadlines = 0
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        connection.connect(("127.0.0.1", port))
        connection.sendall(head("GET", "/", "Connection: close"))
        taken, piece = 0, b"a"
        while piece:
            piece = connection.recv(1 << 20, socket.MSG_WAITALL)
            taken += len(piece)
            if due and unsent(due[0][0].transport) < due[0][1]:
                protocol, before = due.popleft()
                passed = threading.Event()
                protocol.loop.call_soon_threadsafe(protocol.check_reading, before)
                protocol.loop.call_soon_threadsafe(passed.set)
                assert passed.wait(60)
                deadlines += 1
    assert taken > 24 << 20 and deadlines > 1


# Pipelining, trailers, upgrades, nonsense


def test_pipelined_requests_are_answered_in_order_up_to_a_limit(application: Application, port: int) -> None:
    async def path(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.01)
        await say(send, 200, scope["path"].encode(), "text/plain")

    application.answer = path
    with connected(port) as connection:
        connection.sendall(b"".join(head("GET", f"/{i}") for i in range(PIPELINED + 1)))
        raw_answers = answers(received(connection, PIPELINED + 1))
        assert [answer.body for answer in raw_answers] == [f"/{i}".encode() for i in range(PIPELINED + 1)]
        connection.sendall(b"".join(head("GET", f"/{i}") for i in range(1000)))
        assert closed(connection)
    assert soon(lambda: len(application.ended) == len(application.scopes)) and len(application.scopes) < 30


def test_trailers_do_not_become_headers(application: Application, port: int) -> None:
    body = b"5\r\nhello\r\n0\r\nAuthorization: Bearer other\r\nX-Request-Timeout-Seconds: 1\r\n\r\n"
    assert ask(port, head("POST", "/", CHUNKED) + body).status == 200
    assert not application.headers(b"authorization") and not application.headers(b"x-request-timeout-seconds")


@pytest.mark.parametrize(
    "lines",
    [
        (
            "Connection: Upgrade",
            "Upgrade: websocket",
            "Sec-WebSocket-Version: 13",
            "Sec-WebSocket-Key: AAAAAAAAAAAAAAAA",
        ),
        ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__"),
    ],
    ids=["websocket", "h2c"],
)
def test_a_request_to_upgrade_is_ignored(application: Application, port: int, lines: tuple[str, ...]) -> None:
    with connected(port) as connection:
        connection.sendall(head("GET", "/", *lines) + head("GET", "/smuggled"))
        (answer,) = answers(received(connection))
    assert (answer.status, answer.body, answer.headers["connection"]) == (200, b"hello", "close")
    assert [scope["path"] for scope in application.scopes] == ["/"]
    post = head("POST", "/", *lines, "Content-Length: 5")
    assert ask(port, post + b"hello").status == 200


@pytest.mark.parametrize(
    "request_",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS's first message
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost : localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n folded\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\x00b\r\n\r\n",
        head("POST", "/", "Content-Length: 5", CHUNKED) + b"0\r\n\r\n",
        head("POST", "/", "Content-Length: 5", "Content-Length: 6") + b"hello",
        head("POST", "/", "Content-Length: -1"),
        b"GET nowhere HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
)
def test_malformed_requests_are_400_in_openais_shape(application: Application, port: int, request_: bytes) -> None:
    with connected(port) as connection:
        connection.sendall(request_)
        (answer,) = answers(received(connection))
    assert (answer.status, answer.error["code"]) == (400, "invalid_request")
    assert not application.scopes


# The middleware


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (head(host=None), "invalid_host"),
        (head("GET", "/", "Host: other"), "invalid_host"),
        (b"GET / HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n", "invalid_host"),
        *(
            (head(method, "/", "Content-Length: 5"), "unexpected_body")
            for method in ("GET", "HEAD", "DELETE", "OPTIONS")
        ),
        *((head(method, "/", CHUNKED), "unexpected_body") for method in ("GET", "HEAD", "DELETE", "TRACE")),
    ],
)
def test_a_forbidden_head_is_refused_before_its_body(
    application: Application, port: int, monkeypatch: pytest.MonkeyPatch, request_: bytes, code: str
) -> None:
    monkeypatch.setattr(proxy, "LINGER_S", 0.2)
    with connected(port) as connection:
        connection.sendall(request_)
        data = connection.recv(65536)
        assert data.startswith(b"HTTP/1.1 400 Bad Request\r\n") and b"connection: close\r\n" in data
        assert request_.startswith(b"HEAD") or code.encode() in data
        assert closed(connection)
    assert not application.scopes


def test_a_head_that_http_allows_is_accepted(port: int) -> None:
    assert ask(port, b"GET / HTTP/1.0\r\n\r\n").status == 200, "as old load balancers ask"
    assert ask(port, head("GET", "/", "Content-Length: 0")).status == 200
    assert ask(port, head("DELETE", "/")).status == 200


def test_a_get_whose_body_never_ends_is_answered_at_once(port: int) -> None:
    with connected(port) as connection:
        connection.sendall(head("GET", "/imagine?prompt=a", CHUNKED))
        answer = b""
        try:
            for _ in range(600):
                connection.sendall(b"100000\r\n" + b"a" * (1 << 20) + b"\r\n")
        except OSError:
            pass
        with contextlib.suppress(OSError):
            answer = connection.recv(65536)
    assert b"unexpected_body" in answer or not answer


@pytest.mark.parametrize("path", ["/", "/v1/images/edits", "/prefix/v1/images/edits"])
@pytest.mark.parametrize("lines", [("Content-Length: 2000000",), (CHUNKED,)])
def test_a_body_above_the_limit_of_its_path_is_413_and_is_not_kept(
    application: Application, port: int, monkeypatch: pytest.MonkeyPatch, lines: tuple[str, ...], path: str
) -> None:
    limit = 1_500_000 if "edits" in path else 1_000_000
    monkeypatch.setattr(proxy_bodies, "LARGEST_BODY", 1_000_000)
    monkeypatch.setattr(proxy_bodies, "LARGEST_UPLOAD", 1_500_000)
    kept: list[bytes] = []

    async def wait_for_the_body(scope: Scope, receive: Receive, send: Send) -> None:
        while (message := await receive())["type"] != "http.disconnect":  # like Serve
            kept.append(message["body"])

    application.answer = wait_for_the_body
    chunk = b"186a0\r\n" + b"a" * 100_000 + b"\r\n"
    answer = ask(port, head("POST", path, *lines) + 20 * chunk + b"0\r\n\r\n")
    assert (answer.status, answer.error["code"]) == (413, "payload_too_large")
    assert sum(map(len, kept)) <= limit and str(limit) in answer.error["message"]


@pytest.mark.parametrize("lines", [("Content-Length: 30000",), (CHUNKED,)])
def test_bodies_that_are_too_many_together_are_503_and_those_that_were_first_go_on(
    application: Application, port: int, monkeypatch: pytest.MonkeyPatch, lines: tuple[str, ...]
) -> None:
    monkeypatch.setattr(proxy_bodies, "ALL_BODIES", 50_000)
    kept: list[int] = []

    async def length(scope: Scope, receive: Receive, send: Send) -> None:
        total = 0
        while (message := await receive())["type"] != "http.disconnect":
            total += len(message["body"])
            kept.append(len(message["body"]))
            if not message.get("more_body"):
                await say(send, 200, str(total).encode(), "text/plain")
                return

    application.answer = length
    body = b"7530\r\n" + b"a" * 30_000 + b"\r\n0\r\n\r\n" if CHUNKED in lines else b"a" * 30_000
    with connected(port) as first:
        first.sendall(head("POST", "/", *lines) + body[:-10])
        assert soon(lambda: sum(kept) >= 29_990)
        refused = ask(port, head("POST", "/", *lines) + body)
        assert (refused.status, refused.error["code"], refused.headers["retry-after"]) == (503, "queue_full", "2")
        assert sum(kept) <= 50_000
        assert ask(port, head("POST", "/v1/images/edits", *lines) + body).body == b"30000", "counted apart"
        first.sendall(body[-10:])
        assert answers(received(first, 1))[0].body == b"30000"
    for _ in range(5):
        assert ask(port, head("POST", "/", *lines) + body).body == b"30000", "what has ended counts no more"


@pytest.mark.parametrize("path", ["/-/routes", "/prefix/-/routes"])
def test_serves_list_of_applications_is_closed(application: Application, port: int, path: str) -> None:
    for method in ("GET", "POST"):
        answer = ask(port, head(method, path))
        assert (answer.status, answer.error["code"]) == (404, "not_found")
    assert not application.scopes
    assert ask(port, head("GET", "/-/healthz")).status == 200


@pytest.mark.parametrize(
    "name",
    [
        *("X-Request-Disconnect-Disabled", "X-Request-Timeout-Seconds", "serve_multiplexed_model_id"),
        *("serve-multiplexed-model-id", "X-Session-Id", "x_session_id", "X_Request_Timeout_Seconds", "X_Request_ID"),
    ],
)
@pytest.mark.parametrize("value", ["?1", "0.001", "\xff"])
def test_serves_private_headers_are_dropped(application: Application, port: int, name: str, value: str) -> None:
    assert ask(port, head("GET", "/", f"{name}: {value}", "X-Other: kept")).status == 200
    assert not application.headers(name.lower().encode()) and application.headers(b"x-other") == [b"kept"]


@pytest.mark.parametrize(
    ("lines", "known"),
    [
        (("X-Request-ID: abc-1_2.3",), b"abc-1_2.3"),
        (("X-Request-ID: " + "a" * 64,), b"a" * 64),
        (("X-Request-ID: " + "a" * 65,), None),
        (("X-Request-ID: \xff",), None),
        (("X-Request-ID: a b",), None),
        (("X-Request-ID: \x1b[31m",), None),
        (("X-Request-ID:",), None),
        (("X-Request-ID: a", "X-Request-ID: b"), None),
        ((), None),
    ],
)
def test_a_request_has_one_id_and_a_clients_only_if_it_is_safe(
    application: Application, port: int, lines: tuple[str, ...], known: bytes | None
) -> None:
    with connected(port) as connection:
        connection.sendall(head("GET", "/", *lines))
        received(connection, 1)
    (seen,) = application.headers(b"x-request-id") if application.scopes else [None]
    if known:
        assert seen == known
    elif seen:  # uvicorn refuses control characters by itself
        assert len(seen) == 36 and not any(seen.decode() in line for line in lines)


def test_trace_headers_that_serve_cannot_decode_are_dropped(application: Application, port: int) -> None:
    assert ask(port, head("GET", "/", "traceparent: 00-ab-cd-01", "tracestate: \xff")).status == 200
    assert application.headers(b"traceparent") == [b"00-ab-cd-01"] and not application.headers(b"tracestate")


SERVES = [  # as ray/serve/_private writes them
    (404, "Path '/a\n' not found. Ping http://.../-/routes for available routes.", "not_found"),
    (408, "Request 0b62 timed out after 60.0s.", "timeout"),
    (429, "Request dropped due to backpressure (num_queued_requests=3, max_queued_requests=3).", "queue_full"),
    (503, "Request dropped due to backpressure (num_queued_requests=3, max_queued_requests=3).", "queue_full"),
    (503, "Deployment(name='A', app='b') is unavailable because it failed to deploy.", "model_not_ready"),
    (503, "Route table is not populated yet.", "model_not_ready"),
    (503, "No replicas are available yet.", "model_not_ready"),
    (503, "This node is being drained.", "model_not_ready"),
]


@pytest.mark.parametrize(("status", "text", "code"), SERVES)
def test_serves_own_errors_have_openais_shape(
    application: Application, port: int, status: int, text: str, code: str
) -> None:
    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        kind = "text/plain; charset=utf-8"
        await say(send, status, text.encode(), kind, (b"retry-after", b"7"), (b"X-Request-ID", b"abc"))

    application.answer = refuse
    answer = ask(port, head())
    assert (answer.status, answer.error["code"]) == (status, code) and text not in answer.body.decode()
    assert (answer.headers["retry-after"], answer.headers["x-request-id"]) == ("7", "abc")


def test_serve_still_has_these_error_texts() -> None:
    from ray.serve._private import constants, proxy_router
    from ray.serve._private.common import DeploymentID
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

    sentences = [
        BackPressureError(3, 3).message,
        DeploymentUnavailableError(DeploymentID("A", "b")).message,
        *(proxy_router.NO_ROUTES_MESSAGE, proxy_router.NO_REPLICAS_MESSAGE, constants.DRAINING_MESSAGE),
    ]
    assert all(proxy.translate(503, sentence.encode()) for sentence in sentences)


@pytest.mark.parametrize(("status", "text"), [(404, "Not Found"), (500, "Internal Server Error"), (503, "later")])
def test_another_applications_plain_text_stays_as_it_is(
    application: Application, port: int, status: int, text: str
) -> None:
    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        await say(send, status, text.encode(), "text/plain; charset=utf-8")

    application.answer = refuse
    answer = ask(port, head())
    assert (answer.status, answer.body, answer.headers["content-type"]) == (
        status,
        text.encode(),
        "text/plain; charset=utf-8",
    )


async def nothing(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers nothing, as Serve does when the ingress is lost."""


async def bug(scope: Scope, receive: Receive, send: Send) -> None:
    raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "the traceback's words")


@pytest.mark.parametrize(
    ("answering", "status", "code"), [(nothing, 503, "replica_lost"), (bug, 500, "internal_error")], ids=["lost", "bug"]
)
def test_where_the_ingress_is_lost_the_proxy_answers(
    application: Application, port: int, answering: Answer, status: int, code: str
) -> None:
    application.answer = answering
    answer = ask(port, head("GET", "/", "X-Request-ID: mine"))
    assert (answer.status, answer.error["code"]) == (status, code) and b"traceback" not in answer.body
    assert answer.headers["x-request-id"] == "mine"
    assert ("retry-after" in answer.headers) == (status == 503)


def test_an_answer_that_breaks_off_ends_the_connection(application: Application, port: int) -> None:
    async def half(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": b"begun", "more_body": True})

    application.answer = half
    with connected(port) as connection:
        connection.sendall(head())
        data = received(connection)
    body, _, whole = chunks(data.partition(b"\r\n\r\n")[2])
    assert body == b"begun" and not whole and data.count(b"HTTP/1.1") == 1


def test_a_disconnected_client_gets_no_answer(application: Application, port: int) -> None:
    async def until_gone(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    application.answer = until_gone
    with connected(port) as connection:
        connection.sendall(head())
        assert soon(lambda: bool(application.scopes))
    assert soon(lambda: bool(application.ended))
    application.answer = hello
    assert ask(port, head()).status == 200


@pytest.mark.slow
def test_serve_accepts_the_callback_and_it_imports_nothing_heavy() -> None:
    script = (
        "import sys; import ray.serve; before = set(sys.modules); import app.api.proxy; import uvicorn.config\n"
        "from ray.serve._private.http_util import validate_http_proxy_callback_return as check\n"
        "from ray.serve._private.utils import call_function_from_import_path as call\n"
        "print(check(call('app.api.proxy:guards'))[0].cls.__name__)\n"
        "config = uvicorn.Config(None); config.load(); print(config.http_protocol_class.__name__)\n"
        "print(sorted({name.partition('.')[0] for name in set(sys.modules) - before}))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    guard, protocol, brought = done.stdout.splitlines()
    assert (guard, protocol) == ("Guard", "BoundedProtocol")
    assert set(ast.literal_eval(brought)) <= {"app", "httptools", "uvicorn", "websockets", "uvloop"}
