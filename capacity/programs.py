"""The programs that a replica would run on a TPU host, from shapes alone: the very ones of
app/diffusion/pipeline.py."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax
from jax.sharding import NamedSharding

from app.aot.cache_key import digest, fingerprint, key_of
from app.aot.program import Program
from app.diffusion.models.tokenizer import Tokenizer
from app.diffusion.pipeline import DTYPES, Pipeline
from app.types import PipelineSpec
from capacity.chips import Host
from capacity.libtpu import devices, version
from capacity.models import shapes_of

PRICING = [Path(__file__).parent / f"{name}.py" for name in ("chips", "hlo", "libtpu", "price", "flops")]


@dataclass(frozen=True)
class Positions:
    """All that the programs' shapes need of a tokenizer."""

    length: int


def pipeline_of(served: PipelineSpec, host: Host) -> Pipeline:
    """Its `programs` can be compiled; nothing can be run. Raises ValueError for a model or a size that cannot be."""
    checkpoint = shapes_of(served.model, DTYPES[served.dtype])
    return Pipeline(
        checkpoint,
        cast(Tokenizer, Positions(checkpoint.text_encoder.config.max_position_embeddings)),
        served,
        devices=devices(host),
    )


def shards_of(program: Program) -> int:
    """How many chips its rows are divided among."""
    for held in getattr(program.function, "args", ()):
        if isinstance(held, NamedSharding):
            axes = held.spec[0] if held.spec else None
            names = axes if isinstance(axes, tuple) else (axes,) if axes else ()
            return math.prod(held.mesh.shape[name] for name in names)
    return 1


def resident_bytes(pipeline: Pipeline) -> int:
    """What lies on each chip all the time: all weights, and the states of all sizes."""
    states = [pipeline.shapes.state(size) for size in pipeline.sizes]
    return sum(nbytes(leaf) for leaf in jax.tree.leaves((pipeline.params, states)))


def nbytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * int(leaf.dtype.itemsize)


def keys_of(programs: Sequence[Program], host: Host) -> dict[str, str]:
    """By name: what a price depends on, down to versions and sources, in one word."""
    facts = fingerprint(devices(host))
    facts["libtpu"] = version()
    facts |= {f"source tpu/{path.name}": digest(path.read_bytes()) for path in PRICING}
    seen: dict[int, str] = {}
    return {program.name: digest(repr(key_of(program, facts, seen)).encode()) for program in programs}
