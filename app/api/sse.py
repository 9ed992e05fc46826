"""A replica's stream as server-sent events in OpenAI's image-streaming shape, which its own client reads.

Knows nothing of Ray: it is given a way to the next item and one to stop the work.
"""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from app.api.errors import ApiError
from app.api.messages import ImageRequest, Images, Preview

KEEP_ALIVE_S = 10.0  # proxies cut a connection on which nothing comes, commonly after 60 s
KEEP_ALIVE = b": still at work\n\n"  # a comment, which clients skip
# OpenAI's event demands it; here nothing is metered.
USAGE = {
    **{"input_tokens": 0, "output_tokens": 0, "total_tokens": 0},
    "input_tokens_details": {"text_tokens": 0, "image_tokens": 0},
}

NextItem = Callable[[], Awaitable[Preview | Images]]


class EventStream(StreamingResponse):
    """Whoever stops listening stops the work."""

    def __init__(self, next_item: NextItem, stop: Callable[[], None], asked: ImageRequest, model: str) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # nginx would hold events back
        super().__init__(events(next_item, asked, model), headers=headers, media_type="text/event-stream")
        self.stop = stop

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.stop()


async def events(next_item: NextItem, asked: ImageRequest, model: str) -> AsyncIterator[bytes]:
    """One event for each item, up to the finished image or an error."""
    item: Preview | Images | None = None
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
        yield image_event(item, asked, model)


def image_event(item: Preview | Images, asked: ImageRequest, model: str) -> bytes:
    shape = {
        "created_at": int(time.time()),
        "size": f"{asked.generation.width}x{asked.generation.height}",
        "quality": "auto",
        "background": "opaque",
        "output_format": asked.encoding.output_format,
    }
    if isinstance(item, Preview):
        return event(
            "image_generation.partial_image",
            {"b64_json": base64.b64encode(item.encoded).decode(), **shape, "partial_image_index": item.index},
        )
    ours = {"model": item.model or model, **item.facts, "timings": item.timings}
    return event(
        "image_generation.completed",
        {"b64_json": base64.b64encode(item.encoded[0]).decode(), **shape, "usage": USAGE, **ours},
    )


def event(kind: str, data: Mapping[str, object]) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n".encode()
