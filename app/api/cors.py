"""Lets pages of the declared origins read this API's answers (CORS, https://fetch.spec.whatwg.org/#http-cors-protocol).

Knows nothing of keys: auth.py decides who may ask.
"""

from collections.abc import Sequence

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

EXPOSED = (
    "Location",
    "Retry-After",
    "Server-Timing",
    "X-Request-ID",
    "X-Seed",
)  # headers of an answer that such a page may read


class CorsMiddleware(CORSMiddleware):
    """Answers preflights of the declared origins, and passes on every other request as if it were not there."""

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        headers = ("Authorization", "Content-Type", "Idempotency-Key", "Prefer")
        super().__init__(app, origins, ("GET", "POST", "DELETE"), headers, expose_headers=EXPOSED, max_age=3600)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        origins = [value.decode("latin-1") for name, value in scope.get("headers", ()) if name == b"origin"]
        declared = len(origins) == 1 and self.is_allowed_origin(origins[0])
        await (super().__call__ if declared else self.app)(scope, receive, send)
