"""Small flat-style scenes: what the demo model learns to draw. Knows nothing of models, training or JAX.

`sample_scene` invents a scene, `draw` paints it, `caption` says it in words of `vocabulary`, and `check` judges whether
any picture, generated ones above all, shows a scene. What a picture shows is decided by `look`, which is not told what
to expect.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Floats = NDArray[np.float64]
Pixels = NDArray[np.uint8]
Rgb = tuple[int, int, int]
Split = Literal["train", "held_out"]

COLOURS: dict[str, Rgb] = {
    "red": (222, 40, 48),
    "orange": (252, 138, 16),
    "yellow": (255, 216, 40),
    "green": (46, 164, 70),
    "teal": (24, 196, 196),
    "blue": (40, 106, 232),
    "purple": (138, 64, 200),
    "pink": (252, 132, 190),
}
# What each colour deepens towards, for shade and outline; mixing with grey would turn yellow to olive.
DEEP: dict[str, Rgb] = {
    "red": (104, 0, 40),
    "orange": (150, 48, 0),
    "yellow": (168, 96, 0),
    "green": (0, 64, 60),
    "teal": (0, 74, 110),
    "blue": (16, 16, 112),
    "purple": (46, 8, 96),
    "pink": (176, 24, 104),
}
CREAM: Rgb = (255, 244, 220)
DARK: Rgb = (44, 38, 52)
TYRE: Rgb = (72, 66, 82)
BROWN: Rgb = (140, 92, 60)
LEAF: Rgb = (104, 158, 84)

# Each background and how captions say it; the plain ones also have a short form, "white background".
BACKGROUNDS: dict[str, str] = {
    "white": "on a white background",
    "grey": "on a grey background",
    "black": "on a black background",
    "cream": "on a cream background",
    "day": "by day",
    "dusk": "at dusk",
    "night": "at night",
    "snow": "in the snow",
}
PLACES: dict[str, str] = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
}
SIZES: dict[str, tuple[str, ...]] = {"small": ("small", "little"), "big": ("big", "large")}
RELATIONS: dict[str, tuple[str, ...]] = {
    "above": ("above", "over"),
    "below": ("below", "under"),
    "left": ("to the left of",),
    "right": ("to the right of",),
    "beside": ("next to", "beside"),  # on either side
}
INVERSE = {"above": "below", "below": "above", "left": "right", "right": "left", "beside": "beside"}

# The middle of a lone thing's size, how far the size strays from it, and how far the thing from the picture's centre.
_MEASURES = {"small": (0.345, 0.02, 0.10), None: (0.5, 0.03, 0.06), "big": (0.7, 0.03, 0.03)}

SUPERSAMPLING = 4
OUTLINE = 0.012  # of the picture: 1.5 pixels of 128


@dataclass(frozen=True)
class Thing:
    """One object; its centre and its longer side are fractions of the picture."""

    kind: str
    colour: str
    x: float
    y: float
    size: float


@dataclass(frozen=True)
class Scene:
    """One thing (`place` and `size_word` where its caption says them), or two and the `relation` of first to other."""

    background: str
    things: tuple[Thing, ...]
    relation: str | None = None
    place: str | None = None
    size_word: str | None = None


def draw(scene: Scene, pixels: int = 128) -> Pixels:
    """The picture of a scene, [pixels, pixels, 3]."""
    side = pixels * SUPERSAMPLING
    canvas = _backdrop(scene.background, side).copy()
    pen = ImageDraw.Draw(canvas)
    for thing in scene.things:
        _draw_thing(pen, thing, side)
    return np.array(canvas.reduce(SUPERSAMPLING))


def sample_scene(rng: np.random.Generator, split: Split = "train", objects: int | None = None) -> Scene:
    """A random scene of one split; `objects` is 1, 2 or None for a mix (four in ten have one).

    A training scene holds no held-out (thing, colour, background), and no held-out pair of coloured things.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"split must be train or held_out, got {split!r}.")
    if objects not in (1, 2, None):
        raise ValueError(f"objects must be 1, 2 or None, got {objects!r}.")
    if objects is None:
        objects = 1 if rng.random() < 0.4 else 2
    while True:
        scene = _sample_one(rng) if objects == 1 else _sample_two(rng)
        triple = any(held_out_triple(thing.kind, thing.colour, scene.background) for thing in scene.things)
        pair = objects == 2 and held_out_pair(*((thing.kind, thing.colour) for thing in scene.things))
        if split == "train" and not triple and not pair:
            return scene
        if split == "held_out" and (triple if objects == 1 else pair):
            return scene


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One of several ways to say it; colour, thing and background always, size and place where the scene has them."""
    style = rng.choice(["plain", "plain", "first", "bare", "picture"])
    articles = style != "bare"
    if scene.relation is None:
        said = _noun(scene.things[0], scene.size_word, articles, rng)
        if scene.place is not None:
            said += f" {PLACES[scene.place]}"
    else:
        (one, other), relation = scene.things, scene.relation
        if rng.random() < 0.5:
            one, other, relation = other, one, INVERSE[relation]
        word = str(rng.choice(RELATIONS[relation]))
        said = f"{_noun(one, None, articles, rng)} {word} {_noun(other, None, articles, rng)}"

    background = BACKGROUNDS[scene.background]
    if scene.background == "grey" and rng.random() < 0.3:
        background = background.replace("grey", "gray")
    if style == "first":
        return f"{background}, {said}"
    if style == "bare":
        return f"{said}, {background.removeprefix('on a ')}"
    comma = "," if scene.place is not None else ""
    return f"{'a picture of ' if style == 'picture' else ''}{said}{comma} {background}"


def vocabulary() -> tuple[str, ...]:
    """Every word that a caption can hold, sorted; the comma, which follows a word without a space, counts as one."""
    phrases = ["a", "an", "a picture of", ",", "gray", *KINDS, *COLOURS, *BACKGROUNDS.values(), *PLACES.values()]
    phrases += [word for words in (*SIZES.values(), *RELATIONS.values()) for word in words]
    return tuple(sorted({word for phrase in phrases for word in phrase.split()}))


@cache
def held_out_triple(kind: str, colour: str, background: str) -> bool:
    """Whether training never shows this thing in this colour on this background: about one in ten."""
    return _tenth(f"{colour} {kind} {background}")


@cache
def held_out_pair(one: tuple[str, str], other: tuple[str, str]) -> bool:
    """Whether training never shows these two (thing, colour) together, in either order: about one in ten."""
    return _tenth(" and ".join(" ".join(thing) for thing in sorted((one, other))))


def _tenth(text: str) -> bool:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 10 == 0


def _sample_one(rng: np.random.Generator) -> Scene:
    size_word = str(rng.choice(["", "", "small", "big"])) or None
    place = None if size_word == "big" or rng.random() < 0.5 else str(rng.choice(list(PLACES)))
    middle, spread, wander = _MEASURES[size_word]
    size = middle + rng.uniform(-spread, spread)
    x, y = 0.5 + rng.uniform(-wander, wander, 2)
    edge = size / 2 + 0.045 + rng.uniform(-0.02, 0.02)  # where the centre is when the thing is near an edge
    if place in ("left", "right"):
        x = edge if place == "left" else 1 - edge
    elif place in ("top", "bottom"):
        y = edge if place == "top" else 1 - edge
    thing = Thing(_pick(rng, KINDS), _pick(rng, COLOURS), float(x), float(y), float(size))
    return Scene(_pick(rng, BACKGROUNDS), (thing,), place=place, size_word=size_word)


def _sample_two(rng: np.random.Generator) -> Scene:
    relation = _pick(rng, RELATIONS)
    upright = relation in ("above", "below")
    near, far = 0.25 + rng.uniform(-0.01, 0.01), 0.75 + rng.uniform(-0.01, 0.01)
    if relation in ("below", "right") or (relation == "beside" and rng.random() < 0.5):
        near, far = far, near
    wander = 0.5 + rng.uniform(-0.08, 0.08, 2)
    while True:
        looks = [(_pick(rng, KINDS), _pick(rng, COLOURS)) for _ in range(2)]
        if looks[0] != looks[1]:
            break
    things = []
    for (kind, colour), along, aside in zip(looks, (near, far), wander, strict=True):
        x, y = (aside, along) if upright else (along, aside)
        things.append(Thing(kind, colour, float(x), float(y), float(rng.uniform(0.37, 0.42))))
    return Scene(_pick(rng, BACKGROUNDS), tuple(things), relation=relation)


def _pick(rng: np.random.Generator, names: Mapping[str, object]) -> str:
    return list(names)[rng.integers(len(names))]


def _noun(thing: Thing, size_word: str | None, article: bool, rng: np.random.Generator) -> str:
    words = [thing.colour, thing.kind]
    if size_word is not None:
        words.insert(0, str(rng.choice(SIZES[size_word])))
    if article:
        words.insert(0, "an" if words[0][0] in "aeiou" else "a")
    return " ".join(words)


@dataclass(frozen=True)
class Part:
    """A filled polygon, in a box of any scale y downwards, and how its corners move for an outline of width one."""

    points: Floats  # [N, 2]
    outwards: Floats  # [N, 2]
    role: str
    outlined: bool


def _part(points: Floats, role: str = "main", outlined: bool = True) -> Part:
    following = np.roll(points, -1, 0)
    if np.sum(points[:, 0] * following[:, 1] - following[:, 0] * points[:, 1]) < 0:
        points = points[::-1]
    points = points[np.any(np.abs(points - np.roll(points, 1, 0)) > 1e-9, axis=1)]
    edges = np.roll(points, -1, 0) - points
    normals = np.stack([edges[:, 1], -edges[:, 0]], 1) / np.linalg.norm(edges, axis=1, keepdims=True)
    before = np.roll(normals, 1, 0)
    miter = (normals + before) / np.maximum(1 + np.sum(normals * before, 1, keepdims=True), 0.35)
    return Part(points, miter, role, outlined)


def _detail(points: Floats, role: str) -> Part:
    return _part(points, role, outlined=False)


def _oval(x: float, y: float, rx: float, ry: float, start: float = 0, end: float = 360, count: int = 48) -> Floats:
    angles = np.radians(np.linspace(start, end, count, endpoint=end - start < 360))
    return np.stack([x + rx * np.cos(angles), y + ry * np.sin(angles)], 1)


def _rounded(corners: list[tuple[float, float]], radius: float) -> Floats:
    """The polygon with every corner replaced by a curve."""
    points = np.array(corners, float)
    curve = []
    for before, corner, after in zip(np.roll(points, 1, 0), points, np.roll(points, -1, 0), strict=True):
        ends = []
        for neighbour in (before, after):
            away = neighbour - corner
            length = float(np.linalg.norm(away))
            ends.append(corner + away * min(radius / length, 0.499))
        for t in np.linspace(0, 1, 7):
            curve.append((1 - t) ** 2 * ends[0] + 2 * t * (1 - t) * corner + t**2 * ends[1])
    return np.array(curve)


def _box(left: float, top: float, right: float, bottom: float, radius: float = 0.0) -> Floats:
    corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
    return _rounded(corners, radius) if radius else np.array(corners)


def _stroke(path: list[tuple[float, float]] | Floats, width: float) -> Floats:
    """A line of some width as a polygon."""
    points = np.asarray(path, float)
    along = np.gradient(points, axis=0)
    side = np.stack([-along[:, 1], along[:, 0]], 1) / np.linalg.norm(along, axis=1, keepdims=True) * width / 2
    return np.concatenate([points + side, (points - side)[::-1]])


def _circle() -> list[Part]:
    shine = _stroke(_oval(0.5, 0.5, 0.34, 0.34, 190, 260, 16), 0.075)
    return [_part(_oval(0.5, 0.5, 0.5, 0.5)), _detail(shine, "light")]


def _square() -> list[Part]:
    return [_part(_box(0, 0, 1, 1, 0.12)), _detail(_box(0.14, 0.14, 0.5, 0.215, 0.035), "light")]


def _triangle() -> list[Part]:
    shine = _stroke([(0.22, 0.76), (0.42, 0.36)], 0.075)
    return [_part(_rounded([(0.5, -0.04), (1.06, 0.96), (-0.06, 0.96)], 0.13)), _detail(shine, "light")]


def _star_points(count: int, inner: float, outer: float) -> list[tuple[float, float]]:
    angles = np.pi * np.arange(2 * count) / count - np.pi / 2
    radii = np.where(np.arange(2 * count) % 2 == 0, outer, inner)
    return [(float(r * np.cos(a)), float(r * np.sin(a))) for r, a in zip(radii, angles, strict=True)]


def _star() -> list[Part]:
    return [
        _part(_rounded(_star_points(5, 0.25, 0.55), 0.06)),
        _detail(_rounded(_star_points(5, 0.11, 0.24), 0.03), "light"),
    ]


def _heart() -> list[Part]:
    body = _rounded([(0.434, 0.202), (0.0, 0.64), (-0.434, 0.202), (0.0, -0.14)], 0.05)  # tangent to both lobes
    shine = _stroke(_oval(-0.24, 0.0, 0.165, 0.165, 180, 270, 14), 0.07)
    return [
        _part(_oval(-0.24, 0.0, 0.28, 0.28)),
        _part(_oval(0.24, 0.0, 0.28, 0.28)),
        _part(body),
        _detail(shine, "light"),
    ]


def _house() -> list[Part]:
    return [
        _part(_box(0.68, 0.04, 0.82, 0.36), "shade"),
        _part(_box(0.1, 0.36, 0.9, 1.0, 0.03)),
        _part(_rounded([(0.5, -0.03), (1.03, 0.42), (-0.03, 0.42)], 0.06), "shade"),
        _detail(np.concatenate([_oval(0.33, 0.66, 0.105, 0.105, 180, 360, 16), [(0.435, 1.0), (0.225, 1.0)]]), "cream"),
        _detail(_box(0.56, 0.56, 0.77, 0.77, 0.03), "cream"),
    ]


def _tree() -> list[Part]:
    return [
        _part(_box(0.42, 0.6, 0.58, 1.0), "brown"),
        _part(_oval(0.28, 0.46, 0.25, 0.24)),
        _part(_oval(0.72, 0.46, 0.25, 0.24)),
        _part(_oval(0.5, 0.27, 0.29, 0.27)),
        _part(_oval(0.5, 0.53, 0.26, 0.21)),
        _detail(_stroke(_oval(0.46, 0.3, 0.2, 0.19, 185, 260, 14), 0.065), "light"),
    ]


def _boat() -> list[Part]:
    return [
        _part(_box(0.475, 0.0, 0.525, 0.7), "brown"),
        _part(_rounded([(0.54, 0.05), (0.95, 0.58), (0.54, 0.58)], 0.04), "cream"),
        _part(_rounded([(0.46, 0.14), (0.46, 0.58), (0.1, 0.58)], 0.04)),
        _part(_rounded([(0.0, 0.66), (1.0, 0.66), (0.83, 0.98), (0.17, 0.98)], 0.08)),
        _detail(_stroke([(0.13, 0.78), (0.87, 0.78)], 0.05), "light"),
    ]


def _fish() -> list[Part]:
    return [
        _part(_rounded([(0.66, 0.5), (1.02, 0.22), (0.94, 0.5), (1.02, 0.78)], 0.07)),
        _part(_rounded([(0.32, 0.28), (0.48, 0.1), (0.66, 0.14), (0.62, 0.34)], 0.06), "shade"),
        _part(_oval(0.4, 0.5, 0.4, 0.27)),
        _detail(_stroke(_oval(0.2, 0.5, 0.16, 0.2, -55, 55, 14), 0.04), "shade"),
        _detail(_rounded([(0.46, 0.52), (0.66, 0.46), (0.64, 0.64)], 0.06), "shade"),
        _detail(_oval(0.18, 0.43, 0.075, 0.075, count=24), "cream"),
        _detail(_oval(0.165, 0.43, 0.038, 0.038, count=16), "dark"),
    ]


def _flower() -> list[Part]:
    turn = np.radians(np.arange(6) * 60 + 30)
    petals = [_part(_oval(0.22 * np.cos(a), 0.22 * np.sin(a), 0.15, 0.15, count=32)) for a in turn]
    return [
        _part(_box(-0.03, 0.1, 0.03, 0.64), "leaf"),
        _part(_rounded([(0.0, 0.6), (0.08, 0.42), (0.3, 0.37), (0.22, 0.56)], 0.1), "leaf"),
        _part(_rounded([(0.0, 0.62), (-0.08, 0.45), (-0.3, 0.42), (-0.22, 0.6)], 0.1), "leaf"),
        *petals,
        _detail(_oval(0, 0, 0.17, 0.17), "main"),
        _detail(_oval(0, 0, 0.115, 0.115, count=32), "cream"),
    ]


def _sun() -> list[Part]:
    return [  # rays that are short and blunt: thin ones are lost in 16x16 latents
        _part(_rounded(_star_points(12, 0.4, 0.54), 0.05)),
        _detail(_oval(0, 0, 0.24, 0.24), "light"),
    ]


def _moon() -> list[Part]:
    outer = _oval(0, 0, 0.5, 0.5, 48, 312, 64)
    inner = _oval(0.334, 0, 0.3715, 0.3715, 270, 90, 48)
    inner[0], inner[-1] = outer[-1], outer[0]
    return [
        _part(np.concatenate([outer, inner[1:-1]])),
        _detail(_oval(-0.31, -0.1, 0.075, 0.075, count=24), "shade"),
        _detail(_oval(-0.2, 0.24, 0.06, 0.06, count=24), "shade"),
    ]


def _car() -> list[Part]:
    return [
        _part(_rounded([(0.2, 0.42), (0.32, 0.14), (0.68, 0.14), (0.82, 0.42), (0.82, 0.5), (0.2, 0.5)], 0.07)),
        _part(_rounded([(0.0, 0.4), (0.9, 0.4), (1.0, 0.5), (1.0, 0.72), (0.0, 0.72)], 0.08)),
        _detail(_rounded([(0.29, 0.42), (0.37, 0.215), (0.48, 0.215), (0.48, 0.42)], 0.03), "cream"),
        _detail(_rounded([(0.545, 0.42), (0.545, 0.215), (0.645, 0.215), (0.735, 0.42)], 0.03), "cream"),
        _part(_oval(0.24, 0.72, 0.125, 0.125, count=32), "tyre"),
        _part(_oval(0.76, 0.72, 0.125, 0.125, count=32), "tyre"),
        _detail(_oval(0.24, 0.72, 0.055, 0.055, count=20), "cream"),
        _detail(_oval(0.76, 0.72, 0.055, 0.055, count=20), "cream"),
    ]


def _balloon() -> list[Part]:
    t = np.linspace(0, 1, 20)
    string = np.stack([0.32 + 0.04 * np.sin(t * 2 * np.pi), 0.74 + 0.19 * t], 1)
    return [
        _detail(_stroke(string, 0.03), "string"),
        _part(_rounded([(0.32, 0.62), (0.42, 0.77), (0.22, 0.77)], 0.03), "shade"),
        _part(_oval(0.32, 0.345, 0.32, 0.345)),
        _detail(_stroke(_oval(0.31, 0.33, 0.2, 0.21, 190, 255, 14), 0.065), "light"),
    ]


def _mushroom() -> list[Part]:
    cap = np.concatenate([_oval(0.5, 0.5, 0.5, 0.48, 180, 360, 40), _oval(0.5, 0.52, 0.5, 0.1, 0, 180, 24)])
    return [
        _part(_rounded([(0.39, 0.5), (0.61, 0.5), (0.67, 0.94), (0.33, 0.94)], 0.09), "cream"),
        _part(cap),
        _detail(_oval(0.5, 0.22, 0.105, 0.095, count=24), "cream"),
        _detail(_oval(0.23, 0.4, 0.08, 0.075, count=24), "cream"),
        _detail(_oval(0.77, 0.4, 0.08, 0.075, count=24), "cream"),
    ]


def _umbrella() -> list[Part]:
    hook = np.concatenate([[(0.5, 0.1), (0.5, 0.5)], _oval(0.6, 0.86, 0.1, 0.11, 180, 0, 16)])
    scallops = [_oval(x, 0.5, 0.125, 0.075, 0, -180, 12) for x in (0.875, 0.625, 0.375, 0.125)]
    canopy = np.concatenate([_oval(0.5, 0.5, 0.5, 0.44, 180, 360, 40), *scallops])
    panel = np.concatenate(
        [_oval(0.5, 0.5, 0.25, 0.4, 180, 360, 24), _oval(0.625, 0.5, 0.125, 0.075, 0, -180, 12), scallops[2]]
    )
    return [
        _part(_stroke(hook, 0.05), "brown"),
        _part(_box(0.475, 0.0, 0.525, 0.1), "brown"),
        _part(canopy),
        _detail(panel, "shade"),
    ]


KINDS: dict[str, Callable[[], list[Part]]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "house": _house,
    "tree": _tree,
    "boat": _boat,
    "fish": _fish,
    "flower": _flower,
    "sun": _sun,
    "moon": _moon,
    "car": _car,
    "balloon": _balloon,
    "mushroom": _mushroom,
    "umbrella": _umbrella,
}


@cache
def _sprite(kind: str) -> tuple[Part, ...]:
    """The parts of a thing, centred on the origin, the longer side of their common box one."""
    parts = KINDS[kind]()
    points = np.concatenate([part.points for part in parts])
    low, high = points.min(0), points.max(0)
    middle, side = (low + high) / 2, (high - low).max()
    return tuple(Part((part.points - middle) / side, part.outwards, part.role, part.outlined) for part in parts)


@cache
def _extent(kind: str) -> tuple[float, float]:
    """Width and height of a thing; the longer is one."""
    width, height = np.ptp(np.concatenate([part.points for part in _sprite(kind)]), axis=0)
    return float(width), float(height)


@cache
def _palette(colour: str) -> dict[str, Rgb]:
    main = COLOURS[colour]
    return {
        "main": main,
        "shade": _mix(main, DEEP[colour], 0.32),
        "light": _mix(main, (255, 255, 255), 0.55),
        "outline": _mix(DEEP[colour], DARK, 0.4),
        "string": (140, 132, 140),
        "cream": CREAM,
        "dark": DARK,
        "tyre": TYRE,
        "brown": BROWN,
        "leaf": LEAF,
    }


def _mix(one: Rgb, other: Rgb, share: float) -> Rgb:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(one, other, strict=True))
    return red, green, blue


def _draw_thing(pen: ImageDraw.ImageDraw, thing: Thing, side: int) -> None:
    palette = _palette(thing.colour)
    scale, centre = thing.size * side, np.array([thing.x, thing.y]) * side
    parts = _sprite(thing.kind)
    for part in parts:
        if part.outlined:
            outer = part.points * scale + centre + part.outwards * (OUTLINE * side)
            pen.polygon(outer.ravel().tolist(), palette["outline"])
    for part in parts:
        pen.polygon((part.points * scale + centre).ravel().tolist(), palette[part.role])


@cache
def _backdrop(background: str, side: int) -> Image.Image:
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
            picture = _gradient(side, [(164, 212, 246), (226, 242, 252)])
            clouds = [(0.16, 0.17, 0.13, 0.045), (0.13, 0.14, 0.07, 0.06), (0.2, 0.15, 0.05, 0.045)]
            clouds += [(0.86, 0.27, 0.11, 0.04), (0.88, 0.245, 0.055, 0.05)]
            _ovals(picture, (255, 255, 255), clouds)
            _ovals(picture, (202, 228, 178), [(0.85, 1.0, 0.75, 0.31)])
            _ovals(picture, (184, 216, 158), [(0.2, 1.08, 0.9, 0.34)])
        case "dusk":
            picture = _gradient(side, [(86, 76, 122), (178, 128, 150), (248, 196, 156)], 0.8)
            _ovals(picture, (76, 62, 84), [(0.8, 1.02, 0.7, 0.27)])
            _ovals(picture, (58, 48, 68), [(0.2, 1.1, 0.9, 0.34)])
        case "night":
            picture = _gradient(side, [(12, 16, 42), (44, 54, 98)], 0.85)
            stars = [(0.1, 0.12), (0.34, 0.06), (0.62, 0.13), (0.9, 0.07), (0.06, 0.44), (0.94, 0.38), (0.2, 0.29)]
            _ovals(picture, (250, 240, 200), [(x, y, 0.011, 0.011) for x, y in stars])
            _ovals(picture, (24, 34, 58), [(0.85, 1.02, 0.75, 0.27)])
            _ovals(picture, (18, 26, 46), [(0.15, 1.1, 0.9, 0.34)])
        case "snow":
            picture = _gradient(side, [(150, 168, 192), (206, 216, 228)], 0.8)
            flakes = [(0.08, 0.1), (0.3, 0.16), (0.56, 0.07), (0.82, 0.15), (0.95, 0.42), (0.05, 0.4), (0.16, 0.6)]
            _ovals(picture, (255, 255, 255), [(x, y, 0.017, 0.017) for x, y in flakes])
            _ovals(picture, (232, 238, 246), [(0.8, 1.02, 0.75, 0.29)])
            _ovals(picture, (250, 252, 255), [(0.2, 1.1, 0.9, 0.36)])
        case _:
            raise ValueError(f"background must be one of {', '.join(BACKGROUNDS)}, got {background!r}.")
    return picture


def _gradient(side: int, colours: list[Rgb], end: float = 1.0) -> Image.Image:
    """From the first colour at the top to the last at `end` of the height."""
    heights = np.linspace(0, 1, side)
    stops = np.linspace(0, end, len(colours))
    column = np.stack([np.interp(heights, stops, [colour[i] for colour in colours]) for i in range(3)], 1)
    return Image.fromarray(np.repeat(column.round().astype(np.uint8)[:, None], side, 1))


def _ovals(picture: Image.Image, colour: Rgb, ovals: list[tuple[float, float, float, float]]) -> None:
    pen, side = ImageDraw.Draw(picture), picture.width
    for x, y, rx, ry in ovals:
        pen.ellipse([(x - rx) * side, (y - ry) * side, (x + rx) * side, (y + ry) * side], fill=colour)


@dataclass(frozen=True)
class Sighting:
    """An object found in a picture; kind or colour is None where nothing convincing was seen."""

    kind: str | None
    colour: str | None
    x: float
    y: float
    size: float
    unexplained: float  # what the best drawing leaves of the object's difference from the background, 0 to 1


@dataclass(frozen=True)
class Seen:
    """What a picture shows."""

    background: str | None
    things: tuple[Sighting, ...]

    def __str__(self) -> str:
        things = [f"{thing.colour or 'unclear'} {thing.kind or 'something'}" for thing in self.things]
        return f"{' and '.join(things) or 'nothing'}, {self.background or 'unclear'} background"


@dataclass(frozen=True)
class Verdict:
    """Which claims of a scene a picture bears out; None for claims that the scene does not make."""

    background: bool
    count: bool  # no object missing, none too many
    colours: tuple[bool, ...]
    kinds: tuple[bool, ...]
    relation: bool | None
    place: bool | None
    size: bool | None
    seen: str

    @property
    def right(self) -> bool:
        claims = (self.background, self.count, *self.colours, *self.kinds, self.relation, self.place, self.size)
        return all(claim is not False for claim in claims)


def check(image: Pixels, scene: Scene) -> Verdict:
    """Judges a picture of any size against what the caption of a scene says; exact positions and sizes are free."""
    return judge(look(image), scene)


def judge(seen: Seen, scene: Scene) -> Verdict:
    """Compares what was seen with what the scene says."""
    verdicts = [_compare(seen, order, scene) for order in (seen.things, seen.things[::-1])]
    return max(verdicts, key=lambda verdict: (verdict.right, sum(verdict.colours) + sum(verdict.kinds)))


def look(image: Pixels) -> Seen:
    """Finds the background and every sizeable object, choosing among all that can be drawn."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image must be uint8 [height, width, 3], got {image.dtype} {list(image.shape)}.")
    picture = np.asarray(Image.fromarray(image).resize((_LOOK, _LOOK), Image.Resampling.BOX), np.float32)
    distances = {name: np.abs(picture - _empty(name, _LOOK)).mean(-1) for name in BACKGROUNDS}
    name = min(distances, key=lambda name: float(np.minimum(distances[name], 40).mean()))
    rim = np.ones((_LOOK, _LOOK), bool)
    rim[_LOOK // 16 : -_LOOK // 16, _LOOK // 16 : -_LOOK // 16] = False
    convincing = float((distances[name][rim] < 25).mean()) > 0.7

    # A faint cast over the whole picture is no object: take off the usual difference from the background.
    covered = distances[name] > 40
    cast = np.median((picture - _empty(name, _LOOK))[~covered], axis=0) if not covered.all() else np.zeros(3)
    picture = np.clip(picture - np.clip(cast, -15, 15), 0, 255).astype(np.float32)
    different = np.min([np.abs(picture - empty) @ _THIRDS for empty in _loosely_empty(name)], axis=0) > 25
    colours = _nearest_colours(picture)
    found: list[tuple[NDArray[np.bool_], Sighting]] = []
    for blob in _blobs(different, colours):
        if any((blob & _silhouette(thing, name)).sum() > 0.6 * blob.sum() for _, thing in found):
            continue  # a part of a thing seen already
        found.append((blob, _recognise(picture, name, blob, colours)))
    # What makes no sense alone may be a piece: a hull parted from its sails where their outlines melt into dark ground.
    for one, other in combinations(found, 2):
        if None in (one[1].kind, other[1].kind) and (_grow(_grow(one[0])) & _grow(_grow(other[0]))).any():
            whole = _recognise(picture, name, one[0] | other[0], colours)
            if whole.kind is not None:
                found = [piece for piece in found if piece is not one and piece is not other]
                found.append((one[0] | other[0], whole))
                break
    things = [thing for _, thing in found]
    return Seen(name if convincing else None, tuple(things))


def _compare(seen: Seen, things: tuple[Sighting, ...], scene: Scene) -> Verdict:
    pairs = list(zip(scene.things, things, strict=False))
    missing = (False,) * (len(scene.things) - len(pairs))
    relation = place = size = None
    if scene.relation is not None:
        relation = len(pairs) == 2 and _related(scene.relation, things[0], things[1])
    if scene.place is not None:
        place = bool(pairs) and _placed(scene.place, things[0])
    if scene.size_word is not None:
        size = bool(pairs) and (things[0].size < 0.42 if scene.size_word == "small" else things[0].size > 0.6)
    return Verdict(
        background=seen.background == scene.background,
        count=len(things) == len(scene.things),
        colours=tuple(said.colour == found.colour for said, found in pairs) + missing,
        kinds=tuple(said.kind == found.kind for said, found in pairs) + missing,
        relation=relation,
        place=place,
        size=size,
        seen=str(seen),
    )


def _related(relation: str, one: Sighting, other: Sighting) -> bool:
    """Whether one stands so to the other; a diagonal counts as either."""
    right, down = one.x - other.x, one.y - other.y
    along, across = (down, right) if relation in ("above", "below") else (right, down)
    along = {"above": -along, "left": -along, "beside": abs(along)}.get(relation, along)
    return along > 0.15 and along > 0.6 * abs(across)


def _placed(place: str, thing: Sighting) -> bool:
    right, down = thing.x - 0.5, thing.y - 0.5
    along, across = (right, down) if place in ("left", "right") else (down, right)
    along = -along if place in ("left", "top") else along
    return along > 0.11 and along > abs(across)


_LOOK = 128  # pixels at which pictures are looked at; kinds are told apart at half of that
_THIRDS = np.full(3, 1 / 3, np.float32)
_UNCLEAR = 0.45  # the share left unexplained from which on an object is nothing in particular
_CLOSE = 62  # how far in RGB a pixel may lie from the colour that it counts as


def _silhouette(thing: Sighting, background: str) -> NDArray[np.bool_]:
    if thing.kind is None or thing.colour is None:
        return np.zeros((_LOOK, _LOOK), bool)
    drawn = Thing(thing.kind, thing.colour, thing.x, thing.y, thing.size)
    picture = draw(Scene(background, (drawn,)), _LOOK)
    return _grow(np.any(picture != _empty(background, _LOOK), -1))


@cache
def _empty(background: str, pixels: int) -> NDArray[np.float32]:
    return draw(Scene(background, ()), pixels).astype(np.float32)


@cache
def _loosely_empty(background: str) -> list[NDArray[np.float32]]:
    """The empty background sharp and soft, in place and two pixels off: a horizon not quite in place is no object."""
    sharp = Image.fromarray(_empty(background, _LOOK).astype(np.uint8))
    shifted = []
    for picture in (sharp, sharp.filter(ImageFilter.GaussianBlur(1.5))):
        padded = np.pad(np.asarray(picture, np.float32), ((2, 2), (2, 2), (0, 0)), "edge")
        for x, y in ((2, 2), (2, 0), (2, 4), (0, 2), (4, 2)):
            shifted.append(padded[y : y + _LOOK, x : x + _LOOK])
    return shifted


def _nearest_colours(picture: NDArray[np.float32]) -> NDArray[np.int64]:
    """For every pixel the index of its colour, or -1 where it is none of them."""
    entries = [_palette(colour)[role] for colour in COLOURS for role in ("main", "shade")]
    table = np.array([*entries, CREAM, DARK, TYRE, BROWN, LEAF], np.float32)
    distances = np.linalg.norm(picture[:, :, None] - table, axis=-1)
    nearest = distances.argmin(-1)
    known = (nearest < len(entries)) & (distances.min(-1) < _CLOSE)
    return np.where(known, nearest // 2, -1)


def _blobs(different: NDArray[np.bool_], colours: NDArray[np.int64]) -> list[NDArray[np.bool_]]:
    """The sizeable connected regions that differ from the background, largest first.

    Two things that touch are told apart by colour: a region in which two colours each hold a good part is split.
    """
    regions = []
    for region in _components(_shrink(_grow(different))):
        if _shrink(region).sum() < 170:  # the smallest thing that is ever drawn leaves 400
            continue
        counts = np.bincount(colours[region & (colours >= 0)], minlength=len(COLOURS))
        first, second = np.argsort(-counts, kind="stable")[:2]
        if counts[second] > max(0.3 * counts[first], 200):
            regions += _split(region, region & (colours == first), region & (colours == second))
        else:
            regions.append(region)
    return sorted(regions, key=lambda region: -int(region.sum()))


def _grow(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    padded = np.pad(mask, 1)
    height, width = mask.shape
    shifted = [padded[y : y + height, x : x + width] for y in range(3) for x in range(3)]
    return np.asarray(np.logical_or.reduce(shifted), bool)


def _shrink(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return ~_grow(~mask)


def _components(mask: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """Connected regions, by letting the largest label of each spread to all of it."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        padded = np.pad(labels, 1)
        across = np.maximum(np.maximum(padded[:, :-2], padded[:, 1:-1]), padded[:, 2:])
        spread = np.maximum(np.maximum(across[:-2], across[1:-1]), across[2:]) * mask
        if np.array_equal(spread, labels):
            return [labels == label for label in np.unique(labels[mask])]
        labels = spread


def _split(region: NDArray[np.bool_], one: NDArray[np.bool_], other: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """Shares a region between two parts of it: each pixel goes to the part that reaches it first."""
    while True:
        wider = one | (_grow(one) & region & ~other)
        other_wider = other | (_grow(other) & region & ~wider)
        if np.array_equal(wider, one) and np.array_equal(other_wider, other):
            return [one, other]
        one, other = wider, other_wider


def _recognise(
    picture: NDArray[np.float32],
    background: str,
    blob: NDArray[np.bool_],
    colours: NDArray[np.int64],
) -> Sighting:
    """Draws every kind in the blob's colour over the background, and keeps the one that leaves least unexplained."""
    rows, columns = np.flatnonzero(blob.any(1)), np.flatnonzero(blob.any(0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    x, y, size = (left + right) / 2 / _LOOK, (top + bottom) / 2 / _LOOK, max(right - left, bottom - top) / _LOOK
    counts = np.bincount(colours[blob & (colours >= 0)], minlength=len(COLOURS))
    if counts.max() < 0.25 * blob.sum():
        return Sighting(None, None, float(x), float(y), float(size), 1.0)
    colour = list(COLOURS)[counts.argmax()]

    # Whatever lies farther than three pixels from the blob is not its affair.
    near = _grow(_grow(_grow(blob)))[..., None]
    alone = np.where(near, picture, _empty(background, _LOOK))
    half = alone.reshape(_LOOK // 2, 2, _LOOK // 2, 2, 3).mean((1, 3))

    def left_over(drawing: NDArray[np.float32]) -> float:
        return float(np.clip(np.abs(drawing - half) @ _THIRDS - 8, 0, 60).sum())

    def cost(thing: Thing) -> float:
        return left_over(draw(Scene(background, (thing,)), _LOOK // 2).astype(np.float32))

    # The foot of a thing can melt into the background (wheels, a string): its width and top then say more.
    tall, wide = float(bottom - top) / _LOOK - 2 * OUTLINE, float(right - left) / _LOOK - 2 * OUTLINE
    guesses = []
    for kind in KINDS:
        width, height = _extent(kind)
        guesses.append(Thing(kind, colour, float(x), float(y), max(tall, wide, 0.05)))
        scale = max(wide, 0.05) / width
        guesses.append(Thing(kind, colour, float(x), float(top) / _LOOK + OUTLINE + scale * height / 2, scale))
    fits = [(cost(thing), thing) for thing in guesses]
    for keep, step, rounds in ((9, 0.03, 1), (5, 0.03, 2), (3, 0.012, 2)):
        fits = [_fit(thing, step, rounds, cost) for _, thing in sorted(fits, key=lambda fit: fit[0])[:keep]]
    least, best = min(fits, key=lambda fit: fit[0])
    unexplained = least / max(left_over(_empty(background, _LOOK // 2)), 1e-6)
    return Sighting(best.kind if unexplained < _UNCLEAR else None, colour, best.x, best.y, best.size, unexplained)


def _fit(thing: Thing, step: float, rounds: int, cost: Callable[[Thing], float]) -> tuple[float, Thing]:
    """Moves and scales a thing by steps while that lowers the cost."""
    least, best = cost(thing), thing
    for _ in range(rounds):
        before = best
        for change in ({"size": step}, {"size": -step}, {"x": step}, {"x": -step}, {"y": step}, {"y": -step}):
            name, by = next(iter(change.items()))
            moved = replace(best, **{name: max(getattr(best, name) + by, 0.05)})
            if (price := cost(moved)) < least:
                least, best = price, moved
        if best is before:
            break
    return least, best
