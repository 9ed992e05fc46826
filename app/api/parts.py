"""A request of several images as several requests of fewer, which replicas make side by side. Knows nothing of HTTP.

An image is the same alone and beside others, so only the time differs.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from app.api.journey import Journey, Send
from app.api.messages import ImageRequest, Images
from app.ray_internals.serve import begin_own_request

COUNTED = ("moves", "restarts")


def parts_of(request: ImageRequest, images: int) -> list[ImageRequest]:
    """Requests for at most `images` images each. The last one, which tends to end last, counts in the statistics."""
    whole = request.generation
    if images >= whole.n:
        return [request]
    *others, last = whole.parts(images)
    parts = [replace(request, generation=other, siblings=whole.n - other.n, counted=False) for other in others]
    return [*parts, replace(request, generation=last, siblings=whole.n - last.n)]


async def answer_of_parts(parts: Sequence[ImageRequest], send: Send) -> Images:
    """The images of all parts. Raises the ApiError of the first part that fails, and ends the others."""
    if len(parts) == 1:
        return await Journey(parts[0]).answer(send)

    async def one_part(part: ImageRequest) -> Images:
        begin_own_request()
        return await Journey(part).answer(send)

    tasks = [asyncio.ensure_future(one_part(part)) for part in parts]
    try:
        return joined(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


def joined(answers: Sequence[Images]) -> Images:
    """One answer with the timings of the part that took longest, and the device-seconds of all."""
    first, longest = answers[0], max(answers, key=seconds)
    counts = {name: sum(int(images.facts.get(name, 0)) for images in answers) for name in COUNTED}
    device_s = sum(images.timings.get("device_s", 0.0) for images in answers)
    return replace(
        first,
        encoded=tuple(file for images in answers for file in images.encoded),
        seeds=tuple(seed for images in answers for seed in images.seeds),
        facts={**first.facts, **{name: count for name, count in counts.items() if count}},
        timings={**longest.timings, "device_s": device_s},
    )


def seconds(images: Images) -> float:
    return sum(seconds for name, seconds in images.timings.items() if name != "device_s")
