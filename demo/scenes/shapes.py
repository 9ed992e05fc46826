"""The kinds of things that a scene can hold, each as a list of polygons. Knows nothing of colours or scenes."""

from collections.abc import Callable
from functools import cache

import numpy as np

from demo.scenes.polygons import Part, box, detail, oval, part, rounded, star_points, stroke


def circle() -> list[Part]:
    shine = stroke(oval(0.5, 0.5, 0.34, 0.34, 190, 260, 16), 0.075)
    return [part(oval(0.5, 0.5, 0.5, 0.5)), detail(shine, "light")]


def square() -> list[Part]:
    return [part(box(0, 0, 1, 1, 0.12)), detail(box(0.14, 0.14, 0.5, 0.215, 0.035), "light")]


def triangle() -> list[Part]:
    shine = stroke([(0.22, 0.76), (0.42, 0.36)], 0.075)
    return [part(rounded([(0.5, -0.04), (1.06, 0.96), (-0.06, 0.96)], 0.13)), detail(shine, "light")]


def star() -> list[Part]:
    return [
        part(rounded(star_points(5, 0.25, 0.55), 0.06)),
        detail(rounded(star_points(5, 0.11, 0.24), 0.03), "light"),
    ]


def heart() -> list[Part]:
    body = rounded([(0.434, 0.202), (0.0, 0.64), (-0.434, 0.202), (0.0, -0.14)], 0.05)  # tangent to both lobes
    shine = stroke(oval(-0.24, 0.0, 0.165, 0.165, 180, 270, 14), 0.07)
    return [
        part(oval(-0.24, 0.0, 0.28, 0.28)),
        part(oval(0.24, 0.0, 0.28, 0.28)),
        part(body),
        detail(shine, "light"),
    ]


def house() -> list[Part]:
    return [
        part(box(0.68, 0.04, 0.82, 0.36), "shade"),
        part(box(0.1, 0.36, 0.9, 1.0, 0.03)),
        part(rounded([(0.5, -0.03), (1.03, 0.42), (-0.03, 0.42)], 0.06), "shade"),
        detail(np.concatenate([oval(0.33, 0.66, 0.105, 0.105, 180, 360, 16), [(0.435, 1.0), (0.225, 1.0)]]), "cream"),
        detail(box(0.56, 0.56, 0.77, 0.77, 0.03), "cream"),
    ]


def tree() -> list[Part]:
    return [
        part(box(0.42, 0.6, 0.58, 1.0), "brown"),
        part(oval(0.28, 0.46, 0.25, 0.24)),
        part(oval(0.72, 0.46, 0.25, 0.24)),
        part(oval(0.5, 0.27, 0.29, 0.27)),
        part(oval(0.5, 0.53, 0.26, 0.21)),
        detail(stroke(oval(0.46, 0.3, 0.2, 0.19, 185, 260, 14), 0.065), "light"),
    ]


def boat() -> list[Part]:
    return [
        part(box(0.475, 0.0, 0.525, 0.7), "brown"),
        part(rounded([(0.54, 0.05), (0.95, 0.58), (0.54, 0.58)], 0.04), "cream"),
        part(rounded([(0.46, 0.14), (0.46, 0.58), (0.1, 0.58)], 0.04)),
        part(rounded([(0.0, 0.66), (1.0, 0.66), (0.83, 0.98), (0.17, 0.98)], 0.08)),
        detail(stroke([(0.13, 0.78), (0.87, 0.78)], 0.05), "light"),
    ]


def fish() -> list[Part]:
    return [
        part(rounded([(0.66, 0.5), (1.02, 0.22), (0.94, 0.5), (1.02, 0.78)], 0.07)),
        part(rounded([(0.32, 0.28), (0.48, 0.1), (0.66, 0.14), (0.62, 0.34)], 0.06), "shade"),
        part(oval(0.4, 0.5, 0.4, 0.27)),
        detail(stroke(oval(0.2, 0.5, 0.16, 0.2, -55, 55, 14), 0.04), "shade"),
        detail(rounded([(0.46, 0.52), (0.66, 0.46), (0.64, 0.64)], 0.06), "shade"),
        detail(oval(0.18, 0.43, 0.075, 0.075, count=24), "cream"),
        detail(oval(0.165, 0.43, 0.038, 0.038, count=16), "dark"),
    ]


def flower() -> list[Part]:
    turn = np.radians(np.arange(6) * 60 + 30)
    petals = [part(oval(0.22 * np.cos(a), 0.22 * np.sin(a), 0.15, 0.15, count=32)) for a in turn]
    return [
        part(box(-0.03, 0.1, 0.03, 0.64), "leaf"),
        part(rounded([(0.0, 0.6), (0.08, 0.42), (0.3, 0.37), (0.22, 0.56)], 0.1), "leaf"),
        part(rounded([(0.0, 0.62), (-0.08, 0.45), (-0.3, 0.42), (-0.22, 0.6)], 0.1), "leaf"),
        *petals,
        detail(oval(0, 0, 0.17, 0.17), "main"),
        detail(oval(0, 0, 0.115, 0.115, count=32), "cream"),
    ]


def sun() -> list[Part]:
    return [  # short, blunt rays: thin ones are lost in 16x16 latents
        part(rounded(star_points(12, 0.4, 0.54), 0.05)),
        detail(oval(0, 0, 0.24, 0.24), "light"),
    ]


def moon() -> list[Part]:
    outer = oval(0, 0, 0.5, 0.5, 48, 312, 64)
    inner = oval(0.334, 0, 0.3715, 0.3715, 270, 90, 48)
    inner[0], inner[-1] = outer[-1], outer[0]
    return [
        part(np.concatenate([outer, inner[1:-1]])),
        detail(oval(-0.31, -0.1, 0.075, 0.075, count=24), "shade"),
        detail(oval(-0.2, 0.24, 0.06, 0.06, count=24), "shade"),
    ]


def car() -> list[Part]:
    return [
        part(rounded([(0.2, 0.42), (0.32, 0.14), (0.68, 0.14), (0.82, 0.42), (0.82, 0.5), (0.2, 0.5)], 0.07)),
        part(rounded([(0.0, 0.4), (0.9, 0.4), (1.0, 0.5), (1.0, 0.72), (0.0, 0.72)], 0.08)),
        detail(rounded([(0.29, 0.42), (0.37, 0.215), (0.48, 0.215), (0.48, 0.42)], 0.03), "cream"),
        detail(rounded([(0.545, 0.42), (0.545, 0.215), (0.645, 0.215), (0.735, 0.42)], 0.03), "cream"),
        part(oval(0.24, 0.72, 0.125, 0.125, count=32), "tyre"),
        part(oval(0.76, 0.72, 0.125, 0.125, count=32), "tyre"),
        detail(oval(0.24, 0.72, 0.055, 0.055, count=20), "cream"),
        detail(oval(0.76, 0.72, 0.055, 0.055, count=20), "cream"),
    ]


def balloon() -> list[Part]:
    t = np.linspace(0, 1, 20)
    string = np.stack([0.32 + 0.04 * np.sin(t * 2 * np.pi), 0.74 + 0.19 * t], 1)
    return [
        detail(stroke(string, 0.03), "string"),
        part(rounded([(0.32, 0.62), (0.42, 0.77), (0.22, 0.77)], 0.03), "shade"),
        part(oval(0.32, 0.345, 0.32, 0.345)),
        detail(stroke(oval(0.31, 0.33, 0.2, 0.21, 190, 255, 14), 0.065), "light"),
    ]


def mushroom() -> list[Part]:
    cap = np.concatenate([oval(0.5, 0.5, 0.5, 0.48, 180, 360, 40), oval(0.5, 0.52, 0.5, 0.1, 0, 180, 24)])
    return [
        part(rounded([(0.39, 0.5), (0.61, 0.5), (0.67, 0.94), (0.33, 0.94)], 0.09), "cream"),
        part(cap),
        detail(oval(0.5, 0.22, 0.105, 0.095, count=24), "cream"),
        detail(oval(0.23, 0.4, 0.08, 0.075, count=24), "cream"),
        detail(oval(0.77, 0.4, 0.08, 0.075, count=24), "cream"),
    ]


def umbrella() -> list[Part]:
    hook = np.concatenate([[(0.5, 0.1), (0.5, 0.5)], oval(0.6, 0.86, 0.1, 0.11, 180, 0, 16)])
    scallops = [oval(x, 0.5, 0.125, 0.075, 0, -180, 12) for x in (0.875, 0.625, 0.375, 0.125)]
    canopy = np.concatenate([oval(0.5, 0.5, 0.5, 0.44, 180, 360, 40), *scallops])
    panel = np.concatenate(
        [oval(0.5, 0.5, 0.25, 0.4, 180, 360, 24), oval(0.625, 0.5, 0.125, 0.075, 0, -180, 12), scallops[2]]
    )
    return [
        part(stroke(hook, 0.05), "brown"),
        part(box(0.475, 0.0, 0.525, 0.1), "brown"),
        part(canopy),
        detail(panel, "shade"),
    ]


KINDS: dict[str, Callable[[], list[Part]]] = {
    "circle": circle,
    "square": square,
    "triangle": triangle,
    "star": star,
    "heart": heart,
    "house": house,
    "tree": tree,
    "boat": boat,
    "fish": fish,
    "flower": flower,
    "sun": sun,
    "moon": moon,
    "car": car,
    "balloon": balloon,
    "mushroom": mushroom,
    "umbrella": umbrella,
}


@cache
def sprite(kind: str) -> tuple[Part, ...]:
    """The parts of a thing, centred on the origin; the longer side of their bounding box is 1."""
    parts = KINDS[kind]()
    points = np.concatenate([part.points for part in parts])
    low, high = points.min(0), points.max(0)
    middle, side = (low + high) / 2, (high - low).max()
    return tuple(Part((part.points - middle) / side, part.outwards, part.role, part.outlined) for part in parts)


@cache
def extent(kind: str) -> tuple[float, float]:
    """Width and height of a thing, of which the longer is 1."""
    width, height = np.ptp(np.concatenate([part.points for part in sprite(kind)]), axis=0)
    return float(width), float(height)
