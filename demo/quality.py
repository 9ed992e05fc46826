"""Measures the demo model: pictures from captions that its training never saw, judged by a program.

    python -m demo.quality            # prints the table; exit 1 where a bar is missed

The captions are drawn from the held-out combinations of demo/scenes.py, the judge is `scenes.check`, and the pictures
come from the engine that is served. Everything is fixed by --seed, so two runs print the same table.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from app.diffusion.images import contact_sheet
from app.diffusion.pipeline import Pipeline
from app.engine.engine import Engine
from app.types import Generation
from cluster.terminal import Progress, Stop, say
from demo import scenes
from jobs.entry import Invalid, Parser, path, run, whole

SIZE = (128, 128)


@dataclasses.dataclass(frozen=True)
class Judged:
    scene: scenes.Scene
    caption: str
    picture: np.ndarray
    verdict: scenes.Verdict


@dataclasses.dataclass(frozen=True)
class Bar:
    """One line of the table: the share of captions that must satisfy `claim`."""

    objects: int
    name: str
    claim: Callable[[scenes.Verdict], bool]
    least: float | None  # None: reported, no bar

    @property
    def captions(self) -> str:
        return f"{self.objects} object{'s' * (self.objects > 1)}"

    def of(self, judged: Sequence[tuple[scenes.Scene, scenes.Verdict]]) -> tuple[int, int]:
        """How many captions of so many satisfy it."""
        held = [self.claim(verdict) for scene, verdict in judged if len(scene.things) == self.objects]
        return sum(held), len(held)


BARS = (
    Bar(1, "background", lambda v: v.background, 0.98),
    Bar(1, "colour", lambda v: all(v.colours), 0.98),
    Bar(1, "thing", lambda v: all(v.kinds), 0.97),
    Bar(1, "everything said", lambda v: v.right, None),
    Bar(2, "background", lambda v: v.background, None),
    Bar(2, "colours", lambda v: all(v.colours), None),
    Bar(2, "things", lambda v: all(v.kinds), None),
    Bar(2, "relation", lambda v: bool(v.relation), None),
    Bar(2, "everything said", lambda v: v.right, 0.85),
)


def main() -> str:
    parser = Parser(__doc__)
    parser.add_argument("--model", type=path, default="assets/demo-model", help="folder (%(default)s)")
    parser.add_argument("--count", type=whole(1, 10_000), default=200, help="captions of each kind (%(default)s)")
    parser.add_argument("--steps", type=whole(1, 1000), default=20, help="num_inference_steps (%(default)s)")
    parser.add_argument("--guidance-scale", type=float, default=4.0, help="(%(default)s)")
    parser.add_argument("--sampler", default=None, help="(the checkpoint's own)")
    parser.add_argument("--split", choices=("held_out", "train"), default="held_out", help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--out", type=path, default="outputs/demo-quality", help="sheets (%(default)s)")
    args = parser.parse_args()

    try:
        pipeline = Pipeline.load(str(args.model), sizes=[SIZE], batch_buckets=[8], max_steps=args.steps)
        pipeline.table(args.sampler, args.steps)
    except ValueError as error:
        raise Invalid(str(error)) from None
    wanted = captions(args.split, args.count, args.seed)
    pipeline.warmup()
    engine = Engine(pipeline, max_waiting=len(wanted))
    prompts = [caption for _, caption in wanted]
    pictures = draw(engine, args.sampler, args.steps, prompts, args.guidance_scale, args.seed)
    judged = [
        Judged(scene, caption, picture, scenes.check(picture, scene))
        for (scene, caption), picture in zip(wanted, pictures, strict=True)
    ]
    passed = report(
        judged,
        f"{args.sampler or pipeline.default_sampler}, {args.steps} steps, guidance "
        f"{args.guidance_scale:g}, {args.split} captions, seed {args.seed}",
    )
    save_sheets(judged, args.out)
    if not passed:
        raise Stop(f"A bar was missed. What failed stands in {args.out}.")
    return f"All bars are met. Sheets of the pictures stand in {args.out}."


def captions(split: scenes.Split, count: int, seed: int) -> list[tuple[scenes.Scene, str]]:
    """`count` one-object scenes and `count` two-object scenes, with their captions."""
    rng = np.random.default_rng([seed, 99])
    drawn = [scenes.sample_scene(rng, split, objects) for objects in (1, 2) for _ in range(count)]
    return [(scene, scenes.caption(scene, rng)) for scene in drawn]


def draw(
    engine: Engine, sampler: str | None, steps: int, prompts: Sequence[str], guidance_scale: float, seed: int
) -> list[np.ndarray]:
    """One picture for each prompt, by the engine that is served."""
    engine.start()
    (width, height) = SIZE
    futures = [
        engine.submit(Generation(prompt, "", width, height, steps, guidance_scale, seed + number, sampler, n=1))
        for number, prompt in enumerate(prompts)
    ]
    pictures = []
    try:
        with Progress() as progress:
            for number, future in enumerate(futures, start=1):
                pictures.append(future.result().pixels[0])
                progress.show({"pictures": ("drawing", f"{number} of {len(futures)}")})
    finally:
        engine.close()
    return pictures


def report(judged: Sequence[Judged], setting: str) -> bool:
    """Prints the table; whether every bar is met."""
    table = Table(title=f"Demo model: {setting}")
    for heading in ("captions", "claim", "right", "share", "bar", ""):
        table.add_column(heading)
    verdicts = [(one.scene, one.verdict) for one in judged]
    passed = True
    for bar in BARS:
        right, total = bar.of(verdicts)
        share = right / total
        met = bar.least is None or share >= bar.least
        passed &= met
        table.add_row(
            bar.captions,
            bar.name,
            f"{right}/{total}",
            f"{share:.1%}",
            "" if bar.least is None else f"{bar.least:.0%}",
            "" if bar.least is None else "met" if met else "MISSED",
        )
    Console(width=100).print(table)
    return passed


def save_sheets(judged: Sequence[Judged], out: Path) -> None:
    """All that failed, with what was seen instead; and a sample of everything."""
    out.mkdir(parents=True, exist_ok=True)
    failures = [one for one in judged if not one.verdict.right]
    sample = judged[:: max(1, len(judged) // 40)]
    for name, chosen in (("failures", failures), ("sample", sample)):
        if chosen:
            notes = [
                one.caption if one.verdict.right else f"{one.caption} (seen: {one.verdict.seen})" for one in chosen
            ]
            contact_sheet([one.picture for one in chosen], notes, columns=8, cell=128).save(out / f"{name}.png")
            say(f"{len(chosen)} in {out / f'{name}.png'}")


if __name__ == "__main__":
    run(main)
