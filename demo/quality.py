"""Measures the demo model: a program judges its pictures of captions that its training never saw.

    python -m demo.quality            # prints the table; exit status 1 if a bar is missed

The captions describe held-out combinations of demo/scenes, and the judge is `scenes.check`. The engine that is served
generates the pictures. --seed fixes everything, so two runs print the same table.
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
from app.types import Generation, PipelineSpec
from cluster.cli import Parser, UsageError, UserError, integer_between
from cluster.terminal import Progress, say
from demo import scenes
from jobs.entry import path, run

SIZE = (128, 128)


@dataclasses.dataclass(frozen=True)
class Sample:
    """A caption, the picture that was generated from it, and what the judge says of that."""

    scene: scenes.Scene
    caption: str
    picture: np.ndarray
    verdict: scenes.Verdict


@dataclasses.dataclass(frozen=True)
class Bar:
    """A row of the table: the share of captions for which `holds` must be true."""

    objects: int
    name: str
    holds: Callable[[scenes.Verdict], bool]
    required: float | None  # None: reported only

    @property
    def captions(self) -> str:
        return f"{self.objects} object{'s' * (self.objects > 1)}"

    def count(self, judged: Sequence[tuple[scenes.Scene, scenes.Verdict]]) -> tuple[int, int]:
        """The number of captions that meet it, and the number of all with so many objects."""
        outcomes = [self.holds(verdict) for scene, verdict in judged if len(scene.things) == self.objects]
        return sum(outcomes), len(outcomes)


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
    parser.add_argument(
        "--count", type=integer_between(1, 10_000), default=200, help="captions of each kind (%(default)s)"
    )
    parser.add_argument("--steps", type=integer_between(1, 1000), default=20, help="num_inference_steps (%(default)s)")
    parser.add_argument("--guidance-scale", type=float, default=4.0, help="(%(default)s)")
    parser.add_argument("--sampler", default=None, help="(the checkpoint's own)")
    parser.add_argument("--split", choices=("held_out", "train"), default="held_out", help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--out", type=path, default="outputs/demo-quality", help="sheets (%(default)s)")
    args = parser.parse_args()

    try:
        pipeline = Pipeline.load(PipelineSpec(str(args.model), sizes=(SIZE,), batch_buckets=(8,), max_steps=args.steps))
        pipeline.table(args.sampler, args.steps)
    except ValueError as error:
        raise UsageError(str(error)) from None
    captioned = captions(args.split, args.count, args.seed)
    pipeline.warmup()
    engine = Engine(pipeline, max_waiting=len(captioned))
    prompts = [caption for _, caption in captioned]
    pictures = generate(engine, args.sampler, args.steps, prompts, args.guidance_scale, args.seed)
    samples = [
        Sample(scene, caption, picture, scenes.check(picture, scene))
        for (scene, caption), picture in zip(captioned, pictures, strict=True)
    ]
    passed = report(
        samples,
        f"{args.sampler or pipeline.default_sampler}, {args.steps} steps, guidance "
        f"{args.guidance_scale:g}, {args.split} captions, seed {args.seed}",
    )
    save_sheets(samples, args.out)
    if not passed:
        raise UserError(f"A bar was missed. What failed stands in {args.out}.")
    return f"All bars are met. Sheets of the pictures stand in {args.out}."


def captions(split: scenes.Split, count: int, seed: int) -> list[tuple[scenes.Scene, str]]:
    """`count` one-object scenes and `count` two-object scenes, with their captions."""
    rng = np.random.default_rng([seed, 99])
    sampled = [scenes.sample_scene(rng, split, objects) for objects in (1, 2) for _ in range(count)]
    return [(scene, scenes.caption(scene, rng)) for scene in sampled]


def generate(
    engine: Engine, sampler: str | None, steps: int, prompts: Sequence[str], guidance_scale: float, seed: int
) -> list[np.ndarray]:
    """Generates one picture for each prompt."""
    engine.start()
    try:
        return pictures_of(engine, generations(sampler, steps, prompts, guidance_scale, seed))
    finally:
        engine.close()


def generations(
    sampler: str | None, steps: int, prompts: Sequence[str], guidance_scale: float, seed: int
) -> list[Generation]:
    """One for each prompt, with consecutive seeds."""
    return [
        Generation(prompt, "", *SIZE, steps, guidance_scale, seed + number, sampler, n=1)
        for number, prompt in enumerate(prompts)
    ]


def pictures_of(engine: Engine, generations: Sequence[Generation]) -> list[np.ndarray]:
    """The first picture of each."""
    futures = [engine.submit(generation) for generation in generations]
    pictures = []
    with Progress() as progress:
        for number, future in enumerate(futures, start=1):
            pictures.append(future.result().pixels[0])
            progress.show({"pictures": ("drawing", f"{number} of {len(futures)}")})
    return pictures


def report(samples: Sequence[Sample], title: str) -> bool:
    """Prints the table. Returns whether every bar is met."""
    table = Table(title=f"Demo model: {title}")
    for heading in ("captions", "claim", "right", "share", "bar", ""):
        table.add_column(heading)
    verdicts = [(sample.scene, sample.verdict) for sample in samples]
    passed = True
    for bar in BARS:
        right, total = bar.count(verdicts)
        share = right / total
        met = bar.required is None or share >= bar.required
        passed &= met
        table.add_row(
            bar.captions,
            bar.name,
            f"{right}/{total}",
            f"{share:.1%}",
            "" if bar.required is None else f"{bar.required:.0%}",
            "" if bar.required is None else "met" if met else "MISSED",
        )
    Console(width=100).print(table)
    return passed


def save_sheets(samples: Sequence[Sample], out: Path) -> None:
    """Saves two sheets: what failed, with what the judge saw instead; and a selection of all samples."""
    out.mkdir(parents=True, exist_ok=True)
    failures = [sample for sample in samples if not sample.verdict.right]
    selection = samples[:: max(1, len(samples) // 40)]
    for name, chosen in (("failures", failures), ("sample", selection)):
        if chosen:
            notes = [
                sample.caption if sample.verdict.right else f"{sample.caption} (seen: {sample.verdict.seen})"
                for sample in chosen
            ]
            contact_sheet([sample.picture for sample in chosen], notes, columns=8, cell=128).save(out / f"{name}.png")
            say(f"{len(chosen)} in {out / f'{name}.png'}")


if __name__ == "__main__":
    run(main)
