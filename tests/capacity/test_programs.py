"""The programs that are compiled for the check are those that are served."""

import os
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

pytestmark = pytest.mark.slow

HOST = host_of("v5litepod-4")
SPEC = PipelineSpec("demo", ((128, 128), (64, 128)), (1, 2), 20, edits=True)


@pytest.fixture(autouse=True)
def this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of a TPU host's devices, for which libtpu would be needed."""

    def local_devices(host: Host) -> list[jax.Device]:
        return jax.local_devices()[:1]

    monkeypatch.setattr(capacity.programs, "devices", local_devices)


def test_programs_from_shapes_are_those_that_the_engine_runs() -> None:
    ours = pipeline_of(SPEC, HOST)
    model = str(ROOT / "assets" / "demo-model")
    served = Pipeline.load(
        replace(SPEC, model=model),
        devices=jax.local_devices()[:1],
    )
    facts = fingerprint(jax.local_devices()[:1])
    keys = [[key_of(program, facts, {}) for program in pipeline.programs] for pipeline in (ours, served)]
    assert keys[0] == keys[1]
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(served.params))
    states = sum(leaf.nbytes for size in served.sizes for leaf in jax.tree.leaves(served.empty_state(size)))
    assert resident_bytes(ours) == weights + states


def test_the_key_of_a_cost_covers_all_that_it_depends_on() -> None:
    keys = keys_of(pipeline_of(SPEC, HOST).programs, HOST)
    assert keys == keys_of(pipeline_of(SPEC, HOST).programs, HOST)
    assert len(set(keys.values())) == len(keys)
    half = replace(SPEC, dtype="bfloat16")
    other = keys_of(pipeline_of(half, HOST).programs, HOST)
    assert keys.keys() == other.keys()
    assert keys["step 128x128 rows 2"] != other["step 128x128 rows 2"]


ENCODE_IMAGE = """
import jax
import capacity.programs
from app.types import PipelineSpec
from capacity.chips import host_of

capacity.programs.devices = lambda host: jax.local_devices()[:4]
spec = PipelineSpec("stable-diffusion-v1-4", ((512, 512),), (1,), 4, dtype="bfloat16", edits=True)
programs = capacity.programs.pipeline_of(spec, host_of("v5litepod-4")).programs
(program,) = [program for program in programs if program.name == "encode image 512x512"]
assert "tpu_custom_call" in program.trace().lower(lowering_platforms=("tpu",)).as_text()
"""


def test_the_encode_of_an_image_lowers_for_hosts_of_several_chips() -> None:
    """XLA divides no Pallas kernel, so each chip has to run it. In a process of its own, as JAX counts devices once."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    child = subprocess.run([sys.executable, "-c", ENCODE_IMAGE], env=os.environ | flags, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-2000:]


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
    assert shards_of(program(PartitionSpec(None, ("data0", "data1")))) == 4
    assert shards_of(program(PartitionSpec("data0", ("data1", "data2")))) == 8
    assert shards_of(program(PartitionSpec(None))) == shards_of(program(PartitionSpec())) == 1
    assert shards_of(Program("encode", np_function, ())) == 1


def test_the_commands_import_no_jax_before_its_environment_is_set() -> None:
    modules = "capacity.check, capacity.plan, capacity.program_cost, capacity.compile_worker"
    command = f"import sys, {modules}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command]).returncode == 0
