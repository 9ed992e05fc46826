"""Compiles a program for a chip and models its cost: memory, FLOPs and time.

    python -m capacity.program_cost --model stable-diffusion-v1-4 --size 512x512 --rows 32 --tpu v5litepod-1

shows the cost of a denoiser alone, on one chip. No time is measured: all are sums of libtpu's own estimates of the
operations that it compiled (capacity/cycles.py).
"""

import argparse
import json
import re
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from capacity.chips import CHIPS, Chip, Host, host_of
from capacity.cycles import CycleCount, count_cycles
from capacity.flops import FlopCount, count_flops
from capacity.kernels import ASSUMED_SHARE, share_of
from capacity.libtpu import compile_only, devices, missing
from cluster.cli import Parser, UsageError, UserError, run_command

if TYPE_CHECKING:
    from jax.stages import Traced

# The scopes that app/diffusion/models/ names. An operation belongs to the innermost.
PARTS = (
    "self-attention",
    "cross-attention",
    "feed-forward",
    "resnet",
    "resampling",
    "time-embedding",
    "transformer",
)
OTHER = "other"
MIB = 1 << 20
GIB = 1 << 30


class OutOfMemory(Exception):
    """The program does not fit into the chip's memory. The message is libtpu's."""


@dataclass(frozen=True)
class ProgramCost:
    """Figures of one chip, unless a comment says otherwise."""

    chip: str
    shards: int  # chips that the rows are divided among
    compile_s: float
    arguments: int  # bytes
    outputs: int
    temporaries: int
    code: int
    tflop: float  # of matrix products, on all chips together
    bytes: float  # read and written, as XLA counts them
    cycles: int
    padded_cycles: int  # the least that the matrix units need
    seconds: float  # modelled
    parts: dict[str, int] = field(default_factory=dict)  # cycles
    notes: tuple[str, ...] = ()

    @property
    def left_out(self) -> list[str]:
        """The notes without their counts."""
        return [re.sub(r"^\d+ x ", "", note) for note in self.notes]

    @property
    def peak(self) -> int:
        """All that is in HBM while it runs alone."""
        return self.arguments + self.outputs + self.temporaries + self.code

    def share(self, part: str) -> float:
        return self.parts.get(part, 0) / self.cycles if self.cycles else 0.0


def cost_of(
    traced: "Traced", chip: Chip, shards: int = 1, compiler_options: Mapping[str, str] = MappingProxyType({})
) -> ProgramCost:
    """Compiles a program. Raises OutOfMemory if it does not fit."""
    from jax.errors import JaxRuntimeError

    total = count_flops(traced.jaxpr, chip.tile)
    began = time.perf_counter()
    try:
        compiled = traced.lower().compile(compiler_options=dict(compiler_options) or None)
    except JaxRuntimeError as error:
        text = str(error)
        if text.startswith("RESOURCE_EXHAUSTED") and re.search("hbm", text[:500], re.I):  # and not VMEM
            raise OutOfMemory(text.splitlines()[0].partition(": ")[2]) from None
        raise
    compile_s = time.perf_counter() - began
    memory, analysis = compiled.memory_analysis(), compiled.cost_analysis() or {}
    count = count_cycles(compiled.as_text() or "", chip)
    parts, notes = cycles_by_part(count, total, chip, shards)
    cycles = sum(parts.values())
    return ProgramCost(
        chip=chip.name,
        shards=shards,
        compile_s=round(compile_s, 1),
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        tflop=total.flops / 1e12,
        bytes=analysis.get("bytes accessed", 0.0),
        cycles=cycles,
        padded_cycles=round(total.padded_flops / shards / chip.flops_a_cycle),
        # Weights are read from HBM at least once, whatever the operations' estimates are.
        seconds=max(cycles / chip.clock, memory.argument_size_in_bytes / chip.hbm_bytes_s),
        parts=dict(parts.most_common()),
        notes=tuple(notes),
    )


def cycles_by_part(count: CycleCount, total: FlopCount, chip: Chip, shards: int) -> tuple[Counter[str], list[str]]:
    """Returns cycles by part, custom kernels included, and notes on what the sum leaves out."""
    parts: Counter[str] = Counter()
    for op_name, cycles in count.cycles.items():
        parts[part_of(op_name)] += cycles
    notes = [f"{number} x {opcode} (libtpu has no estimate)" for opcode, number in sorted(count.unpriced.items())]
    own: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for op_name, number in count.kernels.items():
        own[part_of(op_name)] += count.kernel_cycles[op_name]
        calls[part_of(op_name)] += number
    products: Counter[str] = Counter()
    assumed = set()
    for stack, flops in total.kernels.items():
        share = share_of(stack, chip.name)
        if share is None:
            assumed.add(part_of(stack))
        # A kernel that several chips share is in a shard_map, whose body counts once for each shard.
        products[part_of(stack)] += round(flops / shards / chip.flops_a_cycle / (share or ASSUMED_SHARE))
    for part in own.keys() | products.keys():
        parts[part] += max(own[part], products[part])
        if not products[part]:
            notes.append(f"{calls[part]} x kernel in {part} without a visible product (only its own estimate counts)")
        elif part in assumed and products[part] > own[part]:
            rule = f"{100 * ASSUMED_SHARE:.0f} % of peak"
            notes.append(f"{calls[part]} x kernel in {part} beyond its padded products at {rule}")
    if count.open_loops > total.open_loops:
        notes.append(f"{count.open_loops - total.open_loops} loops of unknown length count once")
    return parts, notes


def part_of(op_name: str) -> str:
    """The innermost scope: `jit(step)/while/body/transformer/self-attention/dot_general` -> self-attention."""
    return next((scope for scope in reversed(op_name.split("/")) if scope in PARTS), OTHER)


def denoiser(
    model: str, size: tuple[int, int], rows: int, dtype: str, host: Host
) -> tuple["Traced", Mapping[str, str]]:
    """Traces an evaluation of the denoiser for so many rows, as a replica runs it, for one chip of the host; and the
    compiler options of its programs."""
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from jax.sharding import SingleDeviceSharding

    from app.diffusion.declared_programs import encoded_shapes, part_of, step_options
    from app.diffusion.device_programs import predict_noise
    from app.diffusion.sharding import ROWS_TOGETHER
    from capacity.models import shapes_of

    checkpoint = shapes_of(model, jnp.dtype(dtype))
    sharding = SingleDeviceSharding(devices(host)[0])

    def shape(*shape: int, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    family = checkpoint.family
    networks, params = {}, {}
    for part, network in checkpoint.networks.items():
        graph, params[part] = nnx.split(network)
        networks[part] = partial(nnx.merge, graph)
    width, height = (side // family.pixels_per_latent for side in size)
    evaluate = partial(predict_noise, family, networks, ROWS_TOGETHER["tpu"])
    traced = jax.jit(evaluate, out_shardings=sharding).trace(
        jax.tree.map(lambda x: shape(*x.shape, dtype=x.dtype), part_of(family, params, "denoise")),
        shape(rows, height, width, family.latent_channels, dtype=jnp.float32),
        shape(rows, dtype=jnp.float32),
        jax.tree.map(lambda x: shape(rows, *x.shape, dtype=x.dtype), encoded_shapes(family, networks, params)),
    )
    return traced, step_options(family, devices(host)[0])


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--model", default="stable-diffusion-v1-4")
    parser.add_argument("--size", default="512x512", help="WIDTHxHEIGHT in pixels")
    parser.add_argument("--rows", type=int, nargs="+", default=[2], help="a guided picture has two")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--tpu", default="v5litepod-1", help="a type with one host; one of its chips is compiled for")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if reason := missing():
        raise UserError(reason)
    try:
        host, size = host_of(arguments.tpu), size_of(arguments.size)
        if min(arguments.rows) < 1:
            raise ValueError(f"--rows must be at least 1, got {min(arguments.rows)}.")
        compile_only()
        for rows in arguments.rows:
            traced, options = denoiser(arguments.model, size, rows, arguments.dtype, host)
            show(cost_of(traced, host.chip, compiler_options=options), rows, arguments)
    except ValueError as error:
        raise UsageError(str(error)) from None
    except OutOfMemory as error:
        raise UserError(str(error)) from None


def size_of(text: str) -> tuple[int, int]:
    sides = re.fullmatch(r"([1-9]\d{1,3})x([1-9]\d{1,3})", text)
    if not sides or int(sides[1]) % 64 or int(sides[2]) % 64:
        raise ValueError(f"--size must be WIDTHxHEIGHT in multiples of 64, such as 512x512, got {text}.")
    return int(sides[1]), int(sides[2])


def show(cost: ProgramCost, rows: int, arguments: argparse.Namespace) -> None:
    if arguments.json:
        print(json.dumps({"model": arguments.model, "rows": rows, **asdict(cost)}), flush=True)
        return
    chip = CHIPS[cost.chip]
    print(
        f"{arguments.model} denoiser, {arguments.size}, {rows} rows, {arguments.dtype}, one {cost.chip} chip (modelled)"
    )
    print(
        f"  {cost.cycles / 1e6:.1f} M cycles, {1e3 * cost.seconds:.1f} ms, "
        f"{cost.cycles / max(1, cost.padded_cycles):.2f} of the padded bound of {cost.padded_cycles / 1e6:.1f} M"
    )
    print(
        f"  {cost.tflop:.2f} TFLOP, {cost.bytes / GIB:.2f} GiB read and written; arguments "
        f"{cost.arguments / MIB:.0f} MiB, temporaries {cost.temporaries / MIB:.0f} MiB, "
        f"peak {cost.peak / GIB:.2f} of {chip.hbm_gib:g} GiB; compiled in {cost.compile_s:.1f} s"
    )
    for part in cost.parts:
        print(f"  {100 * cost.share(part):5.1f} %  {cost.parts[part] / 1e6:8.2f} M cycles  {part}")
    for note in cost.notes:
        print(f"  not counted: {note}")


if __name__ == "__main__":
    run_command(main)
