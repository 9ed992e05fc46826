"""capacity/price.py with the real libtpu, which compiles in a process of its own: what it refuses, and a kernel's
charge."""

import subprocess
import sys

import pytest

from capacity.chips import CHIPS
from capacity.libtpu import missing
from capacity.price import KERNEL_SHARE
from cluster import ROOT

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())  # CI has it: `make tpu-check` goes first

PRELUDE = """
from capacity.libtpu import compile_only, devices
compile_only()
import jax, jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.sharding import SingleDeviceSharding
from capacity.chips import host_of
from capacity.price import TooLarge, price
host = host_of("v5litepod-1")
here = SingleDeviceSharding(devices(host)[0])

def priced(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=here) for shape in shapes]
    return price(jax.jit(function, out_shardings=here).trace(*arguments), host.chip)
"""
LARGE = """
try:
    priced(lambda a, b: jnp.sin(a @ b) @ a, (1 << 17, 1 << 16), (1 << 16, 1 << 17))
except TooLarge as reason:
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

found = priced(attention, (1024, 512), (512, 1024))
print(found.parts["self-attention"], found.cycles)
"""


def said(program: str) -> str:
    command = [sys.executable, "-c", PRELUDE + program]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_what_does_not_fit_is_told_in_the_compilers_words() -> None:
    assert said(LARGE) == (
        "Ran out of memory on HBM, the total memory required for HLO temporaries (80.00G) "
        "exceeds available HBM (15.75G).\n"
    )


def test_a_pallas_kernel_is_charged_for_its_work() -> None:
    least = 2 * 1024 * 512 * 1024 / CHIPS["v5e"].flops_a_cycle / KERNEL_SHARE
    part, cycles = map(int, said(KERNEL).split())
    assert part == cycles == round(least)
