"""Who may use an API without keys from a browser: its own page, through any port of this machine, and no other page."""

import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

from tests.browser.conftest import Open, draw, ready
from tests.browser.studio import Server

ASK = "url => fetch(url).then((answer) => answer.status, () => 'blocked')"
EMBED = """url => new Promise((resolve) => {
  const image = new Image();
  image.onload = () => resolve("shown");
  image.onerror = () => resolve("blocked");
  image.src = url;
})"""


@contextmanager
def tunnel(port: int) -> Iterator[int]:
    """Forwards another port, as `ssh -L` does."""
    listener = socket.create_server(("127.0.0.1", 0))

    def pump(source: socket.socket, target: socket.socket) -> None:
        with closing(target):
            try:
                while data := source.recv(65536):
                    target.sendall(data)
            except OSError:  # one end has gone
                pass

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            api = socket.create_connection(("127.0.0.1", port))
            for ends in ((client, api), (api, client)):
                threading.Thread(target=pump, args=ends, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.close()


def test_the_page_draws_through_a_tunnel_on_another_port(opened: Open, server: Server) -> None:
    with tunnel(server.port) as port:
        page = opened(Server({}, port=port))
        draw(ready(page), "a boat", num_inference_steps=2)
        page.locator(".tile[data-state=done]").wait_for()


def test_a_page_of_another_origin_can_neither_ask_nor_embed_nor_frame(browser: Any, server: Server, other: str) -> None:
    page = browser.new_page()
    page.goto(other)
    for path in ("v1/models", "v1/stats", "page/main.js", ""):
        assert page.evaluate(ASK, f"{server.url}/{path}") == "blocked", path
    before = server.unfinished()
    assert page.evaluate(EMBED, f"{server.url}/imagine?prompt=a") == "blocked"
    assert server.unfinished() == before
    page.evaluate(
        "url => document.body.append(Object.assign(document.createElement('iframe'), { src: url }))", server.url
    )
    page.wait_for_timeout(300)
    assert not any(frame.query_selector("#prompt") for frame in page.frames)
    page.evaluate("url => location.assign(url)", f"{server.url}/")  # a link leads to the page
    page.locator("#prompt").wait_for()
    page.close()
