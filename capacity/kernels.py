"""Prices of our own Pallas kernels: the share of a chip's peak that they reach on their padded products.

    python -m capacity.kernels --tpu v5litepod-1 --keys 4096 --heads 10 --size 64

compiles the attention kernel alone and counts the instruction bundles that libtpu scheduled for it, one a cycle. Copies
between HBM and VMEM are taken to be hidden. libtpu writes no estimate for a kernel, so a whole program takes SHARES.
"""

import os
import re
import tempfile
from collections import Counter
from pathlib import Path

from app.aot.libtpu_flags import VARIABLE
from capacity.chips import Host, host_of
from capacity.flops import matrix
from capacity.libtpu import compile_only, devices, missing
from cluster.cli import Parser, UsageError, UserError, run_command

# Scope of the kernel -> chip -> share of peak; docs/measured.md has the figures. Other kernels and chips are assumed.
SHARES = {
    "attention-kernel-64": {"v4": 0.65, "v5e": 0.92, "v6e": 0.66},
    "attention-kernel-128": {"v5e": 0.76},
    "attention-kernel-512": {"v5e": 0.95, "v6e": 0.56},
    "rotary-attention-kernel": {"v4": 0.69, "v5e": 0.84, "v6e": 0.68},
}
ASSUMED_SHARE = 0.7
ROWS = 64  # so many that XLA leaves them in HBM
BUNDLE = re.compile(r"^\s*(?:0x)?[0-9a-f]+ +(?:[A-Z]{2})? *: (>*)")  # one `>` for each loop around it


def share_of(stack: str, chip: str) -> float | None:
    """Of the kernel with this stack of scopes; None if nobody counted it."""
    scope = next((scope for scope in reversed(stack.split("/")) if scope in SHARES), None)
    return SHARES[scope].get(chip) if scope else None


def bundles(text: str) -> Counter[int]:
    """Bundles by how many loops are around them, of libtpu's text of a kernel's final schedule."""
    return Counter(len(match[1]) for line in text.splitlines() if (match := BUNDLE.match(line)))


def attention_share(host: Host, keys: int, heads: int, size: int, folder: Path) -> float:
    """Compiles the attention kernel for one chip, for as many queries as keys. libtpu's dumps go to `folder`."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from app.diffusion.models.tpu_attention import LANES, at_once, attend_in_vmem, block_of, queries_of, width_of

    sharding = SingleDeviceSharding(devices(host)[0])
    x = jax.ShapeDtypeStruct((ROWS, keys, heads, size), jnp.bfloat16, sharding=sharding)
    jax.jit(attend_in_vmem, out_shardings=sharding).lower(x, x, x).compile()
    (path,) = [path for path in folder.glob("*attention-kernel*-final_bundles.txt") if "analysis" not in path.name]
    count = bundles(path.read_text("utf-8"))
    # The grid's loop, and in it that of the keys that are in VMEM at once.
    cycles = count[1] * (keys // at_once(keys, size)) + count[2] * (keys // block_of(keys, size))
    chip, queries = host.chip, queries_of(keys)
    products = (matrix(1, queries, size, keys, chip.tile), matrix(1, queries, keys, size, chip.tile))
    flops = sum(product.padded_flops for product in products) * max(1, LANES // width_of(size))
    return flops / (chip.flops_a_cycle / chip.cores) / cycles  # a cell runs on one core


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--tpu", default="v5litepod-1")
    parser.add_argument("--keys", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=10)
    parser.add_argument("--size", type=int, default=64, help="features of a head")
    arguments = parser.parse_args()
    if reason := missing():
        raise UserError(reason)
    try:
        host = host_of(arguments.tpu)
    except ValueError as error:
        raise UsageError(str(error)) from None
    with tempfile.TemporaryDirectory() as folder:
        compile_only()
        os.environ[VARIABLE] += f" --xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        share = attention_share(host, arguments.keys, arguments.heads, arguments.size, Path(folder))
    print(f"{100 * share:.1f} % of a {host.chip.name}'s peak on padded products (modelled)")


if __name__ == "__main__":
    run_command(main)
