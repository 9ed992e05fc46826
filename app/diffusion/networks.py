"""Makes a component's network of its weights inside a program."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from app.diffusion.families.family import Networks


def network_of(graph: Any, tree: Any, params: Sequence[jax.Array]) -> Any:
    return nnx.merge(graph, jax.tree.unflatten(tree, params))


def modules_of(networks: Networks, params: Mapping[str, Any]) -> dict[str, Any]:
    """`networks` makes a module of each component's params."""
    return {part: networks[part](params[part]) for part in params}
