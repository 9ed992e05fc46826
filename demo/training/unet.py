"""Trains the UNet on the pool's latents, and the text encoder with it."""

from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from app.diffusion.models.clip import CLIPText
from app.diffusion.models.tokenizer import Tokenizer
from app.diffusion.models.unet import UNet
from app.diffusion.samplers import Schedule, alphas_bar_of
from demo.training.loop import adamw, initial_state, make_step, train
from demo.training.networks import SCHEDULER_JSON
from demo.training.pool import WORDINGS
from demo.training.recipe import Recipe

Network = TypeVar("Network", bound=nnx.Module)


def train_unet(
    recipe: Recipe,
    work: Path,
    pool: dict[str, np.ndarray],
    tokenizer: Tokenizer,
    unet: UNet,
    text_encoder: CLIPText,
    steps: int,
) -> tuple[UNet, CLIPText]:
    """v-prediction (Salimans and Ho 2022) on the pool's latents. Dropped prompts make guidance work."""
    unet_graph, unet_params = nnx.split(unet)
    text_graph, text_params = nnx.split(text_encoder)
    optimizer = adamw(recipe.unet_learning_rate, recipe.unet_steps, recipe.warmup_steps)
    empty = jnp.asarray(tokenizer([""]).input_ids)
    alphas_cumprod = jnp.asarray(alphas_bar_of(Schedule.from_config(SCHEDULER_JSON)), jnp.float32)

    def loss_of(params: Any, batch: tuple[jax.Array, jax.Array], key: jax.Array) -> jax.Array:
        latents, input_ids = batch
        keys = jax.random.split(key, 4)
        count = latents.shape[0]
        # One timestep from each of `count` equal strata: the loss has the same mean and far less noise.
        strata = (jnp.arange(count) + jax.random.uniform(keys[0], (count,))) / count
        timesteps = jnp.minimum(jax.random.permutation(keys[1], strata) * 1000, 999).astype(jnp.int32)
        noise = jax.random.normal(keys[2], latents.shape)
        alpha = jnp.sqrt(alphas_cumprod[timesteps])[:, None, None, None]
        sigma = jnp.sqrt(1 - alphas_cumprod[timesteps])[:, None, None, None]
        dropped = jax.random.uniform(keys[3], (count, 1)) < recipe.prompt_dropout
        embeds = nnx.merge(text_graph, params["text_encoder"])(jnp.where(dropped, empty, input_ids))
        unet = nnx.merge(unet_graph, params["unet"])
        velocity = unet(alpha * latents + sigma * noise, timesteps, embeds)
        return ((velocity - (alpha * noise - sigma * latents)) ** 2).mean()

    scaled = pool["latents"].astype(np.float32) * pool["scaling_factor"]

    def batches(step: int) -> tuple[jax.Array, jax.Array]:
        rng = np.random.default_rng([recipe.seed, 3, step])
        rows = rng.integers(0, len(scaled), recipe.unet_batch)
        wordings = rng.integers(0, WORDINGS, recipe.unet_batch)
        return jnp.asarray(scaled[rows]), jnp.asarray(pool["input_ids"][rows, wordings])

    step = make_step(loss_of, optimizer, ema=recipe.unet_ema)
    initial = initial_state({"unet": unet_params, "text_encoder": text_params}, optimizer)
    state = train("unet", work, recipe, initial, step, batches, steps)
    ema = state["ema"]
    return nnx.merge(unet_graph, ema["unet"]), nnx.merge(text_graph, ema["text_encoder"])


def mean_of(start: Network, end: Network) -> Network:
    """The mean of a network and of what it became by further training.

    It is often better than either (Wortsman et al. 2022, "Model soups").
    """
    graph, params = nnx.split(end)
    return nnx.merge(graph, jax.tree.map(lambda a, b: (a + b) / 2, nnx.state(start), params))
