"""The training loop without a network: what it resumes and what it refuses. tests/on_cluster trains a network."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cluster.cli import UsageError, UserError
from demo.training.loop import State, adamw, claim_folder, initial_state, leaves_of, make_step, train
from demo.training.recipe import Recipe

pytestmark = pytest.mark.slow

RECIPE = Recipe(checkpoint_steps=20)


def trained(work: Path, steps: int, recipe: Recipe = RECIPE, factor: float = 1.0) -> State:
    """A line through noise: the batch depends on the step's number, the noise on its key."""
    optimizer = adamw(0.1, 100, 5)

    def loss_of(params: State, batch: jax.Array, key: jax.Array) -> jax.Array:
        return jnp.mean((params["a"] * batch + jax.random.normal(key, batch.shape) - 3 * batch) ** 2) * factor

    step = make_step(loss_of, optimizer, ema=0.9)
    state = initial_state({"a": jnp.zeros(())}, optimizer)
    return train("vae", work, recipe, state, step, lambda number: jnp.full(8, 1.0 + number % 3), steps)


def test_a_training_that_was_cut_short_ends_as_one_that_was_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("whole", "cut"):
        (tmp_path / folder).mkdir()
    whole = trained(tmp_path / "whole", 100)
    capsys.readouterr()
    trained(tmp_path / "cut", 50)  # saved at 20, 40 and 50
    resumed = trained(tmp_path / "cut", 100)
    assert "VAE: goes on after step 50 of 100" in capsys.readouterr().out
    assert all(np.array_equal(a, b) for a, b in zip(leaves_of(whole), leaves_of(resumed), strict=True))
    assert 2 < float(resumed["params"]["a"]) < 3.5
    steps = [json.loads(line)["step"] for line in (tmp_path / "cut" / "vae.jsonl").read_text().splitlines()]
    assert steps == [50, 100]
    trained(tmp_path / "cut", 100)
    assert capsys.readouterr().out == "VAE: trained before\n"


def test_a_loss_that_is_no_number_ends_it_and_is_not_saved(tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, checkpoint_steps=1000)
    with pytest.raises(UserError, match="VAE: the loss is nan at step 50"):
        trained(tmp_path, 60, recipe, factor=float("nan"))
    assert not (tmp_path / "vae.msgpack").exists()


def test_checkpoints_of_another_training_are_refused(tmp_path: Path) -> None:
    claim_folder(tmp_path, RECIPE, None)
    claim_folder(tmp_path, dataclasses.replace(RECIPE, checkpoint_steps=7), None)  # the result is the same
    with pytest.raises(UsageError, match=r"differs in unet_batch \(64, here 8\)\.$"):
        claim_folder(tmp_path, dataclasses.replace(RECIPE, unet_batch=8), None)
    with pytest.raises(UsageError, match=r"architecture \(bundled, here tiny\)"):
        claim_folder(tmp_path, dataclasses.replace(RECIPE, architecture="tiny"), None)
    with pytest.raises(UsageError, match=r"differs in start_from \(None, here .*\)\.$"):
        claim_folder(tmp_path, RECIPE, tmp_path)


def test_a_folder_from_before_an_option_existed_is_resumed(tmp_path: Path) -> None:
    claim_folder(tmp_path, RECIPE, None)
    file = tmp_path / "recipe.json"
    saved = json.loads(file.read_text())
    del saved["architecture"]
    file.write_text(json.dumps(saved))
    claim_folder(tmp_path, RECIPE, None)
