"""Trains a transformer to tell the velocity from noise to the pool's latents, and the text encoder with it."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from app.diffusion.models.chat_tokenizer import ChatTokenizer
from app.diffusion.models.flux2 import Flux2
from app.diffusion.models.flux2_vae import to_patches
from app.diffusion.models.qwen3 import Qwen3
from app.diffusion.models.transformer_layers import normed
from demo.training.flow_networks import TEXT_LENGTH, FlowArchitecture
from demo.training.flow_recipe import FlowRecipe
from demo.training.layout import BACKGROUNDS, CELL_CLASSES
from demo.training.loop import initial_state, make_step, train
from demo.training.pool import WORDINGS

PROBED = 2  # the single-stream block whose input the probe reads; the last one of smaller networks
CONSTANT = 0.6  # share of the steps before the learning rate falls


class Tap:
    """Stands in for a block, and keeps what it was given."""

    def __init__(self, block: Any):
        self.block, self.seen = block, jnp.zeros(())

    def __call__(self, x: jax.Array, *rest: Any) -> jax.Array:
        self.seen = x
        result: jax.Array = self.block(x, *rest)
        return result


def new_networks(architecture: FlowArchitecture, vocabulary: int, seed: int) -> tuple[Flux2, Qwen3]:
    """Untrained ones, whose first answers are zero and first gates small."""
    transformer = Flux2(architecture.transformer, rngs=nnx.Rngs(seed + 1))
    transformer.proj_out.kernel[...] *= 0.0
    for modulation in (
        transformer.double_stream_modulation_img,
        transformer.double_stream_modulation_txt,
        transformer.single_stream_modulation,
    ):
        modulation.linear.kernel[...] *= 0.5
    return transformer, Qwen3(architecture.text_encoder(vocabulary), rngs=nnx.Rngs(seed + 2))


def train_flow(
    recipe: FlowRecipe,
    work: Path,
    pool: dict[str, np.ndarray],
    mean: np.ndarray,
    deviation: np.ndarray,
    tokenizer: ChatTokenizer,
    transformer: Flux2,
    text_encoder: Qwen3,
    steps: int,
) -> tuple[Flux2, Qwen3]:
    """Flow matching (Lipman et al. 2022) on patches of 2x2 latents. Dropped prompts make guidance work.

    A linear probe in the middle of the transformer predicts what stands in each patch, so that words find their places
    early, and is thrown away afterwards (compare Yu et al. 2024, who align with a vision encoder).
    """
    classes = [*CELL_CLASSES, BACKGROUNDS]
    probe = nnx.Linear(transformer.config.width, sum(classes), rngs=nnx.Rngs(recipe.seed + 3))
    probed = min(PROBED, transformer.config.num_single_layers - 1)
    graph, params = nnx.split((transformer, text_encoder, probe))
    ends = np.cumsum(classes)[:-1]
    empty = jnp.asarray(tokenizer([""]).input_ids)

    def loss_of(params: Any, batch: tuple[jax.Array, ...], key: jax.Array) -> jax.Array:
        latents, input_ids, layout = batch
        keys = jax.random.split(key, 4)
        count = len(latents)
        transformer, text_encoder, probe = nnx.merge(graph, params)
        blocks: Any = transformer.single_transformer_blocks
        blocks[probed] = tap = Tap(blocks[probed])
        dropped = jax.random.uniform(keys[0], (count, 1)) < recipe.prompt_dropout
        embeds = text_encoder(jnp.where(dropped, empty, input_ids))
        noise = jax.random.normal(keys[1], latents.shape)
        level = noise_levels(keys[2], count, recipe.shift)[:, None, None, None]
        velocity = transformer((1 - level) * latents + level * noise, 1000 * level[:, 0, 0, 0], embeds)
        logits = jnp.split(probe(normed(tap.seen[:, TEXT_LENGTH:], 1e-6)), ends, axis=-1)
        background, cells = layout[:, :1], layout[:, 1:]
        truth = [*jnp.split(cells, 2, axis=1), jnp.broadcast_to(background, logits[-1].shape[:2])]
        wrong = [
            optax.softmax_cross_entropy_with_integer_labels(part, labels).mean()
            for part, labels in zip(logits, truth, strict=True)
        ]
        error = jnp.square(velocity - (noise - latents)).mean(axis=-1).reshape(count, -1)
        weight = jnp.where(truth[0] > 0, recipe.thing_weight, 1.0)
        return (error * weight).sum() / weight.sum() + recipe.probe_weight * sum(wrong)

    latents = (patches(pool["latents"]) - mean) / deviation

    def batches(step: int) -> tuple[jax.Array, ...]:
        rng = np.random.default_rng([recipe.seed, 6, step])
        rows = rng.integers(0, len(latents), recipe.batch)
        wordings = rng.integers(0, WORDINGS, recipe.batch)
        chosen = latents[rows], pool["input_ids"][rows, wordings], pool["layout"][rows].astype(np.int32)
        return tuple(jnp.asarray(array) for array in chosen)

    optimizer = muon(recipe)
    step = make_step(loss_of, optimizer, ema=recipe.ema)
    state = train("flow", work, recipe, initial_state(params, optimizer), step, batches, steps)
    transformer, text_encoder, _ = nnx.merge(graph, state["ema"])
    return transformer, text_encoder


def noise_levels(key: jax.Array, count: int, shift: float) -> jax.Array:
    """float32 [B], one from each of `count` equal strata in random order; of half of them the logit is normal."""
    order, within = jax.random.split(key)
    strata = (jax.random.permutation(order, jnp.arange(count)) + jax.random.uniform(within, (count,))) / count
    strata = jnp.clip(strata, 1e-4, 1 - 1e-4)
    levels = jnp.where(jnp.arange(count) % 2 == 0, jax.nn.sigmoid(jax.scipy.stats.norm.ppf(strata)), strata)
    return shift * levels / (1 + (shift - 1) * levels)


def statistics_of(latents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [4 * C] and deviation [4 * C] of the patches of latents [N, h, w, C]."""
    cut = patches(latents)
    return cut.mean((0, 1, 2)), cut.std((0, 1, 2))


def patches(latents: np.ndarray) -> np.ndarray:
    return np.asarray(to_patches(jnp.asarray(latents, jnp.float32)))


def muon(recipe: FlowRecipe) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) for the matrices inside of blocks, Adam for all else."""
    falling = max(1, round(recipe.steps * (1 - CONSTANT)))
    pace = optax.schedules.join_schedules(
        [
            optax.linear_schedule(0.0, 1.0, recipe.warmup_steps),
            optax.constant_schedule(1.0),
            optax.linear_schedule(1.0, 0.02, falling),
        ],
        [recipe.warmup_steps, recipe.steps - falling],
    )

    def kinds(params: Any) -> Any:
        def kind(path: Any, leaf: jax.Array) -> str:
            name = jax.tree_util.keystr(path)
            return "muon" if leaf.ndim == 2 and ("blocks" in name or "layers" in name) else "adam"

        return jax.tree_util.tree_map_with_path(kind, params)

    def rate(factor: float) -> optax.Schedule:
        return lambda step: factor * recipe.learning_rate * pace(step)

    own = optax.contrib.muon(rate(1.0), weight_decay=0.01, consistent_rms=0.2)
    adam = optax.adamw(rate(1.5), b2=0.99, weight_decay=0.0)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.partition({"muon": own, "adam": adam}, kinds))
