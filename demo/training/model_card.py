"""Writes the model card: what the networks are, how they were trained, and the curves of their losses."""

import json
import os
from itertools import pairwise
from pathlib import Path

import jax
from flax import nnx

from demo import scenes
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


def write_card(
    out: Path,
    work: Path,
    recipe: Recipe,
    networks: dict[str, nnx.Module],
    started_from: Path | None,
    averaged: bool,
) -> None:
    """Writes the card and its figure. The rows of `started_from`'s card about its own training are kept."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    earlier = card_rows(started_from) if started_from else {}
    curves = {}
    for stage in STAGES:
        file = work / f"{stage}.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        if lines:
            curves[stage] = {line["step"]: line for line in lines}  # a resumed run repeats a few: the last counts
    if curves:
        figure, axes = pyplot.subplots(
            1, len(curves), figsize=(4 * len(curves), 3), layout="constrained", squeeze=False
        )
        for axis, stage in zip(axes[0], curves, strict=True):
            axis.semilogy(list(curves[stage]), [line["loss"] for line in curves[stage].values()])
            axis.set(title=STAGES[stage], xlabel="step", ylabel="loss")
            axis.grid(alpha=0.3, which="both")
        figure.savefig(out / "loss.png", dpi=100)

    def trained(stage: str, how: str) -> str:
        if stage not in curves:
            return earlier.get(STAGES[stage], "kept as it was")
        curve = curves[stage]  # `seconds` is the mean of the run so far
        minutes = sum((step - last) * curve[step]["seconds"] for last, step in pairwise([0, *curve])) / 60
        done = f"{max(curve, default=0)} steps of {how}, {minutes:.0f} minutes"
        before = earlier.get(STAGES[stage])
        return f"{before}; then, from those weights: {done}" if before else done

    sizes = {
        name: sum(leaf.size for leaf in jax.tree.leaves(nnx.state(network, nnx.Param)))
        for name, network in networks.items()
    }
    rows = {
        "parameters": ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in sizes.items()),
        "pictures": f"128x128; latents 16x16x{ARCHITECTURES[recipe.architecture].vae.latent_channels}",
        "data": f"drawn by demo/scenes: {len(scenes.KINDS)} things, {len(scenes.COLOURS)} colours, "
        f"{len(scenes.BACKGROUNDS)} backgrounds, one or two things with a relation; about a tenth of the "
        "combinations is held out",
        STAGES["vae"]: trained("vae", f"{recipe.vae_batch} fresh pictures"),
        STAGES["text"]: trained("text", f"{recipe.text_batch} fresh captions, predicting what is where"),
        STAGES["unet"]: trained(
            "unet",
            f"{recipe.unet_batch} latents out of a pool of {recipe.pool}, v-prediction, "
            f"{recipe.prompt_dropout:.0%} of prompts dropped{', and averaged with its start' * averaged}",
        ),
        STAGES["decoder"]: trained("decoder", f"{recipe.vae_batch} fresh pictures with the encoder fixed"),
        "machine": f"{os.cpu_count()} CPU cores, shared with other work",
        "licence": "Apache-2.0, weights and pictures; nothing was trained on anybody's work but the drawing program's",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    (out / "README.md").write_text(CARD.format(table=table), "utf-8")


def card_rows(folder: Path) -> dict[str, str]:
    """The rows of a card's table, by their first column."""
    file = folder / "README.md"
    cells = [line.strip("| ").split(" | ") for line in file.read_text("utf-8").splitlines()] if file.exists() else []
    return {row[0]: row[1] for row in cells if len(row) == 2}
