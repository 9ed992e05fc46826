"""Judges whether a picture shows a scene: what was recognised in it is compared with what the scene claims."""

from dataclasses import dataclass

from demo.scenes.drawing import Pixels
from demo.scenes.recognition import Seen, Sighting, look
from demo.scenes.scene import Scene


@dataclass(frozen=True)
class Verdict:
    """Which claims of a scene hold for a picture. None: the scene does not make this claim."""

    background: bool
    count: bool  # as many objects as the scene has
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
    """Judges a picture of any size by what the caption of a scene says. Exact positions and sizes are free."""
    return judge(look(image), scene)


def judge(seen: Seen, scene: Scene) -> Verdict:
    """Compares what was seen with what the scene claims, the objects in whichever order fits better."""
    verdicts = [compare(seen, order, scene) for order in (seen.things, seen.things[::-1])]
    return max(verdicts, key=lambda verdict: (verdict.right, sum(verdict.colours) + sum(verdict.kinds)))


def compare(seen: Seen, things: tuple[Sighting, ...], scene: Scene) -> Verdict:
    pairs = list(zip(scene.things, things, strict=False))
    missing = (False,) * (len(scene.things) - len(pairs))
    relation = place = size = None
    if scene.relation is not None:
        relation = len(pairs) == 2 and related(scene.relation, things[0], things[1])
    if scene.place is not None:
        place = bool(pairs) and placed(scene.place, things[0])
    if scene.size_word is not None:
        size = bool(pairs) and (things[0].size < 0.42 if scene.size_word == "small" else things[0].size > 0.6)
    return Verdict(
        background=seen.background == scene.background,
        count=len(things) == len(scene.things),
        colours=tuple(wanted.colour == thing.colour for wanted, thing in pairs) + missing,
        kinds=tuple(wanted.kind == thing.kind for wanted, thing in pairs) + missing,
        relation=relation,
        place=place,
        size=size,
        seen=str(seen),
    )


def related(relation: str, thing: Sighting, other: Sighting) -> bool:
    """Whether the relation holds. A thing diagonally above another is both above it and beside it."""
    right, down = thing.x - other.x, thing.y - other.y
    along, across = (down, right) if relation in ("above", "below") else (right, down)
    along = {"above": -along, "left": -along, "beside": abs(along)}.get(relation, along)
    return along > 0.15 and along > 0.6 * abs(across)


def placed(place: str, thing: Sighting) -> bool:
    right, down = thing.x - 0.5, thing.y - 0.5
    along, across = (right, down) if place in ("left", "right") else (down, right)
    along = -along if place in ("left", "top") else along
    return along > 0.11 and along > abs(across)
