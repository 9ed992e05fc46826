"""The Range header of a request for a file: RFC 9110, section 14. Knows nothing of files."""

import re

from app.api.errors import ApiError


class Unsatisfiable(ApiError):
    """No byte of the range is in the file."""

    def __init__(self, size: int) -> None:
        super().__init__(416, f"The range must begin below {size}, the size of the file.", None, "invalid_range")
        self.size = size

    def headers(self) -> dict[str, str]:
        return super().headers() | {"Content-Range": f"bytes */{self.size}"}


def byte_range(header: str | None, size: int) -> range | None:
    """The bytes that the header asks for; None for the whole file. Raises Unsatisfiable.

    As the RFC allows, a header that is malformed or asks for several ranges counts as none.
    """
    match = re.fullmatch(r"\s*bytes\s*=\s*([0-9]{0,18})\s*-\s*([0-9]{0,18})\s*", header or "", re.IGNORECASE)
    if match is None or not any(match.groups()):
        return None
    first, last = match.groups()
    if not first:  # the last bytes
        if not int(last):
            raise Unsatisfiable(size)
        return range(max(size - int(last), 0), size)
    if last and int(last) < int(first):
        return None
    if int(first) >= size:
        raise Unsatisfiable(size)
    return range(int(first), min(int(last) + 1, size) if last else size)
