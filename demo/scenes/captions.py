"""Captions of scenes, in a fixed vocabulary. Knows nothing of pictures."""

import numpy as np

from demo.scenes.colours import COLOURS
from demo.scenes.scene import BACKGROUNDS, INVERSE, PLACES, RELATIONS, SIZES, Scene, Thing
from demo.scenes.shapes import KINDS


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Describes a scene in one of several wordings.

    Colour, thing and background always occur; size and place only where the scene has them.
    """
    style = rng.choice(["plain", "plain", "first", "bare", "picture"])
    articles = style != "bare"
    if scene.relation is None:
        text = noun(scene.things[0], scene.size_word, articles, rng)
        if scene.place is not None:
            text += f" {PLACES[scene.place]}"
    else:
        (subject, object_), relation = scene.things, scene.relation
        if rng.random() < 0.5:
            subject, object_, relation = object_, subject, INVERSE[relation]
        word = str(rng.choice(RELATIONS[relation]))
        text = f"{noun(subject, None, articles, rng)} {word} {noun(object_, None, articles, rng)}"

    background = BACKGROUNDS[scene.background]
    if scene.background == "grey" and rng.random() < 0.3:
        background = background.replace("grey", "gray")
    if style == "first":
        return f"{background}, {text}"
    if style == "bare":
        return f"{text}, {background.removeprefix('on a ')}"
    comma = "," if scene.place is not None else ""
    return f"{'a picture of ' if style == 'picture' else ''}{text}{comma} {background}"


def vocabulary() -> tuple[str, ...]:
    """Every word that a caption can hold, sorted. The comma counts as a word."""
    phrases = ["a", "an", "a picture of", ",", "gray", *KINDS, *COLOURS, *BACKGROUNDS.values(), *PLACES.values()]
    phrases += [word for words in (*SIZES.values(), *RELATIONS.values()) for word in words]
    return tuple(sorted({word for phrase in phrases for word in phrase.split()}))


def noun(thing: Thing, size_word: str | None, article: bool, rng: np.random.Generator) -> str:
    words = [thing.colour, thing.kind]
    if size_word is not None:
        words.insert(0, str(rng.choice(SIZES[size_word])))
    if article:
        words.insert(0, "an" if words[0][0] in "aeiou" else "a")
    return " ".join(words)
