"""Pictures behind URLs: keeps them for a while, and answers GET /v1/files/{id} to their owner alone."""

import asyncio
import re
import time
from collections.abc import Callable, Sequence
from email.utils import formatdate

from starlette.requests import Request
from starlette.responses import Response

from app.api.auth import owner_of
from app.api.database import Database
from app.api.errors import ApiError
from app.api.files.ranges import byte_range
from app.api.files.storage import Storage
from app.api.files.table import (
    File,
    add_files,
    expired_files,
    find_file,
    forget_files,
    new_files,
    total_bytes,
)

MEDIA_TYPES = {"png": "image/png", "webp": "image/webp", "jpeg": "image/jpeg"}
NAME = re.compile(rf"([A-Za-z0-9_-]{{32}})\.({'|'.join(MEDIA_TYPES)})")
SWEPT = 1000  # files that are deleted in one transaction
FULL_RETRY_S = 60.0


class Files:
    def __init__(
        self,
        database: Database,
        storage: Storage,
        *,
        max_bytes: int,
        base_url: str | None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.database = database
        self.storage = storage
        self.max_bytes = max_bytes
        self.base_url = base_url
        self.clock = clock

    async def check_room(self) -> None:
        """Refuses a request before its pictures are drawn."""
        if await self.full():
            raise ApiError(
                503, "No more pictures can be kept now; try again later.", None, "storage_full", FULL_RETRY_S
            )

    async def full(self) -> bool:
        return await self.database.read(total_bytes) >= self.max_bytes

    async def save(
        self, contents: Sequence[bytes], format: str, owner: str, keep_s: float, job: str | None = None
    ) -> list[File]:
        now = self.clock()
        files = new_files([len(content) for content in contents], format, now, now + keep_s)
        await self.database.write(add_files, files, owner, job)
        for file, content in zip(files, contents, strict=True):
            await asyncio.to_thread(self.storage.write, file.name, content)
        return files

    async def read(self, file: File, part: range) -> bytes:
        return await asyncio.to_thread(self.storage.read, file.name, part.start, part.stop)

    async def sweep(self) -> int:
        """Deletes what has expired, and returns how many files that were."""
        deleted = 0
        while expired := await self.database.read(expired_files, self.clock(), SWEPT):
            for file in expired:
                await asyncio.to_thread(self.storage.delete, file.name)
            await self.database.write(forget_files, [file.id for file in expired])
            deleted += len(expired)
        return deleted

    def url(self, request: Request, name: str) -> str:
        """At the address that the client itself used, unless the config names another."""
        return f"{self.base_url or str(request.base_url).rstrip('/')}/v1/files/{name}"

    async def respond(self, request: Request) -> Response:
        """GET and HEAD. A file never changes, so its id is its version."""
        missing = ApiError(404, "There is no such file, or it has expired.", None, "not_found")
        match = NAME.fullmatch(request.path_params["id"])
        if match is None:
            raise missing
        id, format = match.groups()
        file = await self.database.read(find_file, id, owner_of(request.scope), self.clock())
        if file is None or file.format != format:
            raise missing
        tag = f'"{file.id}"'
        headers = {
            "Accept-Ranges": "bytes",
            "Cache-Control": f"private, max-age={int(file.expires - self.clock())}, immutable",
            "Content-Security-Policy": "default-src 'none'",
            "Content-Type": MEDIA_TYPES[file.format],
            "ETag": tag,
            "Last-Modified": formatdate(file.created, usegmt=True),
            "X-Content-Type-Options": "nosniff",
        }
        if matches(request.headers.get("if-none-match", ""), tag):
            return Response(None, 304, headers)
        if request.method == "HEAD":  # which has no ranges (RFC 9110, 14.2)
            return Response(None, 200, headers | {"Content-Length": str(file.bytes)})
        wanted = request.headers.get("range")
        if request.headers.get("if-range", tag) != tag:  # the client has a part of something else
            wanted = None
        part = byte_range(wanted, file.bytes)
        try:
            content = await self.read(file, part or range(file.bytes))
        except FileNotFoundError:
            raise missing from None
        if part is None:
            return Response(content, 200, headers)
        headers["Content-Range"] = f"bytes {part.start}-{part.stop - 1}/{file.bytes}"
        return Response(content, 206, headers)


def matches(header: str, tag: str) -> bool:
    """If-None-Match compares weakly (RFC 9110, 13.1.2)."""
    return any(entry.strip().removeprefix("W/") in (tag, "*") for entry in header.split(","))
