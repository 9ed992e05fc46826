"""app/api/auth.py in front of the routes: which requests it accepts, and how long each counts against its key."""

import asyncio
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import openai
import pytest
from openai import OpenAI
from starlette.testclient import TestClient
from starlette.types import Message

from app.api.auth import over_loopback
from app.api.ingress import APIIngress
from app.api.messages import Accepted, Preview
from tests.api.test_api_keys import entry, write
from tests.api.test_ingress import FAILURES, SERVICE, Replicas, local_client, post, raw_post
from tests.api.test_sse import PATIENT, serving
from tests.clusters import soon

KEY = "imagine-key-of-alice"
BEARER = {"Authorization": f"Bearer {KEY}"}
PROMPT = "a red house that nobody else may read of"
KEYED = [  # with the status for a valid key
    *(("GET", "/imagine?prompt=a", 200), ("GET", "/v1/models", 200), ("GET", "/v1/stats", 200)),
    *(("POST", "/v1/images/generations", 415), ("DELETE", "/imagine", 405), ("GET", "/nowhere", 404)),
    ("GET", "/healthz/", 404),
]
OPEN = [("GET", "/"), ("GET", "/healthz")]


@pytest.fixture
def replicas() -> Replicas:
    return Replicas()


@pytest.fixture(autouse=True)
def no_stats(monkeypatch: pytest.MonkeyPatch) -> None:
    async def none(replicas: Any, timeout_s: float) -> dict[str, Any]:
        return {}

    monkeypatch.setattr("app.api.ingress.stats_of_all", none)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "keys.yaml", entry("alice", KEY))


@pytest.fixture
def ingress(replicas: Replicas, file: Path) -> APIIngress:
    return APIIngress(replicas, SERVICE, file)


@pytest.fixture
def client(ingress: APIIngress) -> Iterator[TestClient]:
    with local_client(ingress) as client:
        yield client


def running(ingress: APIIngress) -> int:
    assert ingress.api_keys
    (alice,) = ingress.api_keys.keys
    return alice.running


# Without keys: this machine


LOCAL, V6, MAPPED, NETWORK = ("127.0.0.1", 8000), ("::1", 8000), ("::ffff:127.0.0.1", 8000), ("10.0.0.7", 8000)


@pytest.mark.parametrize(
    ("server", "client", "local"),
    [
        (LOCAL, LOCAL, True),
        (V6, V6, True),
        (MAPPED, MAPPED, True),
        (("127.8.9.1", 1), LOCAL, True),
        (NETWORK, LOCAL, False),  # a client can make itself look like this where all proxies are trusted
        (LOCAL, NETWORK, False),  # by way of a proxy on this machine
        (NETWORK, NETWORK, False),
        (("::ffff:10.0.0.7", 80), LOCAL, False),
        (("fe80::1%eth0", 80), LOCAL, False),
        (("localhost", 80), LOCAL, False),  # no socket has this address
        (("/run/api.sock", None), LOCAL, False),
        (LOCAL, None, False),
        (None, LOCAL, False),
    ],
)
def test_only_a_connection_with_both_ends_on_loopback_is_local(server: Any, client: Any, local: bool) -> None:
    assert over_loopback({"type": "http", "server": server, "client": client}) is local


@pytest.mark.parametrize(("method", "path"), [*(case[:2] for case in KEYED), *OPEN])
def test_without_keys_clients_on_other_machines_get_403_and_the_setting_to_change(
    replicas: Replicas, method: str, path: str
) -> None:
    app = APIIngress(replicas, SERVICE).__serve_build_asgi_app__()
    with TestClient(app, "http://10.0.0.7:8000", client=("10.0.0.9", 50000)) as client:
        response = client.request(method, path, headers=BEARER)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (403, "loopback_only")
    assert "args.api_keys_file" in error["message"]
    assert not replicas.generate.calls and not replicas.describe.calls


def test_no_header_makes_a_client_local_or_hides_a_proxy(replicas: Replicas) -> None:
    with serving(APIIngress(replicas, SERVICE)) as address:
        assert status(f"{address}/healthz") == 200
        assert status(f"{address}/healthz", {"X-Forwarded-For": "127.0.0.1"}) == 200
        assert status(f"{address}/healthz", {"X-Forwarded-For": "10.0.0.9"}) == 403
        assert status(f"{address}/healthz", {"X-Forwarded-For": "127.0.0.1, 10.0.0.9"}) == 403
        assert status(f"{address}/healthz", {"X-Forwarded-For": "10.0.0.9, 127.0.0.1"}) == 403
        assert status(f"{address}/healthz", {"X-Real-IP": "10.0.0.9"}) == 403, "nginx's usual name for it"
        assert status(f"{address}/healthz", {"Forwarded": "for=10.0.0.9"}) == 403


def status(url: str, headers: dict[str, str] | None = None) -> int:
    try:
        with urlopen(Request(url, headers=headers or {}), timeout=30) as answer:
            return int(answer.status)
    except HTTPError as error:
        return error.code


PAGES = [  # shared/cases R04, and the others of its kind
    {"Host": "evil.example:8000", "Origin": "http://evil.example:8000"},
    {"Host": "evil.example:8000"},
    {"Host": "localhost.evil.example"},
    {"Host": "evil.example#localhost"},
    {"Host": "localhost@evil.example"},
    {"Host": "evil.example\\@localhost"},
    {"Host": "10.0.0.7:8000"},
    {"Host": "0.0.0.0:8000"},
    {"Host": "[::]:8000"},
    {"Host": "[fe80::1]"},
    {"Host": ""},
    {"Origin": "https://evil.example"},
    {"Origin": "http://127.0.0.1.evil.example"},
    {"Origin": "http://evil.example/http://localhost"},
    {"Origin": "null"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Sec-Fetch-Site": "CROSS-SITE"},
]
PROGRAMS = [
    {},
    {"Host": "127.0.0.1:8000"},
    {"Host": "127.8.9.1"},
    {"Host": "LOCALHOST:9000"},
    {"Host": "localhost."},
    {"Host": "imagine.localhost:8000"},
    {"Host": "[::1]:8000"},
    {"Host": "[::ffff:127.0.0.1]:8000"},
    {"Origin": "http://localhost:3000"},
    {"Origin": "https://[::1]"},
    {"Sec-Fetch-Site": "none"},
    {"Sec-Fetch-Site": "same-origin", "Origin": "http://127.0.0.1:8000"},
]


@pytest.mark.parametrize("headers", PAGES, ids=str)
@pytest.mark.parametrize(("method", "path"), [*(case[:2] for case in KEYED), *OPEN])
def test_without_keys_a_foreign_page_in_a_local_browser_gets_403(
    replicas: Replicas, method: str, path: str, headers: dict[str, str]
) -> None:
    with local_client(APIIngress(replicas, SERVICE)) as client:
        response = client.request(method, path, headers=headers)
    error = response.json()["error"]
    assert response.status_code == 403 and error["code"] in ("loopback_only", "cross_site")
    assert error["message"].startswith("This API has no keys")
    assert not replicas.generate.calls and not replicas.describe.calls


STUDIO = {"Origin": "https://studio.example.com", "Sec-Fetch-Site": "cross-site"}
PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}


@pytest.mark.parametrize("keyed", [False, True])
def test_pages_of_a_declared_origin_may_ask_and_read_the_answer(replicas: Replicas, file: Path, keyed: bool) -> None:
    ingress = APIIngress(replicas, SERVICE, file if keyed else None, [STUDIO["Origin"]])
    with local_client(ingress) as client:
        preflight = client.options("/v1/images/generations", headers=STUDIO | PREFLIGHT)
        assert preflight.status_code == 200 and "POST" in preflight.headers["access-control-allow-methods"]
        answer = client.get("/imagine?prompt=a", headers=STUDIO | (BEARER if keyed else {}))
        assert answer.status_code == 200 and "X-Seed" in answer.headers["access-control-expose-headers"]
        assert answer.headers["access-control-allow-origin"] == STUDIO["Origin"]
        assert not keyed or client.get("/imagine?prompt=a", headers=STUDIO).status_code == 401
        foreign = STUDIO | {"Origin": "https://studio.example.com.evil.example"}
        for response in (client.options("/imagine", headers=foreign | PREFLIGHT), client.get("/", headers=foreign)):
            assert "access-control-allow-origin" not in response.headers
            assert keyed or response.status_code == 403
        assert keyed or client.get("/", headers=STUDIO | {"Host": "evil.example"}).status_code == 403


@pytest.mark.parametrize("headers", PROGRAMS, ids=str)
def test_without_keys_programs_and_pages_of_this_machine_get_answers(
    replicas: Replicas, headers: dict[str, str]
) -> None:
    with local_client(APIIngress(replicas, SERVICE)) as client:
        assert client.get("/imagine?prompt=a", headers=headers).status_code == 200


@pytest.mark.parametrize("headers", PAGES, ids=str)
def test_with_keys_the_key_decides_wherever_the_client_is(ingress: APIIngress, headers: dict[str, str]) -> None:
    with local_client(ingress) as client:
        assert client.get("/imagine?prompt=a", headers=headers | BEARER).status_code == 200
        assert client.get("/imagine?prompt=a", headers=headers).status_code == 401


def test_haproxy_requires_keys(replicas: Replicas, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's HAProxy listens on every interface, whatever http_options.host says, and connects over loopback."""
    monkeypatch.setattr("app.api.ingress.RAY_SERVE_ENABLE_HA_PROXY", True)
    with pytest.raises(ValueError, match="api_keys_file must be set where RAY_SERVE_ENABLE_HA_PROXY is"):
        APIIngress(replicas, SERVICE)
    APIIngress(replicas, SERVICE, file)


# With keys


WRONG: list[list[tuple[str, str]]] = [
    [],
    [("Authorization", "")],
    [("Authorization", "Bearer")],
    [("Authorization", "Bearer ")],
    [("Authorization", f"Bearer {KEY}x")],
    [("Authorization", f"Bearer {KEY[:-1]}")],
    [("Authorization", f"Basic {KEY}")],
    [("Authorization", KEY)],
    [("Authorization", f"Bearer {KEY}"), ("Authorization", "Bearer other")],
    [("X-Api-Key", KEY)],
    [("Cookie", f"key={KEY}")],
]


@pytest.mark.parametrize(("method", "path", "status"), KEYED)
def test_every_route_but_the_open_ones_needs_a_key(
    client: TestClient, replicas: Replicas, method: str, path: str, status: int
) -> None:
    for headers in WRONG:
        response = client.request(method, path, headers=headers)
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (401, "invalid_api_key"), headers
        assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
        assert response.headers["www-authenticate"] == "Bearer" and KEY not in response.text
    assert not replicas.generate.calls and not replicas.describe.calls
    assert client.request(method, path, headers=BEARER).status_code == status


def test_a_key_in_the_url_does_not_count(client: TestClient) -> None:
    for name in ("key", "api_key", "access_token", "Authorization"):
        assert client.get("/imagine", params={"prompt": "a", name: KEY}).status_code == 401


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER ", " Bearer"])
def test_the_bearer_scheme_ignores_case_and_spaces(client: TestClient, scheme: str) -> None:
    assert client.get("/imagine?prompt=a", headers={"Authorization": f"{scheme} {KEY}"}).status_code == 200


@pytest.mark.parametrize(("method", "path"), OPEN)
def test_load_balancers_need_no_key(client: TestClient, method: str, path: str) -> None:
    assert client.request(method, path).status_code == 200


def test_with_keys_a_client_on_another_machine_is_accepted(ingress: APIIngress) -> None:
    app = ingress.__serve_build_asgi_app__()
    with TestClient(app, "http://10.0.0.7:8000", client=("10.0.0.9", 50000)) as client:
        assert client.get("/imagine?prompt=a", headers=BEARER).status_code == 200
        assert client.get("/imagine?prompt=a").status_code == 401
        assert client.get("/healthz").status_code == 200


def test_a_bad_key_is_refused_before_the_body_is_read(ingress: APIIngress) -> None:
    async def receive() -> Message:
        raise AssertionError("the body was read")

    status, answer = asyncio.run(raw_post(receive, {"authorization": "Bearer x"}, ingress))
    assert (status, answer["error"]["code"]) == (401, "invalid_api_key")


def test_a_key_at_its_limit_is_refused_before_the_body_is_read(replicas: Replicas, file: Path) -> None:
    async def receive() -> Message:
        raise AssertionError("the body was read")

    ingress = APIIngress(replicas, SERVICE, write(file, entry("alice", KEY, requests_per_minute=1)))
    with local_client(ingress) as client:
        assert client.get("/v1/models", headers=BEARER).status_code == 200
    status, answer = asyncio.run(raw_post(receive, {"authorization": f"Bearer {KEY}"}, ingress))
    assert (status, answer["error"]["code"]) == (429, "rate_limit_exceeded")


def test_a_key_is_revoked_without_a_restart(client: TestClient, ingress: APIIngress, file: Path) -> None:
    assert client.get("/v1/models", headers=BEARER).status_code == 200
    write(file)
    assert ingress.api_keys
    ingress.api_keys.refresh()
    assert client.get("/v1/models", headers=BEARER).status_code == 401


def test_an_unusable_keys_file_stops_the_start(replicas: Replicas, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere.yaml cannot be read"):
        APIIngress(replicas, SERVICE, tmp_path / "nowhere.yaml")


# Limits


def test_the_rate_limit_is_429_with_retry_after_and_counts_images(replicas: Replicas, file: Path) -> None:
    ingress = APIIngress(replicas, SERVICE, write(file, entry("alice", KEY, requests_per_minute=4)))
    with local_client(ingress) as client:
        client.headers.update(BEARER)
        assert [post(client, prompt="a", n=3).status_code, post(client, prompt="a").status_code] == [200, 200]
        response = post(client, prompt="a")
        assert (response.status_code, response.headers["retry-after"]) == (429, "15")
        error = response.json()["error"]
        assert error["code"] == "rate_limit_exceeded" and error["message"].startswith("This key allows 4 a minute")
        assert client.get("/healthz").status_code == 200
    assert running(ingress) == 0


def test_concurrent_requests_are_limited_until_one_ends(replicas: Replicas, file: Path) -> None:
    ingress = APIIngress(replicas, PATIENT, write(file, entry("alice", KEY, concurrent_requests=1)))
    replicas.generate_stream.outcome = lambda _: [Accepted(), Preview(0, b"preview"), None]
    with serving(ingress) as address, OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as client:
        stream = client.images.generate(prompt="a", stream=True, partial_images=1)
        assert next(stream).type == "image_generation.partial_image"
        assert running(ingress) == 1, "the answer has begun, and has not ended"
        with pytest.raises(openai.RateLimitError) as caught:
            client.images.generate(prompt="a")
        assert caught.value.code == "rate_limit_exceeded" and caught.value.response.headers["retry-after"] == "1"
        stream.close()  # the client goes away
        assert soon(lambda: running(ingress) == 0)
        assert client.images.generate(prompt="a").data
        with pytest.raises(openai.AuthenticationError) as refused:
            client.with_options(api_key="other").images.generate(prompt="a")
        assert refused.value.code == "invalid_api_key"


@pytest.mark.parametrize("outcome", [case[0] for case in FAILURES], ids=[str(case[2:]) for case in FAILURES])
def test_a_request_stops_counting_however_it_ends(
    client: TestClient, ingress: APIIngress, replicas: Replicas, outcome: Any
) -> None:
    replicas.generate.outcome = lambda *_: outcome
    replicas.generate_stream.outcome = lambda _: [Accepted(), outcome]
    client.headers.update(BEARER)
    statuses = [
        client.get("/imagine?prompt=a").status_code,
        post(client, prompt="a").status_code,
        post(client, prompt="").status_code,
        post(client, prompt="a", stream=True).status_code,
        client.get("/nowhere").status_code,
    ]
    assert 400 in statuses and 404 in statuses and running(ingress) == 0


def test_a_client_that_disconnects_while_it_waits_stops_counting(ingress: APIIngress, replicas: Replicas) -> None:
    async def leave() -> None:
        called = asyncio.Event()
        replicas.generate.outcome = lambda *_: called.set()

        async def receive() -> Message:
            return {"type": "http.request", "body": b'{"prompt": "a"}', "more_body": False}

        asking = asyncio.ensure_future(raw_post(receive, {"authorization": f"Bearer {KEY}"}, ingress))
        await called.wait()
        assert running(ingress) == 1
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking

    asyncio.run(leave())
    assert running(ingress) == 0 and replicas.generate.answers[0].cancelled


# Logs


def test_neither_keys_nor_prompts_reach_the_log(
    client: TestClient, ingress: APIIngress, replicas: Replicas, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "ray.serve")
    caplog.set_level(logging.DEBUG, "app")
    for outcome in [case[0] for case in FAILURES]:
        replicas.generate.outcome = lambda *_, outcome=outcome: outcome
        for headers in (BEARER, {"Authorization": f"Bearer {KEY}x"}):
            client.get("/imagine", params={"prompt": PROMPT}, headers=headers)
            client.post("/v1/images/generations", json={"prompt": PROMPT, "size": PROMPT}, headers=headers)
    file.write_text(f"- {{name: alice, sha256: {KEY}}}\n")
    assert ingress.api_keys
    ingress.api_keys.refresh()
    client.get("/imagine", params={"prompt": PROMPT}, headers=BEARER)
    log = "\n".join(json.dumps([record.getMessage(), record.exc_text]) for record in caplog.records)
    assert (
        "entry 1 (alice)" in log and KEY not in log and PROMPT[:12] not in log and PROMPT.replace(" ", "+") not in log
    )
