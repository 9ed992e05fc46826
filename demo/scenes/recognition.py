"""Finds out what a picture shows, without a hint of what to expect: background, kinds, colours, places, sizes.

Every kind of thing is drawn in each region that differs from the background; the drawing that fits best is the answer.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from demo.scenes.colours import BROWN, COLOURS, CREAM, DARK, LEAF, TYRE, palette
from demo.scenes.drawing import OUTLINE, Pixels, draw
from demo.scenes.regions import Mask, components, grow, shrink, split
from demo.scenes.scene import BACKGROUNDS, Scene, Thing
from demo.scenes.shapes import KINDS, extent

LOOK = 128  # side in pixels to which pictures are resized; kinds are compared at half of that
THIRDS = np.full(3, 1 / 3, np.float32)
UNCLEAR = 0.45  # an object with at least this share left unexplained has no kind
CLOSE = 62  # RGB distance within which a pixel counts as a colour


@dataclass(frozen=True)
class Sighting:
    """An object found in a picture; kind or colour is None where nothing convincing was seen."""

    kind: str | None
    colour: str | None
    x: float
    y: float
    size: float
    unexplained: float  # share of the difference from the background that the best drawing leaves, 0 to 1


@dataclass(frozen=True)
class Seen:
    """What a picture shows."""

    background: str | None
    things: tuple[Sighting, ...]

    def __str__(self) -> str:
        things = [f"{thing.colour or 'unclear'} {thing.kind or 'something'}" for thing in self.things]
        return f"{' and '.join(things) or 'nothing'}, {self.background or 'unclear'} background"


def look(image: Pixels) -> Seen:
    """Finds the background and every sizeable object, choosing among all that can be drawn."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image must be uint8 [height, width, 3], got {image.dtype} {list(image.shape)}.")
    picture = np.asarray(Image.fromarray(image).resize((LOOK, LOOK), Image.Resampling.BOX), np.float32)
    distances = {name: np.abs(picture - empty(name, LOOK)).mean(-1) for name in BACKGROUNDS}
    name = min(distances, key=lambda name: float(np.minimum(distances[name], 40).mean()))
    rim = np.ones((LOOK, LOOK), bool)
    rim[LOOK // 16 : -LOOK // 16, LOOK // 16 : -LOOK // 16] = False
    convincing = float((distances[name][rim] < 25).mean()) > 0.7

    # A faint cast over the whole picture is no object, so the median difference from the background is removed.
    covered = distances[name] > 40
    cast = np.median((picture - empty(name, LOOK))[~covered], axis=0) if not covered.all() else np.zeros(3)
    picture = np.clip(picture - np.clip(cast, -15, 15), 0, 255).astype(np.float32)
    different = np.min([np.abs(picture - empty) @ THIRDS for empty in loosely_empty(name)], axis=0) > 25
    colours = nearest_colours(picture)
    sightings: list[tuple[Mask, Sighting]] = []
    for blob in blobs(different, colours):
        if any((blob & silhouette(thing, name)).sum() > 0.6 * blob.sum() for _, thing in sightings):
            continue  # a part of a thing that was seen before
        sightings.append((blob, recognise(picture, name, blob, colours)))
    # An unknown object may be a piece of one: outlines vanish on a dark ground, which parts a hull from its sails.
    for first, second in combinations(sightings, 2):
        if None in (first[1].kind, second[1].kind) and (grow(grow(first[0])) & grow(grow(second[0]))).any():
            whole = recognise(picture, name, first[0] | second[0], colours)
            if whole.kind is not None:
                sightings = [piece for piece in sightings if piece is not first and piece is not second]
                sightings.append((first[0] | second[0], whole))
                break
    things = [thing for _, thing in sightings]
    return Seen(name if convincing else None, tuple(things))


def silhouette(thing: Sighting, background: str) -> Mask:
    if thing.kind is None or thing.colour is None:
        return np.zeros((LOOK, LOOK), bool)
    drawn = Thing(thing.kind, thing.colour, thing.x, thing.y, thing.size)
    picture = draw(Scene(background, (drawn,)), LOOK)
    return grow(np.any(picture != empty(background, LOOK), -1))


@cache
def empty(background: str, pixels: int) -> NDArray[np.float32]:
    return draw(Scene(background, ()), pixels).astype(np.float32)


@cache
def loosely_empty(background: str) -> list[NDArray[np.float32]]:
    """The empty background, sharp and blurred, in place and shifted by two pixels: a shifted horizon is no object."""
    sharp = Image.fromarray(empty(background, LOOK).astype(np.uint8))
    shifted = []
    for picture in (sharp, sharp.filter(ImageFilter.GaussianBlur(1.5))):
        padded = np.pad(np.asarray(picture, np.float32), ((2, 2), (2, 2), (0, 0)), "edge")
        for x, y in ((2, 2), (2, 0), (2, 4), (0, 2), (4, 2)):
            shifted.append(padded[y : y + LOOK, x : x + LOOK])
    return shifted


def nearest_colours(picture: NDArray[np.float32]) -> NDArray[np.int64]:
    """The index of each pixel's colour, or -1 where no colour is close."""
    entries = [palette(colour)[role] for colour in COLOURS for role in ("main", "shade")]
    table = np.array([*entries, CREAM, DARK, TYRE, BROWN, LEAF], np.float32)
    distances = np.linalg.norm(picture[:, :, None] - table, axis=-1)
    nearest = distances.argmin(-1)
    known = (nearest < len(entries)) & (distances.min(-1) < CLOSE)
    return np.where(known, nearest // 2, -1)


def blobs(different: Mask, colours: NDArray[np.int64]) -> list[Mask]:
    """The sizeable connected regions that differ from the background, largest first.

    A region with two large areas of different colours is split: it is two things that touch.
    """
    regions = []
    for region in components(shrink(grow(different))):
        if shrink(region).sum() < 170:  # the smallest thing that is ever drawn leaves 400
            continue
        counts = np.bincount(colours[region & (colours >= 0)], minlength=len(COLOURS))
        first, second = np.argsort(-counts, kind="stable")[:2]
        if counts[second] > max(0.3 * counts[first], 200):
            regions += split(region, region & (colours == first), region & (colours == second))
        else:
            regions.append(region)
    return sorted(regions, key=lambda region: -int(region.sum()))


def recognise(
    picture: NDArray[np.float32],
    background: str,
    blob: Mask,
    colours: NDArray[np.int64],
) -> Sighting:
    """Draws every kind in the blob's colour over the background, and keeps the one that leaves least unexplained."""
    rows, columns = np.flatnonzero(blob.any(1)), np.flatnonzero(blob.any(0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    x, y, size = (left + right) / 2 / LOOK, (top + bottom) / 2 / LOOK, max(right - left, bottom - top) / LOOK
    counts = np.bincount(colours[blob & (colours >= 0)], minlength=len(COLOURS))
    if counts.max() < 0.25 * blob.sum():
        return Sighting(None, None, float(x), float(y), float(size), 1.0)
    colour = list(COLOURS)[counts.argmax()]

    # Pixels farther than three pixels from the blob do not count.
    near = grow(grow(grow(blob)))[..., None]
    alone = np.where(near, picture, empty(background, LOOK))
    half = alone.reshape(LOOK // 2, 2, LOOK // 2, 2, 3).mean((1, 3))

    def left_over(drawing: NDArray[np.float32]) -> float:
        return float(np.clip(np.abs(drawing - half) @ THIRDS - 8, 0, 60).sum())

    def cost(thing: Thing) -> float:
        return left_over(draw(Scene(background, (thing,)), LOOK // 2).astype(np.float32))

    # The foot of a thing (wheels, a string) can vanish on the background. Then its width and top are the better guess.
    tall, wide = float(bottom - top) / LOOK - 2 * OUTLINE, float(right - left) / LOOK - 2 * OUTLINE
    guesses = []
    for kind in KINDS:
        width, height = extent(kind)
        guesses.append(Thing(kind, colour, float(x), float(y), max(tall, wide, 0.05)))
        scale = max(wide, 0.05) / width
        guesses.append(Thing(kind, colour, float(x), float(top) / LOOK + OUTLINE + scale * height / 2, scale))
    fits = [(cost(thing), thing) for thing in guesses]
    for keep, step, rounds in ((9, 0.03, 1), (5, 0.03, 2), (3, 0.012, 2)):
        fits = [fit(thing, step, rounds, cost) for _, thing in sorted(fits, key=lambda fit: fit[0])[:keep]]
    least, best = min(fits, key=lambda fit: fit[0])
    unexplained = least / max(left_over(empty(background, LOOK // 2)), 1e-6)
    return Sighting(best.kind if unexplained < UNCLEAR else None, colour, best.x, best.y, best.size, unexplained)


def fit(thing: Thing, step: float, rounds: int, cost: Callable[[Thing], float]) -> tuple[float, Thing]:
    """Moves and scales a thing in steps while that lowers the cost."""
    least, best = cost(thing), thing
    for _ in range(rounds):
        before = best
        for change in ({"size": step}, {"size": -step}, {"x": step}, {"x": -step}, {"y": step}, {"y": -step}):
            name, by = next(iter(change.items()))
            moved = replace(best, **{name: max(getattr(best, name) + by, 0.05)})
            if (moved_cost := cost(moved)) < least:
                least, best = moved_cost, moved
        if best is before:
            break
    return least, best
