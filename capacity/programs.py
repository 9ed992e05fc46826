"""The programs of app/diffusion/pipeline.py as a replica on a TPU host would run them, made from shapes alone."""

import math
from collections.abc import Sequence
from pathlib import Path

import jax
from jax.sharding import NamedSharding

from app.aot.cache_key import digest, fingerprint, key_of
from app.aot.program import Program
from app.diffusion.pipeline import Pipeline
from app.diffusion.weights import DTYPES
from app.types import PipelineSpec
from capacity.chips import Host
from capacity.libtpu import devices, version
from capacity.models import shapes_of

COST_MODULES = ("chips", "cycles", "flops", "hlo", "hlo_products", "kernels", "libtpu", "program_cost")
COST_SOURCES = [Path(__file__).parent / f"{name}.py" for name in COST_MODULES]


def pipeline_of(spec: PipelineSpec, host: Host) -> Pipeline:
    """A pipeline whose programs can be compiled but not run. Raises ValueError for an invalid model or size."""
    return Pipeline(shapes_of(spec.model, DTYPES[spec.dtype], image_encoder=spec.edits), spec, devices=devices(host))


def shards_of(program: Program) -> int:
    """The number of chips that share its rows, and the images of these."""
    for argument in getattr(program.function, "args", ()):
        if isinstance(argument, NamedSharding):
            names = [name for axes in argument.spec for name in (axes if isinstance(axes, tuple) else (axes,)) if name]
            return math.prod(argument.mesh.shape[name] for name in names)
    return 1


def resident_bytes(pipeline: Pipeline) -> int:
    """Bytes that stay on each chip: its weights, and the states of all sizes."""
    weights = zip(jax.tree.leaves(pipeline.params), jax.tree.leaves(pipeline.shardings), strict=True)
    states = jax.tree.leaves([pipeline.shapes.state(size) for size in pipeline.sizes])
    parts = [(leaf.dtype, sharding.shard_shape(leaf.shape)) for leaf, sharding in weights]
    parts += [(leaf.dtype, leaf.shape) for leaf in states]
    return sum(math.prod(shape) * int(dtype.itemsize) for dtype, shape in parts)


def keys_of(programs: Sequence[Program], host: Host) -> dict[str, str]:
    """For each program, a hash of all that its cost depends on: versions and sources too."""
    facts = fingerprint(devices(host))
    facts["libtpu"] = version()
    facts |= {f"source capacity/{path.name}": digest(path.read_bytes()) for path in COST_SOURCES}
    seen: dict[int, str] = {}
    return {program.name: digest(repr(key_of(program, facts, seen)).encode()) for program in programs}
