"""Webhooks: what is signed, when it is tried again, and what this server never connects to."""

import asyncio
import base64
import hashlib
import hmac
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from app.api import public_addresses
from app.api.database import Database
from app.api.files.table import SCHEMA as FILES
from app.api.jobs import webhooks
from app.api.jobs.leases import claim, fail
from app.api.jobs.table import SCHEMA, NewJob, add_job
from app.api.jobs.webhooks import BACK_OFF_S, Webhooks, post_to_public, read_secret
from app.api.protocol import parse_body
from app.api.public_addresses import checked
from app.api.settings import Jobs, Service
from app.types import InvalidField

SECRET = bytes(range(32))
URL = "https://hooks.example.com/a?b=c"


class Receiver:
    """In place of the network: answers with the statuses in turn, the last again and again."""

    def __init__(self, *statuses: int | Exception) -> None:
        self.statuses = [*statuses]
        self.got: list[tuple[str, bytes, dict[str, str]]] = []

    async def post(self, url: str, body: bytes, headers: dict[str, str]) -> int:
        self.got.append((url, body, headers))
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        if isinstance(status, Exception):
            raise status
        return status


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


async def ended_job(database: Database, clock: Clock) -> None:
    new = NewJob("", "tiny", "{}", 1, 1.0, clock(), clock() + 1e6, webhook_url=URL)
    await database.write(add_job, "job_a", new)
    job = await database.write(claim, "worker", ("tiny",), clock(), clock() + 9)
    assert job
    held = await database.write(fail, job, "worker", "{}", clock(), clock() + 1e6)
    assert held


def delivered(path: Path, receiver: Receiver, act: Callable[[Webhooks, Clock], Any]) -> None:
    async def run() -> None:
        clock, database = Clock(), Database(path / "jobs.sqlite3", (*SCHEMA, *FILES))
        await ended_job(database, clock)
        await act(Webhooks(database, SECRET, receiver.post, clock), clock)
        database.close()

    asyncio.run(run())


def test_a_delivery_is_signed_as_standard_webhooks_has_it(tmp_path: Path) -> None:
    receiver = Receiver(200)

    async def act(hooks: Webhooks, clock: Clock) -> None:
        assert await hooks.deliver_next()
        assert not await hooks.deliver_next(), "once"

    delivered(tmp_path, receiver, act)
    ((url, body, headers),) = receiver.got
    assert url == URL and headers["webhook-id"] == "job_a" and headers["webhook-timestamp"] == "1000000"
    signed = hmac.new(SECRET, b"job_a.1000000." + body, hashlib.sha256).digest()
    assert headers["webhook-signature"] == f"v1,{base64.b64encode(signed).decode()}"
    assert json.loads(body) == {
        "type": "job.failed",
        "timestamp": "1970-01-12T13:46:40Z",
        "data": {"id": "job_a", "object": "job", "status": "failed"},
    }


def test_a_failed_delivery_is_repeated_under_the_same_id_with_longer_and_longer_waits(tmp_path: Path) -> None:
    receiver = Receiver(500, TimeoutError(), OSError("refused"), 302, 500, 500, 500)
    waits: list[float] = []

    async def act(hooks: Webhooks, clock: Clock) -> None:
        began = clock.now
        while clock.now - began < 1e5:
            if await hooks.deliver_next():
                waits.append(clock.now - began)
            clock.now += 1.0 if clock.now - began < 400 else 60.0

    delivered(tmp_path, receiver, act)
    assert len(receiver.got) == 1 + len(BACK_OFF_S) and {headers["webhook-id"] for _, _, headers in receiver.got} == {
        "job_a"
    }
    gaps = [later - earlier for earlier, later in zip(waits, waits[1:], strict=False)]
    for gap, expected in zip(gaps, BACK_OFF_S, strict=True):
        assert expected <= gap <= 1.2 * expected + 60
    assert len({headers["webhook-timestamp"] for _, _, headers in receiver.got}) == len(receiver.got)


def test_410_ends_the_deliveries(tmp_path: Path) -> None:
    receiver = Receiver(410)

    async def act(hooks: Webhooks, clock: Clock) -> None:
        assert await hooks.deliver_next()
        clock.now += 1e5
        assert not await hooks.deliver_next()

    delivered(tmp_path, receiver, act)


def test_a_delivery_whose_process_died_is_made_by_the_next(tmp_path: Path) -> None:
    receiver = Receiver(200)

    async def act(hooks: Webhooks, clock: Clock) -> None:
        assert await hooks.database.write(webhooks.claim_delivery, clock()), "and dies"
        assert not await hooks.deliver_next()
        clock.now += webhooks.DUE_AGAIN_S
        assert await hooks.deliver_next() and not await hooks.deliver_next()

    delivered(tmp_path, receiver, act)


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.0.0.1", "192.168.1.1", "172.16.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1"]
    + [
        "::1",
        "fe80::1%eth0",
        "fd00::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "::",
        "64:ff9b:1::1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
    ],
)
def test_no_webhook_goes_to_an_address_that_is_not_public(address: str) -> None:
    with pytest.raises(OSError, match="is not a public address"):
        checked(address)


def test_a_public_address_passes() -> None:
    assert checked("93.184.216.34") == "93.184.216.34" and checked("2606:4700::1111")


def test_a_host_with_one_private_address_is_refused_before_anything_is_connected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def run() -> None:
        async def two(host: str, port: int, **options: object) -> list[Any]:
            return [(socket.AF_INET, 0, 6, "", (address, port)) for address in ("93.184.216.34", "10.0.0.1")]

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", two)
        with pytest.raises((aiohttp.ClientError, OSError), match="10.0.0.1 is not a public address"):
            await post_to_public(URL, b"", {})

    asyncio.run(run())


def test_the_address_that_was_checked_is_connected_to_and_redirects_are_not_followed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A name server that changes its mind is asked once."""
    resolved: list[str] = []

    async def run() -> None:
        async def respond(request: web.Request) -> web.Response:
            assert await request.read() == b"{}" and request.headers["Host"].startswith("hooks.example.com")
            return web.Response(status=302, headers={"Location": "http://127.0.0.1/inside"})

        async def loopback(host: str, port: int, **options: object) -> list[Any]:
            resolved.append(host)
            return [(socket.AF_INET, 0, 6, "", ("127.0.0.1", port))]

        app = web.Application()
        app.router.add_post("/", respond)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", loopback)
        monkeypatch.setattr(public_addresses, "checked", str)
        try:
            assert await post_to_public(f"http://hooks.example.com:{port}/", b"{}", {}) == 302
        finally:
            await runner.cleanup()

    asyncio.run(run())
    assert resolved == ["hooks.example.com"]


SERVICE = Service(
    "tiny",
    ("128x128",),
    jobs=Jobs(webhook_hosts=("hooks.example.com", "a.example:8443"), webhook_secret_file="secret"),
)


def parsed(url: object) -> Any:
    return parse_body(json.dumps({"prompt": "a", "async": True, "webhook_url": url}).encode(), SERVICE).webhook_url


@pytest.mark.parametrize(
    "url", [URL, "https://hooks.example.com", "https://hooks.example.com:443/", "https://a.example:8443/x"]
)
def test_a_webhook_may_go_to_a_host_of_the_config(url: str) -> None:
    assert parsed(url) == url


@pytest.mark.parametrize(
    "url",
    [
        "http://hooks.example.com/",
        "https://hooks.example.com.evil.example/",
        "https://evil.example/https://hooks.example.com/",
        "https://user@hooks.example.com/",
        "https://hooks.example.com@evil.example/",
        "https://hooks.example.com\\@evil.example/",
        "https://hooks.example.com:8443/",
        "https://a.example/",
        "https://hooks.example.com/\n",
        "https://hooks.example.com/\u00e9",
        "https://hooks.example.com/" + 2000 * "a",
        "https://hooksXexample.com/",
        "https://127.0.0.1/",
        "",
        7,
    ],
)
def test_a_webhook_to_anything_else_is_refused(url: object) -> None:
    with pytest.raises(
        InvalidField, match=r"^webhook_url must be an https URL at hooks\.example\.com or a\.example:8443, "
    ):
        parsed(url)


@pytest.mark.parametrize(
    "host", ["Hooks.example.com", "10.0.0.1", "localhost", "*.example.com", "https://a.example", "[::1]"]
)
def test_the_config_allows_names_of_hosts_only(host: str) -> None:
    with pytest.raises(ValueError, match="a host must be a name in lower case"):
        Jobs(webhook_hosts=(host,), webhook_secret_file="secret")


def test_hosts_without_a_secret_are_refused() -> None:
    with pytest.raises(ValueError, match="webhook_hosts needs a webhook_secret_file"):
        Jobs(webhook_hosts=("hooks.example.com",))


@pytest.mark.parametrize(
    "content", ["", "whsec_", "whsec_c2hvcnQ=", f"{base64.b64encode(SECRET).decode()}", "whsec_!!!", "\u00e9"]
)
def test_an_unusable_secret_is_named_by_its_file_and_never_quoted(tmp_path: Path, content: str) -> None:
    file = tmp_path / "secret"
    file.write_text(content, "utf-8")
    file.chmod(0o600)
    with pytest.raises(ValueError, match=r"/secret must hold whsec_ and 24 to 64 random bytes in base64") as raised:
        read_secret(file)
    assert not content or content not in str(raised.value).replace("whsec_ and", "")


def test_a_secret_that_others_can_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text(f"whsec_{base64.b64encode(SECRET).decode()}\n")
    file.chmod(0o600)
    assert read_secret(file) == SECRET
    file.chmod(0o640)
    with pytest.raises(ValueError, match="must be readable by its owner alone: chmod 600"):
        read_secret(file)
    with pytest.raises(ValueError, match="cannot be read: No such file or directory"):
        read_secret(tmp_path / "another")
