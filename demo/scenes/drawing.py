"""Paints a scene. Knows nothing of captions or of judging."""

from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from demo.scenes.colours import Rgb, palette
from demo.scenes.scene import BACKGROUNDS, Scene, Thing
from demo.scenes.shapes import sprite

Pixels = NDArray[np.uint8]

SUPERSAMPLING = 4  # pixels are averaged down by so much
OUTLINE = 0.012  # width as a fraction of the picture: 1.5 pixels of 128


def draw(scene: Scene, pixels: int = 128) -> Pixels:
    """Paints a scene. Returns [pixels, pixels, 3]."""
    side = pixels * SUPERSAMPLING
    canvas = backdrop(scene.background, side).copy()
    pen = ImageDraw.Draw(canvas)
    for thing in scene.things:
        draw_thing(pen, thing, side)
    return np.array(canvas.reduce(SUPERSAMPLING))


def draw_thing(pen: ImageDraw.ImageDraw, thing: Thing, side: int) -> None:
    colours = palette(thing.colour)
    scale, centre = thing.size * side, np.array([thing.x, thing.y]) * side
    parts = sprite(thing.kind)
    for part in parts:
        if part.outlined:
            outer = part.points * scale + centre + part.outwards * (OUTLINE * side)
            pen.polygon(outer.ravel().tolist(), colours["outline"])
    for part in parts:
        pen.polygon((part.points * scale + centre).ravel().tolist(), colours[part.role])


@cache
def backdrop(background: str, side: int) -> Image.Image:
    match background:
        case "white":
            return Image.new("RGB", (side, side), (252, 252, 250))
        case "grey":
            return Image.new("RGB", (side, side), (152, 156, 164))
        case "black":
            return Image.new("RGB", (side, side), (18, 18, 20))
        case "cream":
            return Image.new("RGB", (side, side), (250, 232, 196))
        case "day":
            picture = gradient(side, [(164, 212, 246), (226, 242, 252)])
            clouds = [(0.16, 0.17, 0.13, 0.045), (0.13, 0.14, 0.07, 0.06), (0.2, 0.15, 0.05, 0.045)]
            clouds += [(0.86, 0.27, 0.11, 0.04), (0.88, 0.245, 0.055, 0.05)]
            ovals(picture, (255, 255, 255), clouds)
            ovals(picture, (202, 228, 178), [(0.85, 1.0, 0.75, 0.31)])
            ovals(picture, (184, 216, 158), [(0.2, 1.08, 0.9, 0.34)])
        case "dusk":
            picture = gradient(side, [(86, 76, 122), (178, 128, 150), (248, 196, 156)], 0.8)
            ovals(picture, (76, 62, 84), [(0.8, 1.02, 0.7, 0.27)])
            ovals(picture, (58, 48, 68), [(0.2, 1.1, 0.9, 0.34)])
        case "night":
            picture = gradient(side, [(12, 16, 42), (44, 54, 98)], 0.85)
            stars = [(0.1, 0.12), (0.34, 0.06), (0.62, 0.13), (0.9, 0.07), (0.06, 0.44), (0.94, 0.38), (0.2, 0.29)]
            ovals(picture, (250, 240, 200), [(x, y, 0.011, 0.011) for x, y in stars])
            ovals(picture, (24, 34, 58), [(0.85, 1.02, 0.75, 0.27)])
            ovals(picture, (18, 26, 46), [(0.15, 1.1, 0.9, 0.34)])
        case "snow":
            picture = gradient(side, [(150, 168, 192), (206, 216, 228)], 0.8)
            flakes = [(0.08, 0.1), (0.3, 0.16), (0.56, 0.07), (0.82, 0.15), (0.95, 0.42), (0.05, 0.4), (0.16, 0.6)]
            ovals(picture, (255, 255, 255), [(x, y, 0.017, 0.017) for x, y in flakes])
            ovals(picture, (232, 238, 246), [(0.8, 1.02, 0.75, 0.29)])
            ovals(picture, (250, 252, 255), [(0.2, 1.1, 0.9, 0.36)])
        case _:
            raise ValueError(f"background must be one of {', '.join(BACKGROUNDS)}, got {background!r}.")
    return picture


def gradient(side: int, colours: list[Rgb], end: float = 1.0) -> Image.Image:
    """A vertical gradient: the first colour at the top, the last at `end` of the height."""
    heights = np.linspace(0, 1, side)
    stops = np.linspace(0, end, len(colours))
    column = np.stack([np.interp(heights, stops, [colour[i] for colour in colours]) for i in range(3)], 1)
    return Image.fromarray(np.repeat(column.round().astype(np.uint8)[:, None], side, 1))


def ovals(picture: Image.Image, colour: Rgb, ovals: list[tuple[float, float, float, float]]) -> None:
    pen, side = ImageDraw.Draw(picture), picture.width
    for x, y, rx, ry in ovals:
        pen.ellipse([(x - rx) * side, (y - ry) * side, (x + rx) * side, (y + ry) * side], fill=colour)
