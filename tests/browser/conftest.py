"""A headless Chromium, and a page of it that fails its test for what no page may do."""

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.browser.studio import Server, studio

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WAIT_MS = 60_000  # no test waits so long unless it fails
NETWORK = "Failed to load resource"  # how Chromium logs an answer of 4xx and a server that is away
# The files and settings of the gallery, out of the browser's database, the oldest first.
KEPT = """async () => {
  const open = indexedDB.open("imagine");
  await new Promise((resolve) => (open.onsuccess = resolve));
  const all = open.result.transaction("pictures").objectStore("pictures").getAll();
  await new Promise((resolve) => (all.onsuccess = resolve));
  const text = async (blob) => btoa(String.fromCharCode(...new Uint8Array(await blob.arrayBuffer())));
  return Promise.all(all.result.map(async ({ blob, fields }) => ({ fields, file: await text(blob) })));
}"""

Open = Callable[..., Any]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make browser")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    playwright.expect.set_options(timeout=WAIT_MS)
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses to run as root with one
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with studio() as server:
        yield server


@pytest.fixture
def quick(server: Server) -> Iterator[Server]:
    """The server, at its usual pace again after the test."""
    yield server
    server.slow_down(1.0)


@pytest.fixture
def opened(browser: Any) -> Iterator[Open]:
    """Opens the page of a server in a context of its own, and says in the end what the page did wrong.

    `refusals` allows Chromium's log entries for answers that are no success.
    """
    contexts: list[Any] = []
    wrong: list[str] = []

    def open_page(server: Server, path: str = "/", *, refusals: bool = False, **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 860}} | options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(WAIT_MS)
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on("console", lambda message: logged(message, refusals))
        page.on("request", lambda request: asked_for(request.url, server))
        page.goto(f"{server.url}{path}")
        return page

    def logged(message: Any, refusals: bool) -> None:
        if message.type in ("error", "warning") and not (refusals and NETWORK in message.text):
            wrong.append(f"{message.type}: {message.text}")

    def asked_for(url: str, server: Server) -> None:
        if not url.startswith((f"{server.url}/", f"blob:{server.url}/")):
            wrong.append(f"request to {url}")

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong


def pixels(file: bytes) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(file)))


def ready(page: Any) -> Any:
    page.locator("#connection[data-state=ready]").wait_for(state="attached")
    page.locator("#sizes input").first.wait_for(state="attached")
    return page


def draw(page: Any, prompt: str, **fields: object) -> None:
    """Fills the form and sends it, as a person with a keyboard would."""
    page.fill("#prompt", prompt)
    for name, value in fields.items():
        if name in ("n", "size"):
            page.locator(f"input[name={name}][value='{value}']").check()
        elif name == "sampler":
            page.select_option("#sampler", str(value))
        else:
            page.fill(f"#{name}", str(value))
    page.keyboard.press("Control+Enter")


@pytest.fixture
def other() -> Iterator[str]:
    """The address of a page of another origin on this machine."""

    class Empty(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><title>Another page</title><body></body>")

        def log_message(self, *arguments: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Empty) as elsewhere:
        thread = threading.Thread(target=elsewhere.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{elsewhere.server_port}"
        elsewhere.shutdown()
        thread.join(10)
