"""An error answer in OpenAI's shape. Knows no HTTP library, so the proxy, the ingress and the replica share it."""

import math

from app.types import InvalidField


class ApiError(Exception):
    """A request that failed, in a sentence for the client. All arguments are positional, so it pickles."""

    def __init__(
        self, status: int, message: str, param: str | None, code: str, retry_after_s: float | None = None
    ) -> None:
        super().__init__(status, message, param, code, retry_after_s)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, dict[str, str | None]]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """The headers that belong to the status."""
        headers = {} if self.retry_after_s is None else {"Retry-After": str(max(1, math.ceil(self.retry_after_s)))}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


class ReplicaGone(Exception):
    """The replica that a request was meant for does not run any more. It has not received the request."""


def api_error(error: ApiError | InvalidField) -> ApiError:
    if isinstance(error, ApiError):
        return error
    status = 404 if error.code == "model_not_found" else 400
    return ApiError(status, error.message, error.field, error.code)


def queue_full(retry_after_s: float) -> ApiError:
    return ApiError(503, "The queue is full; try again later.", None, "queue_full", retry_after_s)


def deadline_unmeetable(estimate_s: float, timeout_s: float, retry_after_s: float) -> ApiError:
    message = (
        f"This would be ready in {rounded_up(estimate_s)} s, and timeout is {timeout_s:g} s; "
        "try again later or with a longer timeout."
    )
    return ApiError(503, message, "timeout", "deadline_unmeetable", retry_after_s)


def rounded_up(seconds: float) -> str:
    """Rounded up to a tenth, so that a deadline that is missed narrowly does not read as if it were met."""
    return f"{math.ceil(10 * seconds) / 10:g}"
