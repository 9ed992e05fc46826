"""Parses server-sent events from the bytes of a stream. Knows nothing of pictures.

The format: https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

END = re.compile(rb"[\r\n]")
MARK = b"\xef\xbb\xbf"


class Event(NamedTuple):
    name: str
    data: bytes


class Parser:
    """A line ends with CR, LF or CRLF, and an empty line ends an event. Chunks may have any size."""

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self.buffer = bytearray()
        self.searched = 0  # bytes of the buffer without a line end
        self.begun = False
        self.after_cr = False  # a following LF belongs to the same line end
        self.name = ""
        self.data: list[bytes] = []
        self.held = 0  # bytes of data

    def feed(self, chunk: bytes) -> Iterator[Event]:
        """The events that these bytes complete. Raises ValueError if an event is too long."""
        self.buffer += chunk
        while (line := self.line()) is not None:
            if not line:
                if self.data:
                    yield Event(self.name or "message", b"\n".join(self.data))
                self.name, self.data, self.held = "", [], 0
            else:
                self.field(line)
        if len(self.buffer) + self.held > self.longest:
            raise ValueError(f"an event of more than {self.longest} bytes")

    def line(self) -> bytes | None:
        """The next complete line, without its line end."""
        if not self.begun:
            if MARK.startswith(bytes(self.buffer[:3])) and len(self.buffer) < 3:
                return None
            self.begun = True
            if self.buffer.startswith(MARK):
                del self.buffer[:3]
        if self.after_cr and self.buffer:
            self.after_cr = False
            if self.buffer.startswith(b"\n"):
                del self.buffer[:1]
        match = END.search(self.buffer, self.searched)
        if not match:
            self.searched = len(self.buffer)
            return None
        end = match.start()
        line = bytes(self.buffer[:end])
        self.after_cr = self.buffer[end] == ord("\r")
        del self.buffer[: end + 1]
        self.searched = 0
        return line

    def field(self, line: bytes) -> None:
        key, _, value = line.partition(b":")  # a comment has an empty key
        value = value.removeprefix(b" ")
        if key == b"event":
            self.name = value.decode("utf8", "replace")
        elif key == b"data":
            self.data.append(value)
            self.held += len(value)
