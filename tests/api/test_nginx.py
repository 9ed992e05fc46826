"""A real nginx (Debian's package) runs configs/nginx.conf in front of the real routes with keys; skipped without nginx.

The test replaces only the file's ports, its user, its paths and a few of its timeouts.
"""

import contextlib
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from app.api.ingress import APIIngress
from app.api.messages import Accepted, Preview
from app.api.settings import Limits
from cluster import ROOT
from tests.api.test_api_keys import entry, write
from tests.api.test_ingress import SERVICE, Replicas, stream_of
from tests.api.test_sse import serving
from tests.clusters import ports, soon
from tests.raw_http import RawAnswer, answers, closed, connected, head, received

NGINX = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/opt/homebrew/bin")
OPENSSL = shutil.which("openssl")
pytestmark = pytest.mark.skipif(not (NGINX and OPENSSL), reason="needs nginx and openssl, such as Debian's packages")

CONFIG = ROOT / "configs" / "nginx.conf"
KEY = "imagine-key-of-alice"
BEARER = f"Authorization: Bearer {KEY}"
PATIENT = replace(SERVICE, limits=Limits(timeout_s=30))


@pytest.fixture
def replicas() -> Replicas:
    return Replicas()


class Nginx:
    def __init__(self, folder: Path, api: str, **changes: str) -> None:
        self.port, self.plain_port = ports(2)
        self.certificate = folder / "fullchain.pem"
        self.log = folder / "access.log"
        make = [str(OPENSSL), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-days", "2"]
        files = ["-keyout", str(folder / "privkey.pem"), "-out", str(self.certificate)]
        subprocess.run([*make, *names, *files], check=True, capture_output=True)
        replaced = {
            "user www-data;": "",
            "listen 80 default": f"listen 127.0.0.1:{self.plain_port} default",
            "listen 443 ssl": f"listen {self.port} ssl",
            "server 127.0.0.1:8000;": f"server {api.removeprefix('http://')};",
            "/etc/nginx/tls": str(folder),
            "/run/nginx.pid": str(folder / "nginx.pid"),
            "/var/log/nginx": str(folder),
            "worker_processes auto;": "worker_processes 1;",
            **changes,
        }
        text = CONFIG.read_text()
        for old, new in replaced.items():
            assert old in text, f"configs/nginx.conf has no {old!r}"
            text = text.replace(old, new)
        if sys.platform != "darwin" and not text.startswith("user"):
            for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"):
                text = text.replace("http {", f"http {{\n    {kind}_temp_path {folder / kind};", 1)
        self.file = folder / "nginx.conf"
        self.file.write_text(text)

    @contextlib.contextmanager
    def running(self) -> Iterator["Nginx"]:
        command = [str(NGINX), "-p", str(self.file.parent), "-c", str(self.file), "-e", "stderr", "-g", "daemon off;"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            up = soon(lambda: process.poll() is not None or listens(self.port), 20)
            assert up and process.poll() is None, process.stderr.read() if process.stderr else ""
            yield self
        finally:
            process.terminate()
            process.communicate(timeout=60)

    @contextlib.contextmanager
    def connected(self, host: str = "127.0.0.1") -> Iterator[socket.socket]:
        context = ssl.create_default_context(cafile=str(self.certificate))
        context.check_hostname = False
        with socket.create_connection((host, self.port), timeout=30) as plain:
            with context.wrap_socket(plain, suppress_ragged_eofs=True) as connection:
                yield connection

    def ask(self, request: bytes, host: str = "127.0.0.1") -> RawAnswer:
        with self.connected(host) as connection:
            connection.sendall(request)
            return answers(received(connection, 1))[0]


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def api(replicas: Replicas, tmp_path: Path) -> Iterator[str]:
    with serving(APIIngress(replicas, PATIENT, write(tmp_path / "keys.yaml", entry("alice", KEY)))) as address:
        yield address


@pytest.fixture
def nginx(api: str, tmp_path: Path) -> Iterator[Nginx]:
    with Nginx(tmp_path, api).running() as nginx:
        yield nginx


def own_address() -> str | None:
    """An address of this machine that is not loopback. Sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return None
        address = str(probe.getsockname()[0])
    return None if address.startswith("127.") else address


def test_keys_are_required_and_pass_through(nginx: Nginx, replicas: Replicas) -> None:
    assert nginx.ask(head("GET", "/healthz")).status == 200
    refused = nginx.ask(head("GET", "/imagine?prompt=a"))
    assert (refused.status, refused.error["code"]) == (401, "invalid_api_key")
    drawn = nginx.ask(head("GET", "/imagine?prompt=a&seed=7", BEARER))
    assert (drawn.status, drawn.body) == (200, b"png 7")
    assert drawn.headers["strict-transport-security"]
    longest = "a" * 49000
    assert nginx.ask(head("GET", f"/imagine?prompt=a&negative_prompt={longest}", BEARER)).status == 400, "the API's own"


def test_openais_client_streams_through_nginx_and_events_come_one_by_one(nginx: Nginx, replicas: Replicas) -> None:
    """The replica waits with the second event until the client has read the first."""
    seen = threading.Event()

    def items(request: Any) -> Iterator[Any]:
        yield Accepted()
        yield Preview(0, b"preview")
        assert seen.wait(20)
        yield from list(stream_of(request))[-1:]

    replicas.generate_stream.outcome = items
    context = ssl.create_default_context(cafile=str(nginx.certificate))
    http = openai.DefaultHttpxClient(verify=context)
    with OpenAI(base_url=f"https://localhost:{nginx.port}/v1", api_key=KEY, max_retries=0, http_client=http) as client:
        stream = client.images.generate(prompt="a", stream=True, partial_images=1)
        assert next(stream).type == "image_generation.partial_image"
        seen.set()
        assert [event.type for event in stream] == ["image_generation.completed"]


@pytest.mark.parametrize(
    "request_",
    [
        head("GET", "/?" + "a" * 70000),
        head("GET", "/", "X: " + "a" * 70000),
        head("GET", "/", *(f"X-{i}: {'a' * 50000}" for i in range(8))),
    ],
    ids=["query", "header", "headers"],
)
def test_a_big_head_is_4xx(nginx: Nginx, request_: bytes) -> None:
    with nginx.connected() as connection:
        with contextlib.suppress(OSError):
            connection.sendall(request_)
        assert received(connection, 1)[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 414")
    assert nginx.ask(head("GET", "/healthz")).status == 200


def test_a_big_body_is_413_in_openais_shape_and_never_reaches_the_api(nginx: Nginx) -> None:
    answer = nginx.ask(head("POST", "/v1/images/generations", BEARER, "Content-Length: 2000000"))
    assert (answer.status, answer.error["code"]) == (413, "payload_too_large")


def test_serves_own_routes_are_closed(nginx: Nginx) -> None:
    assert nginx.ask(head("GET", "/-/routes")).error["code"] == "not_found"


def test_http_redirects_to_https(nginx: Nginx) -> None:
    with connected(nginx.plain_port) as connection:
        connection.sendall(head("GET", "/imagine?prompt=a", "Connection: close"))
        (answer,) = answers(received(connection))
    assert (answer.status, answer.headers["location"]) == (308, "https://localhost/imagine?prompt=a")


def test_the_log_has_no_prompts_and_has_the_apis_request_id(nginx: Nginx) -> None:
    nginx.ask(head("GET", "/imagine?prompt=secret+house", BEARER))
    assert soon(lambda: "/imagine" in nginx.log.read_text())
    log = nginx.log.read_text()
    assert "secret" not in log and re.search(r'"GET /imagine" 200 \d+ [\d.]+ [0-9a-f]{32}\n', log)


@pytest.mark.slow
def test_slow_clients_are_disconnected(api: str, tmp_path: Path) -> None:
    seconds = {
        "client_header_timeout 10s": "client_header_timeout 1s",
        "client_body_timeout 10s": "client_body_timeout 1s",
    }
    seconds |= {"keepalive_timeout 60s;\n    reset": "keepalive_timeout 1s;\n    reset"}
    with Nginx(tmp_path, api, **seconds).running() as nginx:
        for sent in (
            b"GET / HTTP/1.1\r\nHost: localhost\r\n",
            head("POST", "/v1/images/generations", BEARER, "Content-Length: 60") + b"{",
            head("GET", "/healthz"),
        ):
            with nginx.connected() as connection:
                connection.sendall(sent)
                assert closed(connection)


def test_many_requests_from_one_address_get_429_with_retry_after(api: str, tmp_path: Path) -> None:
    with Nginx(tmp_path, api, **{"rate=10r/s": "rate=1r/m", "burst=40": "burst=2"}).running() as nginx:
        raw_answers = [nginx.ask(head("GET", "/healthz")) for _ in range(5)]
    assert [answer.status for answer in raw_answers] == [200, 200, 200, 429, 429]
    assert raw_answers[-1].error["code"] == "rate_limit_exceeded" and raw_answers[-1].headers["retry-after"] == "1"


def test_an_api_that_is_down_is_503_with_retry_after(tmp_path: Path) -> None:
    with Nginx(tmp_path, "http://127.0.0.1:9").running() as nginx:
        answer = nginx.ask(head("GET", "/healthz"))
    assert (answer.status, answer.error["code"], answer.headers["retry-after"]) == (503, "unavailable", "5")


def test_without_keys_a_remote_client_behind_nginx_is_refused(replicas: Replicas, tmp_path: Path) -> None:
    """nginx connects over loopback, and what it says of its client is believed, not what the client says."""
    address = own_address()
    with serving(APIIngress(replicas, PATIENT)) as api, Nginx(tmp_path, api).running() as nginx:
        lies = ("X-Forwarded-For: 127.0.0.1", "X-Real-IP: 127.0.0.1", "Forwarded: for=127.0.0.1")
        rebound = nginx.ask(head("GET", "/imagine?prompt=a", host="imagine.example.com"))
        assert (rebound.status, rebound.error["code"]) == (403, "loopback_only")
        if address is None:
            pytest.skip("this machine has no address but loopback")
        for lines in ((), lies[:1], lies[:2]):
            answer = nginx.ask(head("GET", "/imagine?prompt=a", *lines), address)
            assert (answer.status, answer.error["code"]) == (403, "loopback_only")
    assert not replicas.generate.calls
