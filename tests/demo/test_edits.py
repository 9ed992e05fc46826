"""The judge of edits, on pictures that are drawn instead of generated."""

from dataclasses import replace

import numpy as np
import pytest

from app.types import Pixels
from demo import scenes
from demo.edits import LEVELS, Task, judge

SCENE = scenes.Scene("day", (scenes.Thing("boat", "red", 0.45, 0.55, 0.5),))
WANTED = replace(SCENE, things=(replace(SCENE.things[0], colour="blue"),))


@pytest.fixture(scope="module")
def task() -> Task:
    picture = scenes.draw(SCENE)
    return Task(picture, scenes.look(picture).things[0], "a red boat by day", WANTED, "a blue boat by day")


def moved(**changes: object) -> Pixels:
    return scenes.draw(replace(WANTED, things=(replace(WANTED.things[0], **changes),)))  # type: ignore[arg-type]


def test_the_same_thing_in_the_new_colour_is_right(task: Task) -> None:
    outcome = judge(task, scenes.draw(WANTED), masked=True)
    assert outcome.right and outcome.seen == "blue boat, day background"
    assert 0.2 < task.mask.mean() < 0.5 and task.mask[70, 57] and not task.mask[5, 5]


def test_each_claim_can_fail(task: Task) -> None:
    failed = {
        "coloured": judge(task, scenes.draw(SCENE), masked=True),
        "same": judge(task, moved(kind="fish"), masked=False),
        "kept": judge(task, scenes.draw(replace(WANTED, background="dusk")), masked=False),
    }
    for claim, outcome in failed.items():
        assert not getattr(outcome, claim) and not outcome.right
    assert not judge(task, moved(x=0.7), masked=False).same and not judge(task, moved(size=0.3), masked=False).same


def test_outside_a_mask_no_pixel_may_change_by_more_than_two_levels(task: Task) -> None:
    picture = scenes.draw(WANTED)
    for levels, kept in ((LEVELS["mask"], True), (LEVELS["mask"] + 1, False)):
        changed = picture.copy()
        changed[2, 2] = np.clip(picture[2, 2].astype(int) - levels, 0, 255)
        assert judge(task, changed, masked=True).kept == kept
