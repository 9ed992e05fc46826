"""demo/train.py without a network: what is resumed, what is refused. test_jobs.py trains one."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cluster.terminal import Stop
from demo.train import Recipe, State, adamw, hold, make_step, pure, start, train
from jobs.entry import Invalid

RECIPE = Recipe(checkpoint_steps=20)


def trained(work: Path, steps: int, recipe: Recipe = RECIPE, spoiled: float = 1.0) -> State:
    """A line through noise: the batch depends on the step's number, the noise on its key."""
    optimizer = adamw(0.1, 100, 5)

    def loss_of(params: State, batch: jax.Array, key: jax.Array) -> jax.Array:
        return jnp.mean((params["a"] * batch + jax.random.normal(key, batch.shape) - 3 * batch) ** 2) * spoiled

    step = make_step(loss_of, optimizer, ema=0.9)
    state = start({"a": jnp.zeros(())}, optimizer)
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
    assert all(np.array_equal(a, b) for a, b in zip(pure(whole), pure(resumed), strict=True))
    assert 2 < float(resumed["params"]["a"]) < 3.5
    steps = [json.loads(line)["step"] for line in (tmp_path / "cut" / "vae.jsonl").read_text().splitlines()]
    assert steps == [50, 100]
    trained(tmp_path / "cut", 100)
    assert capsys.readouterr().out == "VAE: trained before\n"


def test_a_loss_that_is_no_number_ends_it_and_is_not_saved(tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, checkpoint_steps=1000)
    with pytest.raises(Stop, match="VAE: the loss is nan at step 50"):
        trained(tmp_path, 60, recipe, spoiled=float("nan"))
    assert not (tmp_path / "vae.msgpack").exists()


def test_checkpoints_of_another_training_are_refused(tmp_path: Path) -> None:
    hold(tmp_path, RECIPE, None)
    hold(tmp_path, dataclasses.replace(RECIPE, checkpoint_steps=7), None)  # the same pictures, saved at other times
    with pytest.raises(Invalid, match=r"differs in unet_batch \(64, here 8\)\.$"):
        hold(tmp_path, dataclasses.replace(RECIPE, unet_batch=8), None)
    with pytest.raises(Invalid, match=r"differs in start_from \(None, here .*\)\.$"):
        hold(tmp_path, RECIPE, tmp_path)
