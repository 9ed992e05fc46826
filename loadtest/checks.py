"""Checks whether an answer has the requested pictures. Runs in threads, and knows nothing of connections."""

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]  # [H, W, 3]

BLANK_LEVELS = 4  # a picture is blank if the levels of each colour span no more than this
LOSSY_TOLERANCE = 16  # levels; JPEG and WebP can turn a difference of 1 into this
NOT_IN_THE_PIXELS = {  # fields with which equal requests still get equal pictures
    "async",
    "output_compression",
    "partial_images",
    "progress",
    "response_format",
    "safety_identifier",
    "stream",
    "timeout",
    "user",
    "webhook_url",
}


class BadPicture(Exception):
    """The picture is wrong; the message goes to the record."""


def files_of(answer: Mapping[str, Any]) -> list[bytes]:
    """The picture files in an answer of POST /v1/images/generations, or in the last event of its stream."""
    try:
        data = answer["data"] if "data" in answer else [answer]
        return [base64.b64decode(image["b64_json"], validate=True) for image in data]
    except (KeyError, TypeError, ValueError) as error:
        raise BadPicture(f"the answer holds no b64_json that can be read: {error!r}") from None


def json_of(body: bytes) -> Mapping[str, Any]:
    try:
        answer = json.loads(body)
    except ValueError:
        raise BadPicture(f"the answer is not JSON: {body[:80]!r}") from None
    if not isinstance(answer, dict):
        raise BadPicture(f"the answer is no JSON object: {body[:80]!r}")
    return answer


def examine(file: bytes, size: tuple[int, int] | None) -> Pixels:
    """The pixels of a file. Raises BadPicture if it does not decode, has another size or is blank."""
    try:
        with Image.open(BytesIO(file)) as image:
            pixels = np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow raises many kinds of exception
        raise BadPicture(f"{len(file)} bytes that do not decode as a picture ({type(error).__name__})") from None
    height, width = pixels.shape[:2]
    if size and (width, height) != size:
        raise BadPicture(f"a picture of {width}x{height} where {size[0]}x{size[1]} was asked for")
    darkest, brightest = pixels.min(axis=(0, 1)).astype(int), pixels.max(axis=(0, 1)).astype(int)
    if (brightest - darkest).max() <= BLANK_LEVELS:
        raise BadPicture(f"a blank picture: all of it is {tuple(int(level) for level in pixels[0, 0])}")
    return pixels


def size_of(request: Mapping[str, Any], default: str | None) -> tuple[int, int] | None:
    """The width and height that the request must get; None if neither the request nor the server says."""
    requested = request.get("size")
    width, x, height = str(default if requested in (None, "auto") else requested).partition("x")
    return (int(width), int(height)) if x and width.isdigit() and height.isdigit() else None


def digest(files: Iterable[bytes]) -> str:
    """A short hash of the files, which identifies them in the record."""
    whole = hashlib.sha256()
    for file in files:
        whole.update(file)
    return whole.hexdigest()[:16]


def identity(request: Mapping[str, Any]) -> str | None:
    """A key that is equal for requests that must get equal pictures; None for a request without a seed."""
    if request.get("seed") is None:
        return None
    return json.dumps({name: request[name] for name in request.keys() - NOT_IN_THE_PIXELS}, sort_keys=True)


@dataclass
class EqualSeeds:
    """Compares the pictures of repeated requests. It keeps the first ones until the last repetition."""

    tolerance: int
    to_come: Counter[str]
    first: dict[str, list[Pixels]] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)

    @classmethod
    def of(cls, requests: Iterable[Mapping[str, Any]], tolerance: int) -> "EqualSeeds":
        counts = Counter(key for request in requests if (key := identity(request)) is not None)
        return cls(tolerance, Counter({key: count for key, count in counts.items() if count > 1}))

    def compare(self, request: Mapping[str, Any], pictures: list[Pixels]) -> bool:
        """Whether the pictures were compared with earlier ones. Raises BadPicture if they differ."""
        key = identity(request)
        with self.lock:
            if key is None or key not in self.to_come:
                return False
            self.to_come[key] -= 1
            first = self.first.setdefault(key, pictures)
            if not self.to_come[key]:
                del self.to_come[key], self.first[key]
        if first is pictures:
            return False
        lossy = request.get("output_format", "png") != "png"
        allowed = max(self.tolerance, LOSSY_TOLERANCE if lossy else 0)
        for earlier, picture in zip(first, pictures, strict=True):
            if earlier.shape != picture.shape:
                raise BadPicture("the same request and seed got a picture of another size before")
            levels = int(np.abs(earlier.astype(int) - picture.astype(int)).max())
            if levels > allowed:
                raise BadPicture(
                    f"the same request and seed got another picture before: up to {levels} grey levels apart, "
                    f"{allowed} are allowed"
                )
        return True
