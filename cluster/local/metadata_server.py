"""The local cluster's imitation of Google's metadata server, which tells a node whether it will be preempted.

GET /NODE/KEY answers as Google's server does: at once or, with wait_for_change, when the value changes. GET / lists the
nodes, and PUT /NODE/preempted preempts one. These two need the cluster's token, as other users of this machine may not
control the cluster. Knows nothing of Ray.
"""

import hmac
import json
import math
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

VALUES = {"preempted": "FALSE", "maintenance-event": "NONE"}  # of a node that is not preempted
WAIT_S = 60.0


class Metadata:
    def __init__(self, nodes: Callable[[], list[str]], preempt: Callable[[str], None], token: str) -> None:
        self.token = token
        self.nodes = nodes
        self.preempt = preempt
        self.changed = threading.Condition()
        self.taken: set[str] = set()

    def take(self, node: str) -> None:
        with self.changed:
            self.taken.add(node)
            self.changed.notify_all()

    def value(self, node: str, key: str) -> str:
        return "TRUE" if key == "preempted" and node in self.taken else VALUES[key]

    def value_that_differs(self, node: str, key: str, tag: str, timeout_s: float) -> str:
        """The value once it differs from `tag`, or after `timeout_s`. A value is its own tag."""
        until = time.monotonic() + timeout_s
        with self.changed:
            while (value := self.value(node, key)) == tag and (left_s := until - time.monotonic()) > 0:
                self.changed.wait(left_s)
            return value

    def serve(self, port: int) -> ThreadingHTTPServer:
        server = ThreadingHTTPServer(("127.0.0.1", port), handler(self))
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server


def seconds(text: str) -> float:
    """The timeout of a request that waits; at most that of Google's server."""
    try:
        wanted = float(text)
    except ValueError:
        return WAIT_S
    return min(WAIT_S, wanted) if math.isfinite(wanted) else WAIT_S


def handler(metadata: Metadata) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urlsplit(self.path)
            if url.path == "/":
                if self.authorized():
                    self.answer(200, json.dumps(metadata.nodes()))
                return
            node, key = self.node_and_key(url.path)
            if not key:
                self.answer(404, f"There is no {url.path} here.")
                return
            query = {name: values[0] for name, values in parse_qs(url.query).items()}
            tag = query.get("last_etag", "") if query.get("wait_for_change") == "true" else ""
            value = metadata.value_that_differs(node, key, tag, seconds(query.get("timeout_sec", "")))
            self.answer(200, value, {"ETag": value})

        def do_PUT(self) -> None:
            if not self.authorized():
                return
            node, key = self.node_and_key(urlsplit(self.path).path)
            if key != "preempted" or node not in metadata.nodes():
                self.answer(404, f"There is no node {node}.")
                return
            metadata.preempt(node)
            self.answer(200, "TRUE")

        def authorized(self) -> bool:
            sent = self.headers.get("Authorization", "").encode()
            known = bool(metadata.token) and hmac.compare_digest(sent, f"Bearer {metadata.token}".encode())
            if not known:
                self.answer(403 if sent else 401, "The cluster's token is required.")
            return known

        def node_and_key(self, path: str) -> tuple[str, str]:
            node, _, key = path.removeprefix("/").partition("/")
            return node, key if key in VALUES else ""

        def answer(self, status: int, text: str, headers: Mapping[str, str] | None = None) -> None:
            body = text.encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: the watcher logs each answer."""

    return Handler
