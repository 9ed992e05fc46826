"""The training loop that all stages share: optimizer, moving average, losses, and checkpoints to resume from."""

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import serialization

from cluster.cli import UsageError, UserError
from cluster.terminal import Progress, format_duration, say
from demo.training.files import write_json
from demo.training.flow_recipe import FLOW_STAGES, FlowRecipe
from demo.training.recipe import STAGES, Recipe

State = dict[str, Any]
TITLES = STAGES | FLOW_STAGES


def adamw(learning_rate: float, steps: int, warmup: int) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, max(steps, warmup + 1))
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=1e-2))


def initial_state(params: Any, optimizer: optax.GradientTransformation) -> State:
    return {"params": params, "ema": jax.tree.map(jnp.copy, params), "optimizer": optimizer.init(params)}


def make_step(
    loss_of: Callable[[Any, Any, jax.Array], jax.Array], optimizer: optax.GradientTransformation, ema: float
) -> Callable[[State, Any, jax.Array], tuple[State, jax.Array]]:
    def step(state: State, batch: Any, key: jax.Array) -> tuple[State, jax.Array]:
        loss, gradients = jax.value_and_grad(loss_of)(state["params"], batch, key)
        updates, optimizer_state = optimizer.update(gradients, state["optimizer"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        average = optax.incremental_update(params, state["ema"], 1 - ema)
        return {"params": params, "ema": average, "optimizer": optimizer_state}, loss

    return jax.jit(step, donate_argnums=0)


def train(
    stage: str,
    work: Path,
    recipe: Recipe | FlowRecipe,
    state: State,
    step: Callable[[State, Any, jax.Array], tuple[State, jax.Array]],
    batches: Callable[[int], Any],
    steps: int,
) -> State:
    """Trains from the stage's last checkpoint up to `steps`. Batches and keys depend on the step's number alone."""
    file = work / f"{stage}.msgpack"
    done = 0
    if file.exists():
        restored = serialization.from_bytes({"done": 0, "state": leaves_of(state)}, file.read_bytes())
        done, state = restored["done"], with_leaves(state, restored["state"])
    if done:
        say(f"{TITLES[stage]}: {f'goes on after step {done} of {steps}' if done < steps else 'trained before'}")
    recent: list[jax.Array] = []
    shown_loss, pace = "", 0.0
    with Progress() as progress, (work / f"{stage}.jsonl").open("a") as losses:
        for number in range(done, steps):
            key = jax.random.fold_in(jax.random.key(recipe.seed), number)
            state, loss = step(state, batches(number), key)
            recent.append(loss)
            if number == done:  # this step compiled
                began = time.monotonic()
            else:
                pace = (time.monotonic() - began) / (number - done)
            if (number + 1) % 50 == 0 or number + 1 == steps:
                mean = float(np.mean(recent))
                recent.clear()
                losses.write(json.dumps({"step": number + 1, "loss": round(mean, 5), "seconds": round(pace, 4)}) + "\n")
                losses.flush()
                shown_loss = f", loss {mean:.4f}"
                if not math.isfinite(mean):
                    raise UserError(f"{TITLES[stage]}: the loss is {mean} at step {number + 1}.")
            remaining = f", {pace:.2f} s a step, {format_duration(pace * (steps - number - 1))} left" if pace else ""
            progress.show({TITLES[stage]: ("training", f"step {number + 1} of {steps}{shown_loss}{remaining}")})
            if (number + 1) % recipe.checkpoint_steps == 0 or number + 1 == steps:
                partial = file.with_suffix(".partial")
                partial.write_bytes(serialization.to_bytes({"done": number + 1, "state": leaves_of(state)}))
                os.replace(partial, file)
    return state


def claim_folder(work: Path, recipe: Recipe | FlowRecipe, start_from: Path | None) -> None:
    """Records the recipe in `work`. Raises UsageError if the checkpoints there belong to another recipe."""
    file = work / "recipe.json"
    ours: dict[str, Any] = {**dataclasses.asdict(recipe), "start_from": start_from and str(start_from)}
    del ours["checkpoint_steps"]  # it does not change the result
    if file.exists():
        # A folder that was written before an option existed has that option's default.
        saved = {**dataclasses.asdict(type(recipe)()), **json.loads(file.read_text())}
        differ = [f"{name} ({saved.get(name)}, here {ours[name]})" for name in ours if saved.get(name) != ours[name]]
        if differ:
            raise UsageError(f"--work: {work} is another training's, which differs in {', '.join(differ)}.")
    write_json(file, ours)


def leaves_of(state: State) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def with_leaves(state: State, leaves: Any) -> State:
    return jax.tree.unflatten(jax.tree.structure(state), [jnp.asarray(leaf) for leaf in leaves])
