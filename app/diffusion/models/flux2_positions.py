"""Where the tokens of FLUX.2's transformer stand, on four axes: time, row, column, place in the text."""

import jax
import jax.numpy as jnp

REFERENCE_TIME = 10  # between reference images, as Flux2KleinPipeline places them


def text_positions(tokens: int) -> jax.Array:
    """Of text tokens: int32 [1, T, 4]."""
    return jnp.zeros((1, tokens, 4), jnp.int32).at[0, :, 3].set(jnp.arange(tokens))


def image_positions(height: int, width: int) -> jax.Array:
    """Of latents: int32 [1, h * w, 4]."""
    rows, columns = (grid.reshape(-1) for grid in jnp.mgrid[:height, :width])
    return jnp.stack([jnp.zeros_like(rows), rows, columns, jnp.zeros_like(rows)], axis=-1)[None]


def with_references(places: jax.Array, references: jax.Array) -> jax.Array:
    """Places [1, T, 4], and behind them those of reference images [B, R, 3]: [B, T + R, 4].

    Image i is at time REFERENCE_TIME * i.
    """
    number, row, column = (references[..., axis] for axis in range(3))
    behind = jnp.stack([REFERENCE_TIME * number, row, column, jnp.zeros_like(row)], axis=-1)
    return jnp.concatenate([jnp.broadcast_to(places, (len(references), *places.shape[1:])), behind], axis=1)
