"""Turns what a route raises into an error answer in OpenAI's shape."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from app.api.errors import ApiError, api_error
from app.api.responses import json_response
from app.types import InvalidField


def error_response(error: ApiError) -> Response:
    return json_response(error.body(), error.status, error.headers())


async def on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError | InvalidField)
    return error_response(api_error(error))


async def on_http_error(request: Request, error: Exception) -> Response:
    """Starlette's router raises this for an unknown path or method."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        allow = ", ".join(sorted((error.headers or {})["Allow"].split(", ")))
        body = ApiError(405, f"{request.method} is not allowed here; use {allow}.", None, "method_not_allowed").body()
        return json_response(body, 405, {"Allow": allow})
    return error_response(ApiError(error.status_code, "There is no such route; GET / lists them.", None, "not_found"))


async def on_bug(request: Request, error: Exception) -> Response:
    """Starlette raises the error again after this answer, so the log has its traceback."""
    return error_response(ApiError(500, "The server failed on this request.", None, "internal_error"))


HANDLERS: Mapping[Any, Callable[[Request, Exception], Awaitable[Response]]] = {
    ApiError: on_api_error,
    InvalidField: on_api_error,
    HTTPException: on_http_error,
    Exception: on_bug,
}
