"""Reads the body of a request, up to a limit."""

import asyncio

from starlette.requests import ClientDisconnect, Request

from app.api.errors import ApiError

# Bytes of a refused body that are read and discarded: a client that is still sending when the connection closes sees a
# broken pipe instead of the answer.
DRAINED_BYTES = 4 << 20


def check_json(request: Request) -> None:
    media_type, charset = media_type_of(request)
    if media_type != "application/json" or charset not in ("", "charset=utf-8", 'charset="utf-8"'):
        raise ApiError(415, "The body must have Content-Type: application/json.", None, "unsupported_media_type")


def check_form_or_json(request: Request) -> None:
    if media_type_of(request)[0] == "multipart/form-data":
        return
    try:
        check_json(request)
    except ApiError as error:
        types = "multipart/form-data or application/json"
        raise ApiError(415, f"The body must have Content-Type: {types}.", None, error.code) from None


def media_type_of(request: Request) -> tuple[str, str]:
    """The media type, and its parameters as they are."""
    media_type, _, parameters = request.headers.get("content-type", "").partition(";")
    return media_type.strip().lower(), parameters.strip().lower()


async def read_body(request: Request, limit: int, timeout_s: float) -> bytes:
    """Keeps no more than `limit` bytes in memory."""
    too_large = ApiError(413, f"The body must be at most {limit} bytes.", None, "payload_too_large")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > limit + DRAINED_BYTES:
        raise too_large
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                size += len(chunk)
                if size > limit + DRAINED_BYTES:
                    raise too_large
                if size <= limit:
                    body += chunk
    except TimeoutError:
        raise ApiError(408, f"The body did not arrive within {timeout_s:g} s.", None, "timeout") from None
    except ClientDisconnect:
        raise ApiError(400, "The body ended early.", None, "invalid_json") from None
    if size > limit:
        raise too_large
    return bytes(body)
