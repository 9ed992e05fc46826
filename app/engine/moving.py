"""Requests between two engines, as plain data: what one leaves behind, and how the next goes on with it."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from app.engine.errors import NotResumable
from app.engine.request import Image, Request
from app.engine.verbs import Verbs
from app.types import MovingImage, Resumed

NONE: Mapping[int, bytes] = MappingProxyType({})


def resumed_of(request: Request, images: Sequence[Image], packed: Mapping[int, bytes] = NONE) -> Resumed | None:
    """What another engine goes on with: `images` are unfinished, and `packed` has the slots of some by number.

    None: nothing was made of the request.
    """
    slots = {image.number: packed.get(image.number, image.moving) for image in images}
    if not request.pixels and not any(slots.values()):
        return None
    return Resumed(
        tuple(
            MovingImage(image.number, image.steps_left, tuple(image.previews_due), slots[image.number])
            for image in images
        ),
        tuple((number, pixels.tobytes()) for number, pixels in request.pixels.items()),
        request.previews,
        request.truncated,
        request.stepped - request.since if request.stepped < math.inf else None,
        request.device_s,
    )


def resume(request: Request, resumed: Resumed, pipeline: Verbs) -> None:
    """Has a new request go on with what another engine made of it. Raises NotResumable for what does not fit."""
    width, height = request.size
    request.images = []
    for moving in resumed.images:
        image = Image(
            request, moving.number, moving.steps_left, previews_due=[*moving.previews_due], moving=moving.slot
        )
        if not 0 < image.steps_left <= len(request.table):
            raise NotResumable(f"steps_left must be 1 to {len(request.table)}, got {image.steps_left}")
        if image.moving:
            try:
                image.unpacked = pipeline.unpacked(request.size, image.moving)
            except ValueError as error:
                raise NotResumable(str(error)) from error
        request.images.append(image)
    for number, pixels in resumed.pixels:
        request.pixels[number] = np.frombuffer(pixels, np.uint8).reshape(height, width, 3)
    request.previews, request.truncated, request.device_s = resumed.previews, resumed.truncated, resumed.device_s
    if resumed.queue_s is not None:
        request.stepped = request.since + resumed.queue_s
