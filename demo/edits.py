"""Edits pictures of the demo model, and a program judges them: another colour, the same thing, the rest as it was.

    python -m demo.edits              # prints the table; exit status 1 if a bar is missed

Each edit begins with a picture that the model drew, and that `scenes.check` finds right. Its prompt is the caption
with another colour. It is edited as a whole, by image-to-image, and within a mask over the thing. The engine that is
served makes all pictures. --seed fixes everything, so two runs print the same table.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from app.diffusion.images import contact_sheet
from app.diffusion.pipeline import Pipeline
from app.engine.engine import Engine
from app.types import Edit, Generation, Mask, PipelineSpec, Pixels
from cluster.cli import Parser, UserError, integer_between
from cluster.terminal import say
from demo import scenes
from demo.quality import SIZE, pictures_of
from demo.scenes.recognition import Sighting
from jobs.entry import path, run

STRENGTHS = (0.6, 0.7, 0.8)  # of which the best counts
BAR = 0.9  # of the edits
MARGIN = 0.06  # of the picture, around the thing in a mask
SHIFT = 0.08  # of the picture: as far as a thing may move, or grow, and still be the same
LEVELS = {"image": 16, "mask": 2}  # grey levels: by how much the rest may change, on average, and at most
STEPS, GUIDANCE = 20, 4.0


@dataclasses.dataclass(frozen=True)
class Task:
    """A picture and what it should become."""

    picture: Pixels
    thing: Sighting
    caption: str
    wanted: scenes.Scene
    prompt: str

    @property
    def mask(self) -> Mask:
        """A square over the thing, as somebody would draw it by hand."""
        half = self.thing.size / 2 + MARGIN
        side = self.picture.shape[0]
        rows, columns = (
            np.abs((np.arange(side) + 0.5) / side - centre) < half for centre in (self.thing.y, self.thing.x)
        )
        return np.asarray(rows[:, None] & columns[None, :], bool)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the judge says of an edit."""

    coloured: bool  # the thing has the new colour
    same: bool  # it is the same thing, where it was
    kept: bool  # the rest is as it was
    seen: str

    @property
    def right(self) -> bool:
        return self.coloured and self.same and self.kept


def main() -> str:
    parser = Parser(__doc__)
    parser.add_argument("--model", type=path, default="assets/demo-model", help="folder (%(default)s)")
    parser.add_argument("--count", type=integer_between(1, 1000), default=100, help="edits of each kind (%(default)s)")
    parser.add_argument("--strengths", type=float, nargs="+", default=STRENGTHS, help="of edits of a whole picture")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--out", type=path, default="outputs/demo-edits", help="sheets (%(default)s)")
    args = parser.parse_args()

    spec = PipelineSpec(str(args.model), sizes=(SIZE,), batch_buckets=(8,), max_steps=STEPS, edits=True)
    pipeline = Pipeline.load(spec)
    pipeline.warmup()
    engine = Engine(pipeline, max_waiting=4 * args.count, stall_s=600)  # the machine may be busy
    engine.start()
    table = Table(title=f"Edits of the demo model: {STEPS} steps, guidance {GUIDANCE:g}, seed {args.seed}")
    for heading in ("edit", "colour changed", "thing kept", "rest kept", "all three", "bar", ""):
        table.add_column(heading)
    shares: list[float] = []
    try:
        tasks = tasks_of(engine, args.count, args.seed)
        for strength in args.strengths:
            shares.append(row(table, engine, tasks, args.seed, args.out, strength))
        shares.append(row(table, engine, tasks, args.seed, args.out, None))
    finally:
        engine.close()
    Console(width=120).print(table)
    if min(max(shares[:-1]), shares[-1]) < BAR:
        raise UserError(f"A bar was missed. What failed stands in {args.out}.")
    return f"All bars are met. Sheets of the pictures stand in {args.out}."


def tasks_of(engine: Engine, count: int, seed: int) -> list[Task]:
    """The first `count` pictures in which the judge finds what the caption says."""
    rng = np.random.default_rng([seed, 7])
    tasks: list[Task] = []
    while len(tasks) < count:
        batch = [(scenes.sample_scene(rng, "train", 1), int(rng.integers(2**31))) for _ in range(count // 5 + 4)]
        captions = [worded(scene, words) for scene, words in batch]
        pictures = pictures_of(
            engine, [generation(text, words) for text, (_, words) in zip(captions, batch, strict=True)]
        )
        for (scene, words), caption, picture in zip(batch, captions, pictures, strict=True):
            seen = scenes.look(picture)
            if scenes.judge(seen, scene).right:
                colours = [colour for colour in scenes.COLOURS if colour != scene.things[0].colour]
                thing = dataclasses.replace(scene.things[0], colour=str(rng.choice(colours)))
                wanted = dataclasses.replace(scene, things=(thing,))
                tasks.append(Task(picture, seen.things[0], caption, wanted, worded(wanted, words)))
    return tasks[:count]


def worded(scene: scenes.Scene, words: int) -> str:
    """The same number gives scenes that differ in a colour the same words."""
    return scenes.caption(scene, np.random.default_rng(words))


def generation(prompt: str, seed: int, edit: Edit | None = None) -> Generation:
    width, height = SIZE
    return Generation(prompt, "", width, height, STEPS, GUIDANCE, seed, None, n=1, edit=edit)


def row(table: Table, engine: Engine, tasks: Sequence[Task], seed: int, out: Path, strength: float | None) -> float:
    """Adds a row to the table: edits of whole pictures with this strength, or within masks. Returns the right share."""
    edits = [Edit(task.picture, None if strength else task.mask, strength) for task in tasks]
    generations = [
        generation(task.prompt, seed + i, edit) for i, (task, edit) in enumerate(zip(tasks, edits, strict=True))
    ]
    pictures = pictures_of(engine, generations)
    outcomes = [judge(task, picture, masked=not strength) for task, picture in zip(tasks, pictures, strict=True)]
    save_sheet(out / (f"strength-{strength:g}.png" if strength else "mask.png"), tasks, pictures, outcomes)
    shares = [
        sum(claims) / len(claims)
        for claims in zip(*((o.coloured, o.same, o.kept, o.right) for o in outcomes), strict=True)
    ]
    name = f"the whole picture, strength {strength:g}" if strength else "within a mask"
    table.add_row(name, *(f"{share:.0%}" for share in shares), f"{BAR:.0%}", "met" if shares[-1] >= BAR else "MISSED")
    return shares[-1]


def judge(task: Task, picture: Pixels, *, masked: bool) -> Outcome:
    seen = scenes.look(picture)
    verdict = scenes.judge(seen, task.wanted)
    thing = min(seen.things, key=lambda thing: abs(thing.x - task.thing.x) + abs(thing.y - task.thing.y), default=None)
    stayed = thing is not None and all(
        abs(getattr(thing, name) - getattr(task.thing, name)) <= SHIFT for name in ("x", "y", "size")
    )
    changes = np.abs(picture.astype(int) - task.picture)[~task.mask]
    change = changes.max(initial=0) if masked else changes.mean()
    kept = verdict.background and change <= LEVELS["mask" if masked else "image"]
    return Outcome(all(verdict.colours), all(verdict.kinds) and verdict.count and stayed, bool(kept), verdict.seen)


def save_sheet(file: Path, tasks: Sequence[Task], pictures: Sequence[Pixels], outcomes: Sequence[Outcome]) -> None:
    """Pairs before and after: first what failed, then others."""
    order = sorted(range(len(tasks)), key=lambda i: outcomes[i].right)[:32]

    def notes() -> Iterator[tuple[Pixels, str]]:
        for i in order:
            yield tasks[i].picture, tasks[i].caption
            yield pictures[i], tasks[i].prompt + ("" if outcomes[i].right else f" (seen: {outcomes[i].seen})")

    file.parent.mkdir(parents=True, exist_ok=True)
    images, captions = zip(*notes(), strict=True)
    contact_sheet(images, captions, columns=8, cell=128).save(file)
    say(f"{sum(not outcome.right for outcome in outcomes)} of {len(outcomes)} failed: {file}")


if __name__ == "__main__":
    run(main)
