"""Streams progress, previews and images as server-sent events in the shape of OpenAI's API, whose client can read them.

Knows nothing of Ray: it gets a function that returns the next item and one that stops the work.
"""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import asdict

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from app.api.errors import ApiError
from app.api.messages import ImageRequest, Images, Preview, Progress

KEEP_ALIVE_S = 10.0  # proxies close a silent connection, commonly after 60 s
KEEP_ALIVE = b": still at work\n\n"  # a comment, which clients skip
# OpenAI's event must have it; this service does not count tokens.
USAGE = {
    **{"input_tokens": 0, "output_tokens": 0, "total_tokens": 0},
    "input_tokens_details": {"text_tokens": 0, "image_tokens": 0},
}

NextItem = Callable[[], Awaitable[Progress | Preview | Images]]


class EventStream(StreamingResponse):
    """Stops the work when the client disconnects."""

    def __init__(self, next_item: NextItem, stop: Callable[[], None], request: ImageRequest, model: str) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # nginx would buffer the events
        super().__init__(events(next_item, request, model), headers=headers, media_type="text/event-stream")
        self.stop = stop

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.stop()


async def events(next_item: NextItem, request: ImageRequest, model: str) -> AsyncIterator[bytes]:
    """One event for each item. The last one is the finished image or an error."""
    item: Progress | Preview | Images | None = None
    while not isinstance(item, Images):
        task = asyncio.ensure_future(next_item())
        try:
            while not (await asyncio.wait({task}, timeout=KEEP_ALIVE_S))[0]:
                yield KEEP_ALIVE
            item = task.result()
        except ApiError as error:
            yield event("error", error.body())
            return
        finally:
            task.cancel()
        yield progress_event(item) if isinstance(item, Progress) else image_event(item, request, model)


def progress_event(progress: Progress) -> bytes:
    """OpenAI's API has no such event, so only a request that asks for it gets it."""
    return event("image_generation.progress", asdict(progress) | {"left_s": round(progress.left_s, 3)})


def image_event(item: Preview | Images, request: ImageRequest, model: str) -> bytes:
    shape = {
        "created_at": int(time.time()),
        "size": f"{request.generation.width}x{request.generation.height}",
        "quality": "auto",
        "background": "opaque",
        "output_format": request.encoding.output_format,
    }
    kind = "image_generation" if request.generation.edit is None else "image_edit"
    if isinstance(item, Preview):
        return event(
            f"{kind}.partial_image",
            {"b64_json": base64.b64encode(item.encoded).decode(), **shape, "partial_image_index": item.index},
        )
    extra = {"model": item.model or model, **request.facts, **item.facts, "timings": item.timings}
    return event(
        f"{kind}.completed",
        {"b64_json": base64.b64encode(item.encoded[0]).decode(), **shape, "usage": USAGE, **extra},
    )


def event(kind: str, data: Mapping[str, object]) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n".encode()
