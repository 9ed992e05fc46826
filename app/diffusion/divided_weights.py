"""Weights of which each chip holds a part, where a network runs inside jax.shard_map: a layer gathers what it reads.

So a chip needs one layer whole at a time (fully sharded data parallelism, Rajbhandari et al. 2020).
"""

from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import jax
from jax.sharding import NamedSharding


@dataclass(frozen=True)
class DividedWeight:
    """A weight that stands in a network as if it were whole: Flax reads `kernel[...]`."""

    part: jax.Array  # this chip's
    axes: str | tuple[str, ...]  # of the mesh
    axis: int  # of the weight

    def __getitem__(self, index: EllipsisType) -> jax.Array:
        assert index is ...
        return jax.lax.all_gather(self.part, self.axes, axis=self.axis, tiled=True)


def specs_of(placing: Any) -> Any:
    """How weights lie on the chips, for jax.shard_map: a pytree of PartitionSpec."""
    return jax.tree.map(lambda sharding: sharding.spec, placing)


def any_divided(placing: Any) -> bool:
    return any(not sharding.is_fully_replicated for sharding in jax.tree.leaves(placing))


def as_whole(params: Any, placing: Any, moving: jax.Array) -> tuple[Any, jax.Array]:
    """Inside of jax.shard_map: the params to make networks of, and `moving`.

    What depends on params alone could be computed once before a loop. All layers would then be whole at the same time.
    So params are made to depend on `moving`, which each step changes.
    """
    params, moving = jax.lax.optimization_barrier((params, moving))
    return jax.tree.map(weight_of, params, placing), moving


def weight_of(part: jax.Array, sharding: NamedSharding) -> jax.Array | DividedWeight:
    divided = [(axis, axes) for axis, axes in enumerate(sharding.spec) if axes]
    return DividedWeight(part, divided[0][1], divided[0][0]) if divided else part
