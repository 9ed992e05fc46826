"""The chips that divide an image, and what they exchange. Runs inside jax.shard_map.

Knows nothing of networks, nor of how the chips are chosen.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class ImageShards:
    """The chips that share an image, along axes of their mesh: each has one of `count` equal parts, from the top."""

    axes: tuple[str, ...]
    count: int

    @property
    def index(self) -> jax.Array:
        """Which part is this chip's."""
        return jax.lax.axis_index(self.axes)

    def part(self, x: jax.Array) -> jax.Array:
        """This chip's tokens of x [B, T, ...], which every chip holds: [B, T / count, ...]."""
        tokens = x.shape[1] // self.count
        return jax.lax.dynamic_slice_in_dim(x, self.index * tokens, tokens, axis=1)

    def gathered(self, x: jax.Array) -> jax.Array:
        """The tokens of all chips, [B, T, ...] -> [B, count * T, ...].

        Attention gathers keys and values, as context parallelism of Llama 3 does (Dubey et al. 2024, section 3.3.2).
        """
        return jax.lax.all_gather(x, self.axes, axis=1, tiled=True)

    def joined(self, parts: Sequence[jax.Array]) -> jax.Array:
        """Tokens of all chips, [B, T_i, ...] -> [B, sum(T_i), ...], as `gathered` orders what each chip has joined."""
        by_chip = [x.reshape(len(x), self.count, -1, *x.shape[2:]) for x in parts]
        return jnp.concatenate(by_chip, axis=2).reshape(len(parts[0]), -1, *parts[0].shape[2:])

    def mean(self, x: jax.Array) -> jax.Array:
        """Over all chips."""
        return jax.lax.pmean(x, self.axes)

    def from_above(self, x: jax.Array) -> jax.Array:
        """The x of the chip with the part above; zeros at the top."""
        return jax.lax.ppermute(x, self.axes, [(i, i + 1) for i in range(self.count - 1)])

    def from_below(self, x: jax.Array) -> jax.Array:
        return jax.lax.ppermute(x, self.axes, [(i + 1, i) for i in range(self.count - 1)])
