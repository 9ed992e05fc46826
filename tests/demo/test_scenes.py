import re
from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest
from PIL import Image, ImageFilter

from demo import scenes
from demo.scenes import Pixels, Scene, Seen, Split, Thing

Observations = list[tuple[Scene, Seen]]
ROUND_RED = Thing("circle", "red", 0.5, 0.5, 0.5)


def as_a_vae_returns_it(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Blurs the picture, shifts its colours and adds noise, as a VAE does."""
    soft = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(0.9)), np.float64)
    shifted = soft * rng.uniform(0.94, 1.06, 3) + rng.uniform(-8, 8, 3) + rng.normal(0, 5, image.shape)
    return np.clip(shifted.round(), 0, 255).astype(np.uint8)


def some_scenes(seed: int, count: int, split: Split = "train", objects: int | None = None) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [scenes.sample_scene(rng, split, objects) for _ in range(count)]


@pytest.fixture(scope="module")
def clean() -> Observations:
    return [(scene, scenes.look(scenes.draw(scene))) for scene in some_scenes(1, 60)]


@pytest.fixture(scope="module")
def distorted() -> Observations:
    rng = np.random.default_rng(2)
    sampled = some_scenes(3, 50) + some_scenes(4, 30, "held_out")
    return [(scene, scenes.look(as_a_vae_returns_it(scenes.draw(scene), rng))) for scene in sampled]


@pytest.mark.slow
def test_the_checker_accepts_true_drawings(clean: Observations) -> None:
    verdicts = [scenes.judge(seen, scene) for scene, seen in clean]
    assert all(verdict.right for verdict in verdicts), [verdict for verdict in verdicts if not verdict.right]


@pytest.mark.slow
def test_the_checker_accepts_drawings_as_a_vae_returns_them(distorted: Observations) -> None:
    verdicts = [scenes.judge(seen, scene) for scene, seen in distorted]
    assert all(verdict.right for verdict in verdicts), [verdict for verdict in verdicts if not verdict.right]


def falsehoods(scene: Scene, rng: np.random.Generator) -> list[tuple[str, Scene]]:
    """The scene with one claim changed, in every way that applies."""

    def another(names: list[str], than: str) -> str:
        return str(rng.choice([name for name in names if name != than]))

    changed = [("background", replace(scene, background=another(list(scenes.BACKGROUNDS), scene.background)))]
    first, *rest = scene.things
    changed.append(
        ("kinds", replace(scene, things=(replace(first, kind=another(list(scenes.KINDS), first.kind)), *rest)))
    )
    colour = another(list(scenes.COLOURS), first.colour)
    changed.append(("colours", replace(scene, things=(replace(first, colour=colour), *rest))))
    if scene.relation is not None:
        turned = "above" if scene.relation in ("left", "right", "beside") else "left"
        changed.append(("relation", replace(scene, relation=turned)))
        if scene.relation != "beside":
            changed.append(("relation", replace(scene, relation=scenes.INVERSE[scene.relation])))
        changed.append(("count", replace(scene, things=(first,), relation=None)))
    else:
        changed.append(("count", replace(scene, things=(first, replace(first, x=0.1)), relation="beside")))
    if scene.place is not None:
        changed.append(("place", replace(scene, place=another(list(scenes.PLACES), scene.place))))
    if scene.size_word is not None:
        changed.append(("size", replace(scene, size_word=another(list(scenes.SIZES), scene.size_word))))
    return changed


@pytest.mark.slow
def test_the_checker_rejects_every_false_claim(clean: Observations, distorted: Observations) -> None:
    rng = np.random.default_rng(5)
    for scene, seen in clean + distorted:
        for claim, false_scene in falsehoods(scene, rng):
            verdict = scenes.judge(seen, false_scene)
            outcome = getattr(verdict, claim)
            assert not verdict.right, (claim, scene, false_scene)
            assert not (all(outcome) if isinstance(outcome, tuple) else outcome), (claim, scene, false_scene)


@pytest.mark.slow
def test_colours_exchanged_between_two_things_are_rejected(clean: Observations) -> None:
    for scene, seen in clean:
        if scene.relation is not None and len({thing.colour for thing in scene.things}) == 2:
            first, second = scene.things
            if first.kind != second.kind:
                exchanged = (replace(first, colour=second.colour), replace(second, colour=first.colour))
                assert not scenes.judge(seen, replace(scene, things=exchanged)).right


@pytest.mark.parametrize("background", scenes.BACKGROUNDS)
def test_an_empty_background_shows_nothing(background: str) -> None:
    assert scenes.look(scenes.draw(Scene(background, ()))) == Seen(background, ())


def test_noise_and_plain_bars_have_no_kind() -> None:
    noise = scenes.look(np.random.default_rng(0).integers(0, 256, (128, 128, 3)).astype(np.uint8))
    assert noise.background is None
    assert all(thing.kind is None for thing in noise.things)
    bar = scenes.draw(Scene("white", ()))
    bar[50:78, 20:108] = scenes.COLOURS["red"]
    assert [(thing.kind, thing.colour) for thing in scenes.look(bar).things] == [(None, "red")]


def test_one_thing_too_many_is_rejected() -> None:
    scene = Scene("day", (replace(ROUND_RED, x=0.25, size=0.4),))
    extra = replace(scene, things=(*scene.things, Thing("boat", "blue", 0.75, 0.5, 0.4)))
    assert scenes.check(scenes.draw(scene), scene).right
    assert not scenes.check(scenes.draw(extra), scene).right


def test_place_and_size_are_free_unless_the_caption_names_them() -> None:
    claimed = Scene("snow", (ROUND_RED,))
    drawn = Scene("snow", (Thing("circle", "red", 0.38, 0.62, 0.62),))
    assert scenes.check(scenes.draw(drawn), claimed).right
    assert not scenes.check(scenes.draw(drawn), replace(claimed, size_word="small")).right
    assert not scenes.check(scenes.draw(drawn), replace(claimed, place="right")).right


def test_the_verdict_says_what_was_seen() -> None:
    verdict = scenes.check(scenes.draw(Scene("dusk", (ROUND_RED,))), Scene("dusk", (replace(ROUND_RED, kind="fish"),)))
    assert (verdict.seen, verdict.kinds, verdict.colours) == ("red circle, dusk background", (False,), (True,))


def test_captions_use_only_the_vocabulary_and_use_all_of_it() -> None:
    rng = np.random.default_rng(6)
    used = {word for scene in some_scenes(6, 3000) for word in re.findall(r"\w+|[^\w\s]", scenes.caption(scene, rng))}
    assert used == set(scenes.vocabulary())
    assert len(used) <= 90


def test_captions_state_every_claim_and_no_other() -> None:
    rng = np.random.default_rng(7)
    for scene in some_scenes(7, 500):
        text = scenes.caption(scene, rng)
        assert scenes.BACKGROUNDS[scene.background].removeprefix("on a ") in text.replace("gray", "grey"), text
        assert all(f"{thing.colour} {thing.kind}" in text for thing in scene.things), text
        assert any(phrase in text for phrase in scenes.PLACES.values()) == (scene.place is not None), text
        for size, words in scenes.SIZES.items():
            assert any(word in text.split() for word in words) == (scene.size_word == size), text


def test_a_caption_names_a_relation_from_either_side() -> None:
    house, sun = Thing("house", "red", 0.5, 0.75, 0.4), Thing("sun", "yellow", 0.5, 0.25, 0.4)
    rng = np.random.default_rng(8)
    captions = {scenes.caption(Scene("dusk", (house, sun), relation="below"), rng) for _ in range(200)}
    assert {"a red house under a yellow sun at dusk", "at dusk, a yellow sun over a red house"} <= captions
    assert all(("house" in text.split("sun")[0]) == ("under" in text or "below" in text) for text in captions)


def coloured_kinds(scene: Scene) -> list[tuple[str, str]]:
    return [(thing.kind, thing.colour) for thing in scene.things]


def test_training_scenes_hold_nothing_held_out() -> None:
    for scene in some_scenes(9, 3000):
        assert not any(scenes.held_out_triple(kind, colour, scene.background) for kind, colour in coloured_kinds(scene))
        assert not any(scenes.held_out_pair(*pair) for pair in combinations(coloured_kinds(scene), 2))


def test_held_out_scenes_are_all_held_out() -> None:
    for scene in some_scenes(10, 300, "held_out", 1):
        assert scenes.held_out_triple(*coloured_kinds(scene)[0], scene.background)
    for scene in some_scenes(11, 300, "held_out", 2):
        assert scenes.held_out_pair(*coloured_kinds(scene))


def test_a_tenth_is_held_out_and_always_the_same_tenth() -> None:
    coloured = list(product(scenes.KINDS, scenes.COLOURS))
    triples = [(*thing, background) for thing in coloured for background in scenes.BACKGROUNDS]
    pairs = list(combinations(coloured, 2))
    assert sum(scenes.held_out_triple(*triple) for triple in triples) == 111  # of 1024
    assert sum(scenes.held_out_pair(*pair) for pair in pairs) == 820  # of 8128
    assert all(scenes.held_out_pair(*pair) == scenes.held_out_pair(*pair[::-1]) for pair in pairs[:500])


def test_drawing_is_deterministic_and_of_any_size() -> None:
    for scene in some_scenes(12, 20):
        assert np.array_equal(scenes.draw(scene), scenes.draw(scene))
    large = scenes.draw(Scene("night", (ROUND_RED,)), 256)
    assert large.shape == (256, 256, 3) and large.dtype == np.uint8


def test_sampling_depends_on_the_generator_alone() -> None:
    assert some_scenes(13, 20) == some_scenes(13, 20)


def test_things_stay_apart_and_inside_the_picture() -> None:
    for scene in some_scenes(14, 150, objects=2) + some_scenes(14, 100, objects=1):
        empty = scenes.draw(replace(scene, things=()))
        covered = [np.any(scenes.draw(replace(scene, things=(thing,))) != empty, -1) for thing in scene.things]
        assert not np.logical_and.reduce(covered).any() or len(covered) == 1
        for mask in covered:
            assert not (mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any())


@pytest.mark.parametrize("colour, background", list(product(scenes.COLOURS, scenes.BACKGROUNDS)))
def test_every_colour_stands_out_from_every_background(colour: str, background: str) -> None:
    empty = scenes.draw(Scene(background, ())).astype(float)
    distances = np.linalg.norm(empty - scenes.COLOURS[colour], axis=-1)
    assert distances.min() > 60


def test_invalid_arguments_are_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="objects must be 1, 2 or None, got 3"):
        scenes.sample_scene(rng, objects=3)
    with pytest.raises(ValueError, match="background must be one of white, .*, got 'noon'"):
        scenes.draw(Scene("noon", ()))
    with pytest.raises(ValueError, match="image must be uint8"):
        scenes.look(np.zeros((128, 128), np.uint8))
