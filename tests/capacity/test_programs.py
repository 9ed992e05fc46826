"""The programs that are priced are those that are served."""

import subprocess
import sys
from dataclasses import replace

import jax
import pytest

import capacity.programs
from app.aot.cache_key import fingerprint, key_of
from app.aot.program import Program
from app.diffusion.pipeline import Pipeline
from app.types import PipelineSpec
from capacity.chips import Host, host_of
from capacity.programs import keys_of, pipeline_of, resident_bytes, shards_of
from cluster import ROOT

HOST = host_of("v5litepod-4")
SERVED = PipelineSpec("demo", ((128, 128), (64, 128)), (1, 2), 20)


@pytest.fixture(autouse=True)
def this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of a TPU host's devices, for which libtpu would be needed."""

    def here(host: Host) -> list[jax.Device]:
        return jax.local_devices()[:1]

    monkeypatch.setattr(capacity.programs, "devices", here)


def test_the_programs_priced_from_shapes_are_those_that_the_engine_runs() -> None:
    ours = pipeline_of(SERVED, HOST)
    model = str(ROOT / "assets" / "demo-model")
    served = Pipeline.load(
        replace(SERVED, model=model),
        devices=jax.local_devices()[:1],
    )
    facts = fingerprint(jax.local_devices()[:1])
    keys = [[key_of(program, facts, {}) for program in pipeline.programs] for pipeline in (ours, served)]
    assert keys[0] == keys[1]
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(served.params))
    states = sum(leaf.nbytes for size in served.sizes for leaf in jax.tree.leaves(served.empty_state(size)))
    assert resident_bytes(ours) == weights + states


def test_a_price_is_kept_for_what_it_depends_on() -> None:
    one = keys_of(pipeline_of(SERVED, HOST).programs, HOST)
    assert one == keys_of(pipeline_of(SERVED, HOST).programs, HOST)
    assert len(set(one.values())) == len(one)
    half = replace(SERVED, dtype="bfloat16")
    other = keys_of(pipeline_of(half, HOST).programs, HOST)
    assert one.keys() == other.keys()
    assert one["step 128x128 rows 2"] != other["step 128x128 rows 2"]


def test_rows_are_divided_among_as_many_chips_as_divide_them() -> None:
    from functools import partial

    import numpy as np
    from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

    def program(spec: PartitionSpec) -> Program:
        sharding = NamedSharding(AbstractMesh((2, 2, 2), ("data0", "data1", "data2")), spec)
        return Program("any", partial(np_function, sharding), ())

    def np_function(sharding: object) -> object:
        return np.zeros(1)

    assert shards_of(program(PartitionSpec(("data0", "data1")))) == 4
    assert shards_of(program(PartitionSpec("data0"))) == 2
    assert shards_of(program(PartitionSpec(None))) == shards_of(program(PartitionSpec())) == 1
    assert shards_of(Program("encode", np_function, ())) == 1


def test_the_commands_import_no_jax_before_its_environment_is_set() -> None:
    command = (
        "import sys, capacity.check, capacity.plan, capacity.price, capacity.worker; sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", command]).returncode == 0
