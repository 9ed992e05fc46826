"""Trains the text encoder on captions alone, before the UNet needs it."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from app.diffusion.models.clip import CLIPText
from app.diffusion.models.tokenizer import Tokenizer
from demo import scenes
from demo.training.layout import BACKGROUNDS, CELL_CLASSES, layout
from demo.training.loop import adamw, initial_state, make_step, train
from demo.training.networks import ARCHITECTURES
from demo.training.recipe import Recipe

GRID = 4  # cells along each side of the picture


def train_text_encoder(recipe: Recipe, work: Path, tokenizer: Tokenizer, steps: int) -> CLIPText:
    """Trains the text encoder before the UNet, as CLIP's was trained before Stable Diffusion.

    A linear probe predicts the background and, for each cell of a coarse grid, the thing and the colour there. It reads
    each token behind the caption's last word, and is thrown away afterwards.
    """
    config = ARCHITECTURES[recipe.architecture].text_encoder(tokenizer)
    rngs = nnx.Rngs(recipe.seed + 2)
    classes = [BACKGROUNDS] + [count for count in CELL_CLASSES for _ in range(GRID**2)]
    probe = nnx.Linear(config.hidden_size, sum(classes), rngs=rngs)
    graph, params = nnx.split((CLIPText(config, rngs=rngs), probe))
    optimizer = adamw(recipe.text_learning_rate, recipe.text_steps, recipe.warmup_steps)
    ends = np.cumsum(classes)[:-1]

    def batches(step: int) -> tuple[jax.Array, jax.Array]:
        rng = np.random.default_rng([recipe.seed, 5, step])
        sampled = [scenes.sample_scene(rng) for _ in range(recipe.text_batch)]
        input_ids = tokenizer([scenes.caption(scene, rng) for scene in sampled]).input_ids
        labels = np.stack([layout(scene, GRID) for scene in sampled])
        return jnp.asarray(input_ids), jnp.asarray(labels)

    def loss_of(params: Any, batch: tuple[jax.Array, jax.Array], key: jax.Array) -> jax.Array:
        input_ids, labels = batch
        text_encoder, probe = nnx.merge(graph, params)
        logits = jnp.split(probe(text_encoder(input_ids)), ends, axis=-1)
        behind = input_ids == tokenizer.tokenizer.eos_token_id
        losses = [
            optax.softmax_cross_entropy_with_integer_labels(part, jnp.broadcast_to(labels[:, [i]], behind.shape))
            for i, part in enumerate(logits)
        ]
        return jnp.mean(jnp.stack(losses), where=behind)

    step = make_step(loss_of, optimizer, ema=recipe.vae_ema)
    state = train("text", work, recipe, initial_state(params, optimizer), step, batches, steps)
    text_encoder, _ = nnx.merge(graph, state["ema"])
    return text_encoder
