"""The pool of latents and captions that a denoiser is trained on. It is drawn and encoded once."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from app.diffusion.models.tokenizer import Tokens
from app.diffusion.models.vae import VAE
from cluster.terminal import Progress
from demo import scenes
from demo.training.flow_recipe import FlowRecipe
from demo.training.layout import layout
from demo.training.recipe import Recipe

WORDINGS = 4  # captions of each scene
Tokenize = Callable[[list[str]], Tokens]


def encoded_pool(
    recipe: Recipe | FlowRecipe, work: Path, vae: VAE, tokenizer: Tokenize, grid: int | None = None
) -> dict[str, np.ndarray]:
    """Draws, captions and encodes `recipe.pool` scenes, or reads those of an earlier run from `work`.

    With `grid`, what stands in the cells of that many rows and columns too.
    """
    file = work / "pool.npz"
    if file.exists():
        return dict(np.load(file))
    graph, params = nnx.split(vae)
    encode = jax.jit(lambda params, pixels: nnx.merge(graph, params).encode(pixels)[0])
    latents, captions, layouts = [], [], []
    with Progress() as progress:
        for first in range(0, recipe.pool, 64):
            rng = np.random.default_rng([recipe.seed, 2, first])
            batch = [pool_scene(rng) for _ in range(64)]
            pixels = np.stack([scenes.draw(scene) for scene in batch])
            latents.append(np.asarray(encode(params, jnp.asarray(pixels, jnp.float32) / 127.5 - 1), np.float16))
            layouts += [layout(scene, grid).astype(np.int8) for scene in batch if grid]
            captions += [scenes.caption(scene, rng) for scene in batch for _ in range(WORDINGS)]
            progress.show({"pool": ("drawing", f"{min(first + 64, recipe.pool)} of {recipe.pool} scenes")})
    encoded = np.concatenate(latents)[: recipe.pool]
    tokens = tokenizer(captions[: len(encoded) * WORDINGS])
    if any(tokens.truncated):
        raise RuntimeError(f"a caption is longer than {tokens.input_ids.shape[1]} tokens")
    pool: dict[str, Any] = {
        "latents": encoded,
        "input_ids": tokens.input_ids.reshape(len(encoded), WORDINGS, -1),
        "scaling_factor": np.float32(1 / encoded.astype(np.float32).std()),
    }
    if grid:
        pool["layout"] = np.stack(layouts)[: len(encoded)]
    partial = work / "pool.partial.npz"
    np.savez(partial, **pool)
    os.replace(partial, file)
    return pool


def pool_scene(rng: np.random.Generator) -> scenes.Scene:
    """A scene from a mix with more of what is hard to learn: half hold two things, a third hold a small thing."""
    if rng.random() < 1 / 2:
        return scenes.sample_scene(rng, objects=2)
    small = rng.random() < 2 / 3
    while (scene := scenes.sample_scene(rng, objects=1)).size_word != "small" and small:
        pass
    return scene
