"""Images are fetched from allowed hosts alone, within limits, and from public addresses."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from app.api import public_addresses
from app.api.images_in import fetch
from app.api.images_in.fetch import check_url, fetch_image
from app.types import InvalidField

HOST = "images.example.com"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def fetched(monkeypatch: pytest.MonkeyPatch, handler: Handler, *, path: str = "/a.png", public: bool = True) -> bytes:
    """What a server on this machine, which the resolver takes for the host, answers."""

    async def run() -> bytes:
        async def loopback(host: str, port: int, **options: object) -> list[Any]:
            return [(socket.AF_INET, 0, 6, "", ("127.0.0.1", port))]

        app = web.Application()
        app.router.add_get("/{path:.*}", handler)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", loopback)
        if public:
            monkeypatch.setattr(public_addresses, "checked", str)
        try:
            return await fetch_image("images", f"http://{HOST}:{port}{path}", [f"{HOST}:{port}"], 1000)
        finally:
            await runner.cleanup()

    return asyncio.run(run())


def test_an_image_of_an_allowed_host_is_fetched_and_redirects_within_it_are_followed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def answer(request: web.Request) -> web.Response:
        if request.path == "/a.png":
            return web.Response(status=302, headers={"Location": "/b.png"})
        assert request.headers["Accept-Encoding"] == "identity" and request.path == "/b.png"
        return web.Response(body=b"image")

    assert fetched(monkeypatch, answer) == b"image"


def test_what_goes_beyond_the_limits_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "FETCH_S", 0.3)

    async def slow(request: web.Request) -> web.Response:
        await asyncio.Event().wait()
        raise AssertionError

    async def large(request: web.Request) -> web.Response:
        return web.Response(body=bytes(1001))

    async def packed(request: web.Request) -> web.Response:
        return web.Response(body=b"x", headers={"Content-Encoding": "gzip"})

    async def missing(request: web.Request) -> web.Response:
        return web.Response(status=404)

    async def around(request: web.Request) -> web.Response:
        return web.Response(status=307, headers={"Location": "/again"})

    async def away(request: web.Request) -> web.Response:
        return web.Response(status=302, headers={"Location": "http://169.254.169.254/computeMetadata/v1/"})

    cases: dict[str, Handler] = {
        **{"took over 0.3 s": slow, "over 1000 bytes": large, "answered 200": packed, "answered 404": missing},
        **{"redirects over 3 times": around, "a URL at images.example.com": away},
    }
    for problem, handler in cases.items():
        with pytest.raises(InvalidField, match=problem) as refusal:
            fetched(monkeypatch, handler)
        assert refusal.value.field == "images"


def test_no_private_address_is_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    requested: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        requested.append(request.path)
        return web.Response(body=b"secret")

    with pytest.raises(InvalidField, match="not over a public address"):
        fetched(monkeypatch, answer, public=False)
    assert not requested


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost/",
        f"ftp://{HOST}/a",
        f"http://user@{HOST}/",
        f"http://{HOST}@evil.example/",
        f"http://{HOST}.evil.example/",
        f"http://{HOST}:8080/",
        f"http://evil.example/{HOST}",
        f"http://{HOST}\\@evil.example/",
        f"http://{HOST}/ a",
        f"http://{HOST}/" + "a" * 3000,
    ],
)
def test_a_url_of_another_host_is_refused(url: str) -> None:
    with pytest.raises(InvalidField, match=f"images must be a data: URL or a URL at {HOST}"):
        check_url("images", url, [HOST])


def test_without_allowed_hosts_nothing_is_fetched() -> None:
    with pytest.raises(InvalidField, match="this server fetches no image"):
        check_url("images", f"http://{HOST}/", [])
    for url in (f"http://{HOST}", f"https://{HOST}/a/b.png?c=d", f"https://{HOST}?a"):
        check_url("images", url, ["other.example.com", HOST])
