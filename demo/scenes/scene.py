"""What a scene is, and random ones for training and for judging. Knows nothing of pictures or captions.

About a tenth of all combinations is held out: training never shows them, and the model is judged by them.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from demo.scenes.colours import COLOURS
from demo.scenes.shapes import KINDS

Split = Literal["train", "held_out"]

# The wording of each background in captions. The plain ones also have a short form, "white background".
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

# Of a lone thing: mean size, largest deviation from it, and largest distance from the picture's centre.
MEASURES = {"small": (0.345, 0.02, 0.10), None: (0.5, 0.03, 0.06), "big": (0.7, 0.03, 0.03)}


@dataclass(frozen=True)
class Thing:
    """An object. Its centre and its longer side are fractions of the picture."""

    kind: str
    colour: str
    x: float
    y: float
    size: float


@dataclass(frozen=True)
class Scene:
    """One thing, with `place` and `size_word` if captions name them; or two, and the `relation` of first to second."""

    background: str
    things: tuple[Thing, ...]
    relation: str | None = None
    place: str | None = None
    size_word: str | None = None


def sample_scene(rng: np.random.Generator, split: Split = "train", objects: int | None = None) -> Scene:
    """A random scene of a split. `objects` is 1, 2, or None for a mix in which four of ten scenes have one.

    A training scene holds no held-out (thing, colour, background), and no held-out pair of coloured things.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"split must be train or held_out, got {split!r}.")
    if objects not in (1, 2, None):
        raise ValueError(f"objects must be 1, 2 or None, got {objects!r}.")
    if objects is None:
        objects = 1 if rng.random() < 0.4 else 2
    while True:
        scene = sample_single(rng) if objects == 1 else sample_pair(rng)
        triple = any(held_out_triple(thing.kind, thing.colour, scene.background) for thing in scene.things)
        pair = objects == 2 and held_out_pair(*((thing.kind, thing.colour) for thing in scene.things))
        if split == "train" and not triple and not pair:
            return scene
        if split == "held_out" and (triple if objects == 1 else pair):
            return scene


@cache
def held_out_triple(kind: str, colour: str, background: str) -> bool:
    """Whether training never shows this thing in this colour on this background: about one in ten."""
    return tenth(f"{colour} {kind} {background}")


@cache
def held_out_pair(first: tuple[str, str], second: tuple[str, str]) -> bool:
    """Whether training never shows these two (thing, colour) together, in either order: about one in ten."""
    return tenth(" and ".join(" ".join(thing) for thing in sorted((first, second))))


def tenth(text: str) -> bool:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 10 == 0


def sample_single(rng: np.random.Generator) -> Scene:
    size_word = str(rng.choice(["", "", "small", "big"])) or None
    place = None if size_word == "big" or rng.random() < 0.5 else str(rng.choice(list(PLACES)))
    middle, spread, shift = MEASURES[size_word]
    size = middle + rng.uniform(-spread, spread)
    x, y = 0.5 + rng.uniform(-shift, shift, 2)
    edge = size / 2 + 0.045 + rng.uniform(-0.02, 0.02)  # of the centre of a thing near an edge
    if place in ("left", "right"):
        x = edge if place == "left" else 1 - edge
    elif place in ("top", "bottom"):
        y = edge if place == "top" else 1 - edge
    thing = Thing(pick(rng, KINDS), pick(rng, COLOURS), float(x), float(y), float(size))
    return Scene(pick(rng, BACKGROUNDS), (thing,), place=place, size_word=size_word)


def sample_pair(rng: np.random.Generator) -> Scene:
    relation = pick(rng, RELATIONS)
    upright = relation in ("above", "below")
    near, far = 0.25 + rng.uniform(-0.01, 0.01), 0.75 + rng.uniform(-0.01, 0.01)
    if relation in ("below", "right") or (relation == "beside" and rng.random() < 0.5):
        near, far = far, near
    shift = 0.5 + rng.uniform(-0.08, 0.08, 2)
    while True:
        looks = [(pick(rng, KINDS), pick(rng, COLOURS)) for _ in range(2)]
        if looks[0] != looks[1]:
            break
    things = []
    for (kind, colour), along, aside in zip(looks, (near, far), shift, strict=True):
        x, y = (aside, along) if upright else (along, aside)
        things.append(Thing(kind, colour, float(x), float(y), float(rng.uniform(0.37, 0.42))))
    return Scene(pick(rng, BACKGROUNDS), tuple(things), relation=relation)


def pick(rng: np.random.Generator, names: Mapping[str, object]) -> str:
    return list(names)[rng.integers(len(names))]
