"""Parses a multipart/form-data body (RFC 7578) into its parts. Knows nothing of what the parts mean.

The body is in memory, and its length bounded, before it comes here. A part's filename is never read.
"""

import logging
from typing import NamedTuple

from app.api.errors import ApiError

# The parser warns of each malformed form, which would let any client fill the log.
logging.getLogger("python_multipart").setLevel(logging.ERROR)

PARTS = 100
HEADERS = 8  # of a part
HEADER_BYTES = 2048
NAME_CHARACTERS = 100


class Part(NamedTuple):
    name: str
    content: bytes


def parse_form(body: bytes, content_type: str) -> list[Part]:
    """Raises ApiError for a body that is not multipart/form-data of a sensible shape."""
    # Not at the top, so that a process without the library can import what is beside it.
    from python_multipart.exceptions import FormParserError
    from python_multipart.multipart import MultipartParser, parse_options_header

    boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
    if not boundary:
        raise ApiError(400, "Content-Type must name the boundary of multipart/form-data.", None, "invalid_form")
    parts: list[Part] = []
    headers: dict[bytes, bytes] = {}
    field, value, content, ended = bytearray(), bytearray(), bytearray(), False

    def begin() -> None:
        if len(parts) == PARTS:
            raise invalid(f"it has over {PARTS} parts")
        headers.clear()
        content.clear()

    def end_header() -> None:
        headers[bytes(field).lower()] = bytes(value)
        field.clear()
        value.clear()

    def end_part() -> None:
        kind, options = parse_options_header(headers.get(b"content-disposition"))
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if kind != b"form-data" or not name or len(name) > NAME_CHARACTERS:
            raise invalid(f"part {len(parts) + 1} has no name in its Content-Disposition")
        parts.append(Part(name, bytes(content)))

    def end() -> None:
        nonlocal ended
        ended = True

    try:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": begin,
                "on_part_data": lambda data, start, end: content.extend(data[start:end]),
                "on_part_end": end_part,
                "on_header_field": lambda data, start, end: field.extend(data[start:end]),
                "on_header_value": lambda data, start, end: value.extend(data[start:end]),
                "on_header_end": end_header,
                "on_end": end,
            },
            max_header_count=HEADERS,
            max_header_size=HEADER_BYTES,
        )
        parser.write(body)
    except FormParserError:
        raise invalid("a boundary or a header of a part is malformed") from None
    if not ended:
        raise invalid("it ends before its last boundary")
    return parts


def invalid(what: str) -> ApiError:
    return ApiError(400, f"The body is no multipart/form-data: {what}.", None, "invalid_form")
