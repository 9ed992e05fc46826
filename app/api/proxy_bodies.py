"""How many bytes of bodies Serve's proxy takes: of each, and of all whose requests have not ended.

The proxy and the ingress each keep a body in memory until the ingress has read it. The limits of the config are lower,
and the ingress applies them. Knows nothing of HTTP but paths.
"""

from collections import Counter

from app.api.errors import ApiError
from app.api.settings import LARGEST_BODY, LARGEST_UPLOAD

UPLOADS = "/images/edits"  # the end of the only path whose requests bring images
ALL_BODIES, ALL_UPLOADS = 128 << 20, 512 << 20  # bytes of all bodies at a time, without and with images
FULL_RETRY_S = 2.0


class Body:
    """The body of a request. `held` has the bytes of all bodies, of uploads (True) apart from others (False), so that
    uploads crowd out no other request."""

    def __init__(self, path: str, held: Counter[bool]) -> None:
        self.upload = path.endswith(UPLOADS)
        self.held = held
        self.bytes = 0
        self.excess: ApiError | None = None  # the limit that the body exceeds

    @property
    def limit(self) -> int:
        return LARGEST_UPLOAD if self.upload else LARGEST_BODY

    def check_length(self, length: int) -> None:
        """Refuses a declared length."""
        if length > self.limit:
            raise too_large(self.limit)

    def take(self, count: int) -> bool:
        """Whether more bytes may be kept. They are counted until the request ends."""
        if self.bytes + count > self.limit:
            self.excess = too_large(self.limit)
        elif self.held[self.upload] + count > (ALL_UPLOADS if self.upload else ALL_BODIES):
            message = "Too many bodies are being received; try again."
            self.excess = ApiError(503, message, None, "queue_full", FULL_RETRY_S)
        else:
            self.bytes += count
            self.held[self.upload] += count
        return self.excess is None

    def end(self) -> None:
        self.held[self.upload] -= self.bytes


def too_large(limit: int) -> ApiError:
    return ApiError(413, f"The body must be at most {limit} bytes.", None, "payload_too_large")
