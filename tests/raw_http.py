"""Sends bytes to a server and reads its bytes, for requests that no HTTP client would send."""

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RawAnswer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """The error object of the body. Asserts OpenAI's shape."""
        assert self.headers["content-type"] == "application/json", self
        error = json.loads(self.body)["error"]
        assert set(error) == {"message", "type", "param", "code"} and all(error[name] for name in ("message", "code"))
        return dict(error)


@contextmanager
def connected(port: int, timeout_s: float = 30) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as connection:
        yield connection


def head(method: str = "GET", path: str = "/", *lines: str, host: str | None = "localhost") -> bytes:
    named = [] if host is None else [f"Host: {host}"]
    return "\r\n".join([f"{method} {path} HTTP/1.1", *named, *lines, "", ""]).encode("latin-1")


def ask(port: int, request: bytes, timeout_s: float = 30) -> RawAnswer:
    """The first answer. The server may refuse the request before it has read all of it."""
    with connected(port, timeout_s) as connection:
        try:
            connection.sendall(request)
        except OSError:
            pass
        return answers(received(connection, 1))[0]


def received(connection: socket.socket, count: int | None = None) -> bytes:
    """The bytes until the server closes, or until there are `count` answers."""
    data = b""
    while count is None or len(answers(data, partial=True)) < count:
        try:
            piece = connection.recv(65536)
        except ConnectionResetError:
            break
        if not piece:
            break
        data += piece
    return data


def answers(data: bytes, *, partial: bool = False) -> list[RawAnswer]:
    """The answers on one connection, where no request was a HEAD."""
    complete = []
    while data:
        start, separator, rest = data.partition(b"\r\n\r\n")
        status, *lines = start.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if headers.get("transfer-encoding") == "chunked":
            body, rest, whole = chunks(rest)
        else:
            length = int(headers.get("content-length", 0))
            body, rest, whole = rest[:length], rest[length:], len(rest) >= length
        if not separator or not whole:
            assert partial, data[:300]
            break
        complete.append(RawAnswer(int(status.split(" ")[1]), headers, body))
        data = rest
    return complete


def chunks(data: bytes) -> tuple[bytes, bytes, bool]:
    """The body, the bytes after it, and whether it is complete."""
    body = b""
    while True:
        size, separator, data = data.partition(b"\r\n")
        if not separator or len(data) < int(size, 16) + 2:
            return body, b"", False
        body, data = body + data[: int(size, 16)], data[int(size, 16) + 2 :]
        if int(size, 16) == 0:
            return body, data, True


def closed(connection: socket.socket) -> bool:
    """Whether the server closes before the connection's timeout."""
    try:
        while connection.recv(65536):
            pass
    except TimeoutError:
        return False
    except ConnectionResetError:
        pass
    return True
