"""The fuzzer reports wrong answers, and can send the same bytes again."""

import asyncio
import json
from collections import deque
from collections.abc import Iterator
from dataclasses import replace

import psutil
import pytest
from starlette.types import Receive, Scope, Send

from app.api.ingress import APIIngress
from app.types import Capabilities
from tests import http_fuzz
from tests.api.test_ingress import DESCRIPTION, SERVICE, Replicas
from tests.api.test_proxy import Application, guarded, say
from tests.api.test_sse import serving
from tests.fuzz_cases import KINDS, Case

ERROR = json.dumps({"error": {"message": "no", "type": "server_error", "param": None, "code": "CODE"}})


@pytest.fixture
def application() -> Application:
    return Application()


@pytest.fixture
def port(application: Application) -> Iterator[int]:
    with guarded(application) as port:
        yield port


def test_a_seed_and_a_number_make_the_same_bytes() -> None:
    for kind in KINDS:
        made = [Case(kind, 3, number).request for number in range(50)]
        assert made == [Case(kind, 3, number).request for number in range(50)] and len(set(made)) > 30
        assert made != [Case(kind, 4, number).request for number in range(50)]


def test_a_correct_server_passes(application: Application, port: int) -> None:
    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        drawn = scope["path"] == "/imagine" and scope["query_string"] == http_fuzz.PICTURE.partition("?")[2].encode()
        body = ERROR.replace("CODE", "queue_full").encode()
        await say(
            send, 200 if drawn else 503, b"picture" if drawn else body, "application/json", (b"retry-after", b"1")
        )

    application.answer = refuse
    report = http_fuzz.fuzz(port, 10, 0, {})
    assert not report.failures and sum(report.statuses.values()) == 10 * len(KINDS)


@pytest.mark.parametrize(
    ("status", "body", "problem"),
    [
        (500, ERROR, "status 500"),
        (502, ERROR, "status 502"),
        (503, ERROR, "status 503"),
        (404, "Path not found", "not in OpenAI's shape"),
        (400, ERROR.replace("no", "Traceback (most recent call last)"), "'Traceback'"),
        (200, '{"file": "site-packages/ray/serve"}', "'site-packages'"),
    ],
)
def test_a_wrong_answer_is_reported_with_the_request(
    application: Application, port: int, status: int, body: str, problem: str
) -> None:
    async def wrong(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["query_string"] == http_fuzz.PICTURE.partition("?")[2].encode():
            await say(send, 200, b"picture", "image/png")
        else:
            await say(send, status, body.encode(), "application/json")

    application.answer = wrong
    report = str(http_fuzz.fuzz(port, 5, 0, {}))
    assert problem in report and "sent b'" in report and ":0:" in report


def test_a_hang_and_a_different_image_are_reported(
    application: Application, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_fuzz, "HANG_S", 0.5)
    drawn = iter([b"one picture", b"another one"])

    async def hang(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["query_string"] == http_fuzz.PICTURE.partition("?")[2].encode():
            await say(send, 200, next(drawn), "image/png")
        else:
            await asyncio.sleep(3)

    application.answer = hang
    report = str(http_fuzz.fuzz(port, 3, 0, {}))
    assert "no end after" in report and "drew another picture" in report


def test_no_upload_fails_the_routes_or_stays_in_memory() -> None:
    """The real routes before fake replicas; `make fuzz KIND=uploads COUNT=10000` is the long run, with a real one."""
    replicas = Replicas()
    replicas.running = [replace(DESCRIPTION, capabilities=Capabilities(edits=True, masks=True))]
    replicas.generate.calls = deque(maxlen=1)  # which would keep all images
    limits = SERVICE.limits.model_copy(update={"timeout_s": 30.0, "upload_bytes": 8 << 20, "body_bytes": 1 << 17})
    with serving(APIIngress(replicas, replace(SERVICE, limits=limits))) as address:
        port = int(address.rpartition(":")[2])
        http_fuzz.fuzz(port, 40, 1, {}, ["uploads"])  # what is loaded on first use, stays
        report = http_fuzz.fuzz(port, 160, 0, {"routes": psutil.Process()}, ["uploads"])
    assert not report.failures, str(report)
    taken = sum(count for (_, status), count in report.statuses.items() if status == "200")
    refused = sum(count for (_, status), count in report.statuses.items() if status == "400")
    assert taken > 15 and refused > 80, str(report)
    before, _, after = report.memory["routes"]
    assert after - before < 64, str(report)
