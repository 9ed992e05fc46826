"""Trains the VAE on fresh pictures, and later its decoder alone."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from app.diffusion.models.vae import VAE
from demo import scenes
from demo.training.loop import adamw, initial_state, make_step, train
from demo.training.networks import ARCHITECTURES
from demo.training.recipe import Recipe


def train_vae(recipe: Recipe, work: Path, steps: int) -> VAE:
    """Trains encoder and decoder to reproduce pictures through 16x16x8 latents."""
    vae = VAE(ARCHITECTURES[recipe.architecture].vae, rngs=nnx.Rngs(recipe.seed))
    # Latents start almost without noise: with a variance of 1, pictures stay grey for a thousand steps.
    log_variances = jnp.arange(2 * vae.config.latent_channels) >= vae.config.latent_channels
    assert vae.quant_conv.bias is not None
    vae.quant_conv.bias[...] = jnp.where(log_variances, jnp.float32(-4), 0)  # a weak type would compile the step twice
    graph, params = nnx.split(vae)
    optimizer = adamw(recipe.vae_learning_rate, recipe.vae_steps, recipe.warmup_steps)

    def loss_of(params: Any, pixels: jax.Array, key: jax.Array) -> jax.Array:
        vae = nnx.merge(graph, params)
        mean, log_variance = vae.encode(pixels)
        latents = mean + jnp.exp(log_variance / 2) * jax.random.normal(key, mean.shape)
        kl = (mean**2 + jnp.exp(log_variance) - 1 - log_variance).mean() / 2
        return reconstruction_loss(vae.decode(latents) - pixels) + recipe.vae_kl_weight * kl

    step = make_step(loss_of, optimizer, ema=recipe.vae_ema)
    batches = partial(fresh_pictures, recipe, 1, 2)  # two things in each: an empty background teaches little
    state = train("vae", work, recipe, initial_state(params, optimizer), step, batches, steps)
    return nnx.merge(graph, state["ema"])


def sharpen_decoder(recipe: Recipe, work: Path, vae: VAE, steps: int) -> VAE:
    """Trains the decoder further, for sharper edges. The encoder is fixed, so the pool and the UNet stay valid."""
    trained = nnx.Any(nnx.PathContains("decoder"), nnx.PathContains("post_quant_conv"))
    graph, *states = nnx.split(vae, trained, ...)
    params, fixed = states
    optimizer = adamw(recipe.decoder_learning_rate, recipe.decoder_steps, recipe.warmup_steps)

    def loss_of(params: Any, batch: tuple[Any, jax.Array], key: jax.Array) -> jax.Array:
        fixed, pixels = batch
        vae = nnx.merge(graph, params, fixed)
        mean, _ = vae.encode(pixels)
        # The UNet's latents differ from the encoder's by a varying amount.
        level_key, noise_key = jax.random.split(key)
        level = jax.random.uniform(level_key, (mean.shape[0], 1, 1, 1), maxval=recipe.decoder_noise)
        latents = mean + level * jax.random.normal(noise_key, mean.shape)
        return reconstruction_loss(vae.decode(jax.lax.stop_gradient(latents)) - pixels)

    def batches(step: int) -> tuple[Any, jax.Array]:
        return fixed, fresh_pictures(recipe, 4, None, step)

    step = make_step(loss_of, optimizer, ema=recipe.vae_ema)
    state = train("decoder", work, recipe, initial_state(params, optimizer), step, batches, steps)
    return nnx.merge(graph, state["ema"], fixed)


def reconstruction_loss(error: jax.Array) -> jax.Array:
    """Errors of colours, and of differences between neighbouring pixels (edges)."""
    edges = sum(jnp.abs(jnp.diff(error, axis=axis)).mean() for axis in (1, 2))
    return jnp.abs(error).mean() + (error**2).mean() + edges


def fresh_pictures(recipe: Recipe, stream: int, objects: int | None, step: int) -> jax.Array:
    """Pixels [B, 128, 128, 3] in [-1, 1]. They depend on seed, stream and step alone."""
    rng = np.random.default_rng([recipe.seed, stream, step])
    pictures = [scenes.draw(scenes.sample_scene(rng, objects=objects)) for _ in range(recipe.vae_batch)]
    return jnp.asarray(np.stack(pictures), jnp.float32) / 127.5 - 1
