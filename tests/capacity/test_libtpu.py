"""capacity/program_cost.py with the real libtpu, in a process of its own: what it refuses, and a kernel's cost."""

import subprocess
import sys

import pytest

from capacity.chips import CHIPS
from capacity.kernels import ASSUMED_SHARE, SHARES
from capacity.libtpu import missing
from cluster import ROOT

# CI has it: `make tpu-check` goes first.
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing())]

PRELUDE = """
from capacity.libtpu import compile_only, devices
compile_only()
import jax, jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.sharding import SingleDeviceSharding
from capacity.chips import host_of
from capacity.program_cost import OutOfMemory, cost_of
host = host_of("v5litepod-1")
sharding = SingleDeviceSharding(devices(host)[0])

def cost(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding) for shape in shapes]
    return cost_of(jax.jit(function, out_shardings=sharding).trace(*arguments), host.chip)
"""
LARGE = """
try:
    cost(lambda a, b: jnp.sin(a @ b) @ a, (1 << 17, 1 << 16), (1 << 16, 1 << 17))
except OutOfMemory as reason:
    print(reason)
"""
KERNEL = """
def multiply(a, b, out):
    out[...] = jnp.dot(a[...], b[...], preferred_element_type=jnp.float32)

def attention(a, b):
    whole, part = jax.ShapeDtypeStruct((1024, 1024), jnp.float32), pl.BlockSpec((256, 256), lambda i, j: (i, j))
    rows, columns = pl.BlockSpec((256, 512), lambda i, j: (i, 0)), pl.BlockSpec((512, 256), lambda i, j: (0, j))
    with jax.named_scope("self-attention"):
        return pl.pallas_call(multiply, whole, grid=(4, 4), in_specs=[rows, columns], out_specs=part)(a, b)

result = cost(attention, (1024, 512), (512, 1024))
print(result.parts["self-attention"], result.cycles)
"""

ATTENTION = """
from app.diffusion.models.attention import attend

def attention(x):
    with jax.named_scope("self-attention"):
        return attend(x, x, x, 3)

result = cost(attention, (2, 1024, 192))
print(result.parts["self-attention"], result.notes)
"""


def output_of(program: str) -> str:
    command = [sys.executable, "-c", PRELUDE + program]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_what_does_not_fit_is_refused_in_the_compilers_words() -> None:
    assert output_of(LARGE) == (
        "Ran out of memory on HBM, the total memory required for HLO temporaries (80.00G) "
        "exceeds available HBM (15.75G).\n"
    )


def test_a_pallas_kernel_costs_its_padded_flops() -> None:
    least = 2 * 1024 * 512 * 1024 / CHIPS["v5e"].flops_a_cycle / ASSUMED_SHARE
    part, cycles = map(int, output_of(KERNEL).split())
    assert part == cycles == round(least)


def test_the_attention_kernel_costs_what_its_schedule_was_counted_at() -> None:
    products = 2 * (2 * 3) * 1024 * 1024 * 128  # multiply-adds of two products for each row and head
    share = SHARES["attention-kernel-64"]["v5e"]
    cycles, notes = output_of(ATTENTION).split(maxsplit=1)
    assert notes == "()\n"
    assert round(2 * products / CHIPS["v5e"].flops_a_cycle / share) <= int(cycles)
