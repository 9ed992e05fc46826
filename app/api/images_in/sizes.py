"""Chooses a declared size for a picture, and says what becomes of the picture in it. Knows nothing of files."""

import math
from collections.abc import Sequence

from app.types import Size, parse_size


def nearest_size(picture: Size, sizes: Sequence[str]) -> str:
    """The declared size of the nearest aspect ratio; of several, the one of the nearest area."""

    def distance(declared: str) -> tuple[float, float]:
        width, height = parse_size(declared)
        ratio = math.log(width / height) - math.log(picture[0] / picture[1])
        return round(abs(ratio), 6), abs(math.log(width * height) - math.log(picture[0] * picture[1]))

    return min(sizes, key=distance)


def fit(picture: Size, size: Size) -> str:
    """What `decode.pixels_of` does to a picture, in words for the client."""
    scale = max(size[0] / picture[0], size[1] / picture[1])
    scaled = round(picture[0] * scale), round(picture[1] * scale)
    steps = [f"scaled to {scaled[0]}x{scaled[1]}"] if scaled != picture else []
    steps += [f"cropped to the middle {size[0]}x{size[1]}"] if scaled != size else []
    return ", ".join(steps) or "as it is"
