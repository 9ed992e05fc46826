"""The HTTP parser of Serve's proxy, with limits on the size of a head and on the time that a client may take.

uvicorn's own protocol limits neither the bytes nor the seconds of a request's head. This subclass limits each head, the
framing and trailers of a chunked body, pipelined requests, and idle connections. Knows nothing of Ray, routes or keys.
"""

import asyncio
import json
from http import HTTPStatus
from typing import Any, NoReturn

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.api.errors import ApiError

# Room for the longest query string (query_bytes, 49152) and 16 KiB of headers, as many as Node.js allows. The parser
# keeps a head in memory, and appends to an unfinished header in quadratic time.
HEAD_BYTES = 64 << 10
HEADERS = 128
HEAD_S = 10.0  # from a connection's start, or a head's first byte, to the head's end
UNREAD_BODY_S = 5.0  # for the rest of a body after its answer
WRITE_S = 60.0  # for a client to read a part of its answer
PIPELINED = 8  # requests that wait on a connection for the answer before theirs
LINGER_S = 2.0  # after an error: a client that is still sending when the connection closes sees a reset instead of it
LINGER_BYTES = 4 << 20
PIECE_BYTES = 16 << 10  # for the parser at once, so a head exceeds its limit by no more


def refusal(error: ApiError) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Headers and body of an error answer, after which the connection closes."""
    body = json.dumps(error.body()).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    headers += [(name.lower().encode(), value.encode()) for name, value in error.headers().items()]
    return headers, body


class BoundedProtocol(HttpToolsProtocol):
    """One connection. The methods that uvicorn's class has too are called by asyncio or by the parser."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.unparsed = 0  # bytes since the last complete head, message or piece of a body
        self.head_bytes = 0  # of the complete fields of a head
        self.in_head = True  # also between requests
        self.excess = ""  # the rule that a head breaks
        self.discarding = False  # discards what still arrives
        self.discarded = 0
        self.reading_deadline: asyncio.TimerHandle | None = None
        self.writing_deadline: asyncio.TimerHandle | None = None

    # Called by the transport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.expect_within(HEAD_S)

    def connection_lost(self, exc: Exception | None) -> None:
        self.expect_nothing()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.discarding:
            self.discard(len(data))
            return
        if self.in_head and self.reading_deadline is None and not self.busy:
            self.expect_within(HEAD_S)
        for start in range(0, len(data), PIECE_BYTES):
            piece = data[start : start + PIECE_BYTES]
            self.unparsed += len(piece)
            super().data_received(piece)
            if self.discarding or self.transport.is_closing():
                return
            if self.unparsed > HEAD_BYTES:
                self.refuse(too_large(f"be at most {HEAD_BYTES} bytes"))
                return

    def pause_writing(self) -> None:
        super().pause_writing()
        if self.writing_deadline is None:
            self.expect_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.writing_deadline is not None:
            self.writing_deadline.cancel()
            self.writing_deadline = None

    # Called by the parser

    def on_message_begin(self) -> None:
        self.head_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self.head_bytes += len(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.in_head:  # a trailer: uvicorn would add it to the headers of the running request
            return
        self.head_bytes += len(name) + len(value)
        if self.head_bytes > HEAD_BYTES:
            self.stop_parsing(f"be at most {HEAD_BYTES} bytes")
        if len(self.headers) == HEADERS:
            self.stop_parsing(f"have at most {HEADERS} headers")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self.in_head, self.unparsed = False, 0
        self.expect_nothing()
        super().on_headers_complete()
        if self.parser.should_upgrade():
            self.cycle.keep_alive = False  # the next bytes may be in another protocol
        if len(self.pipeline) > PIPELINED:
            self.stop_parsing(f"be one of at most {PIPELINED} that wait on a connection")

    def stop_parsing(self, rule: str) -> NoReturn:
        """Only an exception stops the parser. uvicorn catches it and calls send_400_response."""
        self.excess = rule
        raise ValueError(rule)

    def on_body(self, body: bytes) -> None:
        self.unparsed = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self.in_head, self.unparsed = True, 0
        self.expect_nothing()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.in_head and not self.busy:
            self.expect_within(UNREAD_BODY_S)

    def _should_upgrade(self) -> bool:
        """The proxy supports neither WebSocket nor h2c, and answers a request to upgrade in HTTP/1.1."""
        return False

    def _unsupported_upgrade_warning(self) -> None:
        """uvicorn calls this after a request to upgrade."""
        self.discarding = True

    def send_400_response(self, msg: str) -> None:
        """uvicorn calls this when the parser fails."""
        if self.excess:
            self.refuse(too_large(self.excess))
        else:
            self.refuse(ApiError(400, "This is not a valid HTTP/1.1 request.", None, "invalid_request"))

    # Deadlines and refusals

    @property
    def busy(self) -> bool:
        """Whether a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def expect_within(self, seconds: float) -> None:
        """Closes the connection unless the head or body ends within `seconds`."""
        self.expect_nothing()
        self.reading_deadline = self.loop.call_later(seconds, self.give_up)

    def expect_nothing(self) -> None:
        if self.reading_deadline is not None:
            self.reading_deadline.cancel()
            self.reading_deadline = None

    def expect_reading(self) -> None:
        unsent = self.transport.get_write_buffer_size()
        self.writing_deadline = self.loop.call_later(WRITE_S, self.check_reading, unsent)

    def check_reading(self, before: int) -> None:
        if self.transport.get_write_buffer_size() < before:  # the client reads, if slowly
            self.expect_reading()
        else:
            self.transport.abort()

    def give_up(self) -> None:
        if self.in_head and self.unparsed and not self.busy:
            message = f"The head of the request did not arrive within {HEAD_S:g} s."
            self.refuse(ApiError(408, message, None, "timeout"))
        else:
            self.transport.close()

    def refuse(self, error: ApiError) -> None:
        """Answers and closes. While an earlier request is being answered, it only closes."""
        self.discarding = True
        self.expect_nothing()
        self._unset_keepalive_if_required()
        if self.busy:
            self.transport.close()
            return
        headers, body = refusal(error)
        lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}".encode()]
        lines += [b"%s: %s" % header for header in headers]
        self.transport.write(b"\r\n".join([*lines, b"", body]))
        if self.transport.can_write_eof():
            self.transport.write_eof()
            self.reading_deadline = self.loop.call_later(LINGER_S, self.transport.abort)
        else:  # TLS
            self.transport.close()

    def discard(self, count: int) -> None:
        self.discarded += count
        if self.discarded > LINGER_BYTES:
            self.transport.abort()


def too_large(rule: str) -> ApiError:
    return ApiError(431, f"The head of a request must {rule}.", None, "headers_too_large")
