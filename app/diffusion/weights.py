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

from app.diffusion.families.family import Component, Family, Role, weight_count
from app.diffusion.models.loading import Checkpoint, load_checkpoint
from app.diffusion.networks import network_of
from app.diffusion.sharding import crowded, weight_sharding
from app.types import PipelineSpec, Sharded

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
SHARDED: dict[Role, Sharded] = {"encode": "text_encoders", "denoise": "denoiser", "decode": "vae"}


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
    """Whether the chips divide the weights of a component."""
    if mesh.size == 1:
        return False
    divided = spec.shard_weights
    return SHARDED[component.role] in (what_must_be_divided(spec, family, mesh) if divided == "auto" else divided)


def what_must_be_divided(spec: PipelineSpec, family: Family, mesh: Mesh) -> list[Sharded]:
    """The fewest networks whose division leaves room on each chip: those first whose division costs least.

    Text encoders run once an image; a denoiser's weights are gathered in each step.
    """
    nbytes = {
        name: weight_count(family, role) * jnp.dtype(DTYPES[spec.dtype]).itemsize for role, name in SHARDED.items()
    }
    divided: list[Sharded] = []
    for name in SHARDED.values():
        on_each = sum(size / (mesh.size if name in divided else 1) for name, size in nbytes.items())
        if not crowded(mesh, on_each):
            break
        divided.append(name)
    return divided
