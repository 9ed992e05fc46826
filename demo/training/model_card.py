"""Writes the model cards: what the networks are, how they were trained, and the curves of their losses."""

import json
import os
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from demo import scenes
from demo.training.flow_recipe import FLOW_STAGES, FlowRecipe
from demo.training.networks import ARCHITECTURES
from demo.training.recipe import STAGES, Recipe

CARD = """# The demo model

A latent diffusion model small enough for a laptop's CPU and this repository: simple scenes from captions such as
"a red house under a yellow sun at dusk". It exists to show the server at work and to test it, in the same layout
and on the same code path as Stable Diffusion; it knows only the words of its captions.

| what | how |
|---|---|
{table}

![The losses of the trainings](loss.png)

Made by `python -m demo.train` (`make train-demo`), whose options are the recipe; where the table lists
more than one training, each later one began with `--start-from`, from the weights of the one before.
`make demo-quality` measures it on captions from the held-out combinations and prints the table that the project's
README shows.
"""


FLOW_CARD = """# The flow demo model

A flow-matching transformer of FLUX.2-klein's form, small enough for a laptop's CPU and this repository: the scenes of
the [demo model](../demo-model/README.md) in 8 steps, in the same layout and on the same code path as FLUX.2-klein.

| what | how |
|---|---|
{table}

![The loss of the last training, with the probe's](loss.png)

Made by `python -m demo.train_flow` (`make train-flow`), whose options are the recipe; where the table lists more than
one training, each later one began with `--start-from`, from the weights of the one before.
"""
DATA = (
    f"drawn by demo/scenes: {len(scenes.KINDS)} things, {len(scenes.COLOURS)} colours, "
    f"{len(scenes.BACKGROUNDS)} backgrounds, one or two things with a relation; about a tenth of the "
    "combinations is held out"
)
LICENCE = "Apache-2.0, weights and pictures; nothing was trained on anybody's work but the drawing program's"
Curve = dict[int, dict[str, float]]


def write_card(
    out: Path,
    work: Path,
    recipe: Recipe,
    networks: Mapping[str, nnx.Module],
    started_from: Path | None,
    averaged: bool,
) -> None:
    """Writes the demo model's card and its figure. The rows of `started_from`'s card about its training are kept."""
    latents = f"128x128; latents 16x16x{ARCHITECTURES[recipe.architecture].vae.latent_channels}"
    how = {
        "vae": f"{recipe.vae_batch} fresh pictures",
        "text": f"{recipe.text_batch} fresh captions, predicting what is where",
        "unet": f"{recipe.unet_batch} latents out of a pool of {recipe.pool}, v-prediction, "
        f"{recipe.prompt_dropout:.0%} of prompts dropped{', and averaged with its start' * averaged}",
        "decoder": f"{recipe.vae_batch} fresh pictures with the encoder fixed",
    }
    write(out, work, CARD, networks, latents, how, STAGES, started_from)


def write_flow_card(
    out: Path, work: Path, recipe: FlowRecipe, networks: Mapping[str, nnx.Module], started_from: Path | None
) -> None:
    """Writes the flow model's card and its figure, with the rows of `started_from`'s card as write_card does."""
    how = {
        "flow": f"{recipe.batch} latents out of a pool of {recipe.pool}, Muon at {recipe.learning_rate:g}, patches "
        f"with things weighing {recipe.thing_weight:g}, {recipe.prompt_dropout:.0%} of prompts dropped"
    }
    write(out, work, FLOW_CARD, networks, "128x128; patches 8x8x32 of latents 16x16x8", how, FLOW_STAGES, started_from)


def write(
    out: Path,
    work: Path,
    card: str,
    networks: Mapping[str, nnx.Module],
    pictures: str,
    how: Mapping[str, str],
    titles: Mapping[str, str],
    started_from: Path | None,
) -> None:
    """Writes README.md and loss.png. `how` tells of each stage; a stage without losses in `work` was kept."""
    earlier = card_rows(started_from) if started_from else {}
    curves = {stage: curve for stage in titles if (curve := curve_of(work / f"{stage}.jsonl"))}
    if curves:
        draw_curves(out / "loss.png", {titles[stage]: curve for stage, curve in curves.items()})

    def trained(stage: str) -> str:
        before = earlier.get(titles[stage])
        if stage not in curves:
            return before or "kept as it was"
        curve = curves[stage]  # `seconds` is the mean of the run so far
        minutes = sum((step - last) * curve[step]["seconds"] for last, step in pairwise([0, *curve])) / 60
        done = f"{max(curve, default=0)} steps of {how[stage]}, {minutes:.0f} minutes"
        return f"{before}; then, from those weights: {done}" if before else done

    sizes = {
        name: sum(leaf.size for leaf in jax.tree.leaves(nnx.state(network, nnx.Param)))
        for name, network in networks.items()
    }
    rows: dict[str, str] = {
        "parameters": ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in sizes.items()),
        "pictures": pictures,
        "data": DATA,
        **{title: trained(stage) for stage, title in titles.items()},
        "machine": f"{os.cpu_count()} CPU cores, shared with other work",
        "licence": LICENCE,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    (out / "README.md").write_text(card.format(table=table), "utf-8")


def curve_of(file: Path) -> Curve:
    """The lines of a stage's losses by their steps; a resumed run repeats a few, of which the last counts."""
    lines: list[dict[str, Any]] = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return {line["step"]: line for line in lines}


def draw_curves(file: Path, curves: Mapping[str, Curve]) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves), figsize=(4 * len(curves), 3), layout="constrained", squeeze=False)
    for axis, (title, curve) in zip(axes[0], curves.items(), strict=True):
        axis.semilogy(list(curve), [line["loss"] for line in curve.values()])
        axis.set(title=title, xlabel="step", ylabel="loss")
        axis.grid(alpha=0.3, which="both")
    figure.savefig(file, dpi=100)


def card_rows(folder: Path) -> dict[str, str]:
    """The rows of a card's table, by their first column."""
    file = folder / "README.md"
    cells = [line.strip("| ").split(" | ") for line in file.read_text("utf-8").splitlines()] if file.exists() else []
    return {row[0]: row[1] for row in cells if len(row) == 2}
