"""Prices of our own Pallas kernels: the share of a chip's peak that they reach on their padded products.

    python -m capacity.kernels --tpu v5litepod-1 --keys 4096 --heads 10 --size 64
    python -m capacity.kernels --tpu v5litepod-1 --keys 4608 --heads 24 --rotary
    python -m capacity.kernels --tpu v5litepod-1 --keys 4608 --heads 24 --rotary --chips 4  # that divide an image

compiles an attention kernel alone and counts the instruction bundles that libtpu scheduled for it, one a cycle, and at
least the cycles of its products. Copies between HBM and VMEM are taken to be hidden. libtpu writes no estimate for a
kernel, so a whole program takes SHARES.
"""

import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from app.aot.libtpu_flags import VARIABLE
from capacity.chips import Host, host_of
from capacity.flops import matrix
from capacity.libtpu import compile_only, devices, missing
from cluster.cli import Parser, UsageError, UserError, run_command

# Scope of the kernel -> chip -> share of peak; docs/measured.md has the figures. Other kernels and chips are assumed.
SHARES = {
    "attention-kernel-64": {"v4": 0.65, "v5e": 0.92, "v6e": 0.73},
    "attention-kernel-128": {"v5e": 0.76, "v6e": 0.54},
    "attention-kernel-512": {"v5e": 0.95, "v6e": 0.68},
    "rotary-attention-kernel": {"v4": 0.72, "v5e": 0.84, "v6e": 0.72},
    "rotary-attention-kernel-divided": {"v4": 0.65, "v5e": 0.76, "v6e": 0.65},  # over four chips
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


@contextmanager
def traced_for(host: Host) -> Iterator[None]:
    """As a program is traced for a chip of the host: kernels see its kind."""
    import jax
    import numpy as np
    from jax.sharding import Mesh

    with jax.sharding.use_abstract_mesh(Mesh(np.array(devices(host)[:1]), ("chip",)).abstract_mesh):
        yield


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


def rotary_share(host: Host, keys: int, heads: int, chips: int, folder: Path) -> float:
    """The same for the kernel of rotated heads, over one stream whose tokens are divided over so many chips."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from app.diffusion.models import tpu_rotary_attention as rotary
    from app.diffusion.models.rotary_attention import Stream
    from app.diffusion.models.transformer_layers import Rotation

    sharding = SingleDeviceSharding(devices(host)[0])

    def shape(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    tokens, norm = keys // chips, shape(rotary.LANES)
    q, k = (shape(1, count, heads * rotary.LANES) for count in (tokens, keys))
    table = shape(1, keys, rotary.LANES, dtype=jnp.float32)
    streams = [Stream(q, k, k, norm, norm, Rotation(table, table))]
    kernel = partial(rotary.attend_rotated, lengths=None, heads=heads, epsilon=1e-6, first=(0, 0, 0))
    jax.jit(kernel, out_shardings=sharding).lower(streams, own=shape(dtype=jnp.int32)).compile()
    (path,) = [
        path for path in folder.glob("*rotary-attention-kernel*-final_bundles.txt") if "analysis" not in path.name
    ]
    regions = loop_regions(path.read_text("utf-8"))
    # The loop over keys is the first with exponents. The next, and what is behind it, only runs for extreme scales.
    with_exponents = [i for i, (depth, lines) in enumerate(regions) if depth == 2 and any("vpow2" in x for x in lines)]
    usual = regions[: with_exponents[1]]
    preparing = sum(len(lines) for depth, lines in usual[: with_exponents[0]] if depth == 2)
    queries, block = rotary.queries_of([tokens]), rotary.keys_of(keys)
    chip = host.chip
    products = (matrix(1, queries, rotary.LANES, block, chip.tile), matrix(1, queries, block, rotary.LANES, chip.tile))
    least = sum(product.padded_flops for product in products) / (chip.flops_a_cycle / chip.cores)
    rows = rotary.block_of(keys, rotary.MOST_ROWS, rotary.TILE)
    cycles = float(sum(len(lines) for depth, lines in usual if depth == 1))
    cycles += preparing * (keys // rows) / (tokens // queries)  # once a head
    cycles += keys // block * max(least, len(regions[with_exponents[0]][1]))
    return keys // block * least / cycles


def loop_regions(text: str) -> list[tuple[int, list[str]]]:
    """Bundles that follow each other with as many loops around them, in the order of the program."""
    matched = ((len(match[1]), line) for line in text.splitlines() if (match := BUNDLE.match(line)))
    return [(depth, [line for _, line in group]) for depth, group in groupby(matched, key=lambda bundle: bundle[0])]


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--tpu", default="v5litepod-1")
    parser.add_argument("--keys", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=10)
    parser.add_argument("--size", type=int, default=64, help="features of a head")
    parser.add_argument("--rotary", action="store_true", help="the kernel with norms and rotations, heads of 128")
    parser.add_argument("--chips", type=int, default=1, help="of that kernel: chips that divide an image's tokens")
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
        with traced_for(host):
            if arguments.rotary:
                share = rotary_share(host, arguments.keys, arguments.heads, arguments.chips, Path(folder))
            else:
                share = attention_share(host, arguments.keys, arguments.heads, arguments.size, Path(folder))
    print(f"{100 * share:.1f} % of a {host.chip.name}'s peak on padded products (modelled)")


if __name__ == "__main__":
    run_command(main)
