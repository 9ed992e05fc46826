"""Google's metadata server as a machine sees it at 169.254.169.254 (cloud.google.com/compute/docs/metadata).

It knows the machine's TPU, hands out tokens of its service account, and announces preemption and maintenance.
"""

import json
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

ADDRESS = "169.254.169.254"
ROOT = "/computeMetadata/v1/"
MAX_WAIT_S = 60.0


class Metadata:
    """Values by their paths below /computeMetadata/v1/. A value is its own tag."""

    def __init__(self, values: Mapping[str, str], token: Callable[[], Any]) -> None:
        self.values = {"instance/preempted": "FALSE", "instance/maintenance-event": "NONE", **values}
        self.token = token
        self.changed = threading.Condition()

    def set(self, key: str, value: str) -> None:
        with self.changed:
            self.values[key] = value
            self.changed.notify_all()

    def value(self, path: str, tag: str, timeout_s: float) -> str | None:
        """The value, once it differs from `tag` or after the timeout."""
        if path.startswith("instance/service-accounts/"):
            return self.account(path.rstrip("/"))
        until = time.monotonic() + timeout_s
        with self.changed:
            while tag and self.values.get(path) == tag and (left_s := until - time.monotonic()) > 0:
                self.changed.wait(left_s)
            return self.values.get(path)

    def account(self, path: str) -> str | None:
        email = self.values["service-account"]
        scopes = ["https://www.googleapis.com/auth/cloud-platform"]
        match path.split("/")[2:]:
            case [name] if name in ("default", email):
                return json.dumps({"aliases": ["default"], "email": email, "scopes": scopes})
            case [_, "email"]:
                return email
            case [_, "token"]:
                return json.dumps(self.token())
        return None


class Handler(BaseHTTPRequestHandler):
    server: "Server"

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        tag = query.get("last_etag", "") if query.get("wait_for_change") == "true" else ""
        timeout_s = min(MAX_WAIT_S, float(query.get("timeout_sec", MAX_WAIT_S)))
        if url.path == "/":
            return self.answer(200, "computeMetadata/\n")
        if self.headers.get("Metadata-Flavor") != "Google":
            return self.answer(403, "Missing Metadata-Flavor:Google header.")
        value = self.server.metadata.value(url.path.removeprefix(ROOT), tag, timeout_s)
        self.answer(404 if value is None else 200, value or "")

    def answer(self, status: int, text: str) -> None:
        body = text.encode()
        self.send_response_only(status)
        kind = "application/json" if text.startswith("{") else "application/text"
        headers = {"Metadata-Flavor": "Google", "Content-Type": kind, "Content-Length": str(len(body)), "ETag": text}
        for name, value in headers.items():
            if "\n" not in value:
                self.send_header(name, value)
        with suppress(ConnectionError):  # of a machine that has gone meanwhile
            self.end_headers()
            self.wfile.write(body)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, metadata: Metadata, address: tuple[str, int] = (ADDRESS, 80)) -> None:
        super().__init__(address, Handler)
        self.metadata = metadata
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()
