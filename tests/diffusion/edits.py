"""Draws pictures that begin from others, as diffusers drew them for tests/golden/*-edits.npz."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from app.diffusion import device_programs
from app.diffusion.pipeline import Pipeline
from app.types import ActiveSlot, Edit
from tests import edit_cases
from tests.edit_cases import EditRun

GOLDEN = Path(__file__).parents[1] / "golden"


def recorded_noise(monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    """For programs that are compiled from then on. A seed is a picture's number in the recorded noise."""
    noises = jnp.asarray(edit_cases.noises(model))
    monkeypatch.setattr(device_programs, "slot_noise", lambda seed, number, shape: noises[number, seed])


def edited(pipeline: Pipeline, model: str, run: EditRun, prompts: Sequence[Any], negatives: Sequence[Any]) -> Any:
    """Two pictures, one after the other."""
    size, looks = pipeline.sizes[0], pipeline.capabilities.references > 0
    table = pipeline.table(run.sampler, run.steps, size, run.strength)
    state = pipeline.empty_state(size)
    mask = edit_cases.mask(model) if run.masked else None
    references = tuple(edit_cases.references(model)[: run.references])
    pictures = []
    for slot, image in enumerate(edit_cases.images(model)):
        beginning = None if run.strength is None else image
        edit = pipeline.encode_image(Edit(beginning, mask, run.strength, references), size)
        texts = prompts[slot], negatives[slot]
        state = pipeline.insert(state, slot, *texts, table, run.guidance_scale, slot, edit=edit)
        state, _ = pipeline.step(state, [ActiveSlot(slot, run.guidance_scale > 1, looks)], len(table))
        pictures.append(np.asarray(pipeline.decode(state, [slot]))[0])
    return np.stack(pictures)


def assert_edits_are_those_of_diffusers(
    pipeline: Pipeline,
    model: str,
    prompts: Sequence[Any],
    negatives: Sequence[Any],
    recorded: tuple[str, Sequence[EditRun]] | None = None,
) -> None:
    """`recorded` is a golden file with its runs, by default those of the model's edits."""
    name, runs = recorded or (f"{model}-edits", edit_cases.RUNS[model])
    with np.load(GOLDEN / f"{name}.npz") as golden:
        for run in runs:
            ours = edited(pipeline, model, run, prompts, negatives).astype(int)
            apart = np.abs(ours - golden[str(run)])
            assert (apart <= 1).all(axis=-1).mean() >= 0.999, f"{run}: {apart.max()} grey levels apart"
