"""The weights of a checkpoint on the chips of a host: in which dtype, and which of them the chips divide.

Knows nothing of programs, sizes or requests.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from app.diffusion.families.family import Component, Family, weight_count
from app.diffusion.models.loading import Checkpoint, load_checkpoint
from app.diffusion.networks import network_of
from app.diffusion.sharding import crowded, weight_sharding
from app.types import PipelineSpec

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def load_onto(mesh: Mesh, spec: PipelineSpec) -> Checkpoint:
    """The checkpoint that the spec names, each weight put where it stays as soon as it is read.

    Raises ValueError that lists all problems of the checkpoint.
    """

    def place(family: Family, component: Component, weight: np.ndarray) -> jax.Array:
        divided = divides(spec, family, component, mesh)
        return jax.device_put(weight, weight_sharding(mesh, weight, divided=divided))

    return load_checkpoint(
        spec.model,
        revision=spec.revision,
        variant=spec.variant,
        tokenizer=spec.tokenizer,
        dtype=DTYPES[spec.dtype],
        image_encoder=spec.edits,
        place=place,
    )


def split(modules: Mapping[str, nnx.Module]) -> tuple[dict[str, Any], dict[str, Any]]:
    """By component: what makes the module of its weights, and the weights."""
    networks, params = {}, {}
    for name, module in modules.items():
        graph, variables = nnx.split(module)
        # Plain arrays go into a dispatch faster than Flax's variables.
        params[name], tree = jax.tree.flatten(variables)
        networks[name] = partial(network_of, graph, tree)
    return networks, params


def shardings_of(spec: PipelineSpec, family: Family, params: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """By component: how its weights lie on the chips."""
    return {
        part: jax.tree.map(partial(weight_sharding, mesh, divided=divides(spec, family, component, mesh)), params[part])
        for part, component in family.COMPONENTS.items()
    }


def divides(spec: PipelineSpec, family: Family, component: Component, mesh: Mesh) -> bool:
    """Whether the chips divide the weights of a component: only of text encoders, which run once an image."""
    if component.role != "encode" or mesh.size == 1:
        return False
    if spec.shard_text_encoders != "auto":
        return spec.shard_text_encoders
    return crowded(mesh, weight_count(family) * jnp.dtype(DTYPES[spec.dtype]).itemsize)
