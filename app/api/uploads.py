"""Bounds what requests with images may cost at once: bodies in memory, and images that are being decoded.

The body of POST /v1/images/edits is read here. It never reaches a disk, so no name of the client's does either.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import ParamSpec, TypeVar

from starlette.requests import Request

from app.api.edits import EditBody, read_edit
from app.api.errors import ApiError
from app.api.images_in.fetch import fetch_image
from app.api.request_body import check_form_or_json, read_body
from app.api.settings import Limits

P = ParamSpec("P")
T = TypeVar("T")

BYTES = 256 << 20  # of all bodies together
DECODED_AT_ONCE = 2  # images; each takes up to eight bytes a pixel
READING_S = 60.0  # for a body to arrive
FULL_RETRY_S = 2.0


class Uploads:
    """A body that waits for a place is not read from its connection meanwhile."""

    def __init__(self, limits: Limits, image_hosts: Sequence[str] = ()) -> None:
        self.limits = limits
        self.image_hosts = image_hosts
        self.places = asyncio.Semaphore(max(1, BYTES // limits.upload_bytes))
        self.threads = ThreadPoolExecutor(DECODED_AT_ONCE, thread_name_prefix="decode")

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[EditBody]:
        """The body. Its bytes count as held until the block ends. Raises ApiError or InvalidField."""
        check_form_or_json(request)
        try:
            async with asyncio.timeout(self.limits.timeout_s):
                await self.places.acquire()
        except TimeoutError:
            message = "Too many images are being read; try again."
            raise ApiError(503, message, None, "queue_full", FULL_RETRY_S) from None
        try:
            limit_s = min(self.limits.timeout_s, READING_S)
            body = await read_body(request, self.limits.upload_bytes, limit_s)
            edit = await self.in_thread(read_edit, body, request.headers["content-type"])
            yield await self.fetched(edit)
        finally:
            self.places.release()

    async def fetched(self, body: EditBody) -> EditBody:
        """With what its URLs hold, one after another, and all together no more than a body may hold."""
        left, sources = self.limits.upload_bytes, []
        for source in (*body.images, *([body.mask] if body.mask else [])):
            if isinstance(source.content, str):
                content = await fetch_image(source.field, source.content, self.image_hosts, left)
                left -= len(content)
                source = source._replace(content=content)
            sources.append(source)
        images = (*sources[: len(body.images)],)
        return replace(body, images=images, mask=sources[-1] if body.mask else None)

    async def in_thread(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.threads, partial(function, *args, **kwargs))
