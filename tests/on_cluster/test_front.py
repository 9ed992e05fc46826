"""What stands before the API, in Serve's real proxy and the real ingress of a local cluster, as `make up` and
`make deploy` bring it up. The attacks here were first tried by hand; tests/api/test_proxy.py has each rule by
itself."""

import contextlib
import json
import os
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest

from app.api.proxy_protocol import HEAD_S
from tests import http_fuzz
from tests.clusters import Verbs, fetch, soon
from tests.fuzz_cases import KINDS
from tests.raw_http import answers, ask, closed, connected, head, received

pytestmark = pytest.mark.cluster

MIB = 1 << 20
LONG = "num_inference_steps=100"  # long enough to be seen while it is drawn
FUZZ_SEED = 14
FUZZ_MIB = 200  # more than before; an endless body alone was 600


@pytest.fixture
def port(api: str, verbs: Verbs) -> int:
    return verbs.serve_port


@pytest.fixture
def front(verbs: Verbs, port: int) -> dict[str, psutil.Process]:
    processes_in_front = http_fuzz.front_of(verbs.cluster)
    assert set(processes_in_front) == {"proxy", "ingress"}
    return processes_in_front


def total(port: int) -> dict[str, Any]:
    return dict(json.loads(fetch(f"http://127.0.0.1:{port}/v1/stats")[1])["total"])


# mem.py, header_blocks_proxy.py


def test_an_endless_head_is_refused_and_holds_nobody_up(port: int, front: dict[str, psutil.Process]) -> None:
    """150 MB of one header stopped the proxy for 19 s."""
    before = http_fuzz.resident(front["proxy"])
    sent = 0
    with connected(port) as connection, contextlib.suppress(OSError):
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ")
        for _ in range(150):
            connection.sendall(b"a" * MIB)
            sent += 1
    assert sent < 150
    assert ask(port, head("GET", "/", f"X: {'a' * (100 << 10)}")).error["code"] == "headers_too_large"
    assert http_fuzz.resident(front["proxy"]) - before < 50


@pytest.mark.parametrize("target", ["/healthz", "/imagine?prompt=a&num_inference_steps=100", "/nowhere", "/-/healthz"])
def test_a_body_that_a_get_brings_is_refused_and_kept_by_nobody(
    port: int, front: dict[str, psutil.Process], target: str
) -> None:
    """600 MB of it made the proxy 1.3 GB, and the ingress 1.4 GB."""
    before = {name: http_fuzz.resident(process) for name, process in front.items()}
    sent = 0
    with connected(port) as connection:
        connection.sendall(head("GET", target, "Transfer-Encoding: chunked"))
        (answer,) = answers(received(connection, 1))
        assert (answer.status, answer.error["code"]) == (400, "unexpected_body")
        with contextlib.suppress(OSError):
            for _ in range(300):
                connection.sendall(b"100000\r\n" + b"a" * MIB + b"\r\n")
                sent += 1
    assert sent < 300
    for name, process in front.items():
        assert http_fuzz.resident(process) - before[name] < 50, name


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [
        ("POST", "/v1/images/generations", {413}),
        ("POST", "/v1/models", {405, 413}),  # whichever is first: the route's answer, or the proxy's limit
        ("PUT", "/", {405, 413}),
        ("POST", "/-/routes", {404}),
        ("POST", "/-/healthz", {200, 413}),
    ],
)
def test_an_endless_post_is_ended_and_kept_by_nobody(
    port: int, front: dict[str, psutil.Process], method: str, target: str, status: set[int]
) -> None:
    before = {name: http_fuzz.resident(process) for name, process in front.items()}
    with connected(port) as connection:
        connection.sendall(head(method, target, "Transfer-Encoding: chunked", "Content-Type: application/json"))
        with contextlib.suppress(OSError):
            for _ in range(300):
                connection.sendall(b"100000\r\n" + b" " * MIB + b"\r\n")
        (answer,) = answers(received(connection, 1))
        assert answer.status in status
        assert closed(connection)
    for name, process in front.items():
        assert http_fuzz.resident(process) - before[name] < 150, name


@pytest.mark.parametrize(
    "name", ["X-Request-Timeout-Seconds", "X-Request-ID", "serve_multiplexed_model_id", "X-Session-Id"]
)
def test_bytes_that_serve_cannot_decode_are_no_error(port: int, name: str) -> None:
    """They were a 500 and a leak."""
    for _ in range(20):
        assert ask(port, head("GET", "/", f"{name}: \xff")).status == 200


# hang_ups.py 2, 4, 5


def test_a_private_header_neither_shortens_the_wait_nor_keeps_the_device_at_work(port: int) -> None:
    assert (
        ask(port, head("GET", "/imagine?prompt=a&num_inference_steps=5", "X-Request-Timeout-Seconds: 0.001")).status
        == 200
    )
    lines = ("X-Request-Disconnect-Disabled: ?1",)
    with contextlib.ExitStack() as connections:
        for _ in range(10):
            connection = connections.enter_context(connected(port))
            connection.sendall(head("GET", f"/imagine?prompt=gone&{LONG}", *lines))
        assert soon(lambda: total(port)["unfinished"] == 10)
        before = total(port)["requests"]["cancelled"]
    assert soon(lambda: total(port)["unfinished"] == 0)
    assert total(port)["requests"]["cancelled"] >= before + 8, "hardly any of them can have been drawn by then"


def test_who_closes_one_side_only_is_gone_too(port: int) -> None:
    before = total(port)["requests"]["cancelled"]
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(connected(port)) for _ in range(5)]
        for connection in opened:
            connection.sendall(head("GET", f"/imagine?prompt=half&{LONG}"))
        assert soon(lambda: total(port)["unfinished"] == 5)
        for connection in opened:
            connection.shutdown(socket.SHUT_WR)
        assert soon(lambda: total(port)["unfinished"] == 0)
    assert total(port)["requests"]["cancelled"] >= before + 4


def test_slow_heads_and_silent_connections_are_closed(port: int) -> None:
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(connected(port, HEAD_S + 20)) for _ in range(20)]
        silent = [stack.enter_context(connected(port, HEAD_S + 20)) for _ in range(5)]
        stop = threading.Event()

        def trickle() -> None:
            for connection in slow:
                connection.sendall(b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\n")
            while not stop.wait(0.5):
                for connection in slow:
                    with contextlib.suppress(OSError):
                        connection.sendall(b"X-a: b\r\n")

        thread = threading.Thread(target=trickle)
        thread.start()
        try:
            assert fetch(f"http://127.0.0.1:{port}/healthz")[0] == 200
            with ThreadPoolExecutor(25) as pool:
                assert all(pool.map(closed, [*slow, *silent]))
        finally:
            stop.set()
            thread.join()


# Serve's own answers, and a lost ingress


def test_another_id_than_a_harmless_one_is_not_repeated(port: int) -> None:
    assert ask(port, head("GET", "/", "X-Request-ID: mine-1")).headers["x-request-id"] == "mine-1"
    assert "forged" not in ask(port, head("GET", "/", "X-Request-ID: a forged line")).headers["x-request-id"]


def test_a_rebinding_page_gets_403_through_the_real_proxy(port: int) -> None:
    evil = head("GET", "/imagine?prompt=a", "Origin: http://evil.example:8000", host="evil.example:8000")
    assert ask(port, evil).status == 403
    embedded = head("GET", "/imagine?prompt=a", "Sec-Fetch-Site: cross-site", host=f"127.0.0.1:{port}")
    assert ask(port, embedded).error["code"] == "cross_site"


# The fuzzer, `make fuzz` with fewer


def test_malformed_requests_do_no_harm(port: int, front: dict[str, psutil.Process]) -> None:
    report = http_fuzz.fuzz(port, 500, FUZZ_SEED, front)
    print(report)
    assert not report.failures, str(report)
    assert sum(report.statuses.values()) == 500 * len(KINDS) and report.slowest_s < http_fuzz.HANG_S
    assert all(most - before < FUZZ_MIB for before, most, _ in report.memory.values()), str(report)
    assert soon(lambda: total(port)["unfinished"] == 0)


# Last, as these end processes


def test_a_lost_ingress_is_503_in_openais_shape_and_another_one_comes(
    verbs: Verbs, port: int, front: dict[str, psutil.Process]
) -> None:
    """It was 500 in plain text."""
    with ThreadPoolExecutor(4) as pool:
        lost = [pool.submit(ask, port, head("GET", f"/imagine?prompt=a&{LONG}"), 60) for _ in range(4)]
        assert soon(lambda: total(port)["unfinished"] == len(lost))
        os.kill(front["ingress"].pid, signal.SIGKILL)
        refused = [request.result() for request in lost]
    for answer in refused:
        assert (answer.status, answer.error["code"]) == (503, "replica_lost")
        assert int(answer.headers["retry-after"]) >= 1 and answer.headers["x-request-id"]
    assert soon(lambda: fetch(f"http://127.0.0.1:{port}/healthz")[0] == 200)
