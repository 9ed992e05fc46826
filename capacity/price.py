"""One program compiled for a chip, and what that says: fit, work and modelled time.

    python -m capacity.price --model stable-diffusion-v1-4 --size 512x512 --rows 32 --tpu v5litepod-1

prices a UNet alone, on one chip. Every figure of time is modelled: libtpu's own estimate of each operation that it
compiled (see capacity/hlo.py), never measured.
"""

import argparse
import json
import re
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from capacity.chips import CHIPS, Chip, Host, host_of
from capacity.flops import FlopCount, count_flops
from capacity.hlo import CycleCount, count_cycles
from capacity.libtpu import compile_only, devices, missing
from cluster.cli import Parser, UsageError, UserError, run_command

if TYPE_CHECKING:
    from jax.stages import Traced

KERNEL_SHARE = 0.7  # of peak, that a custom kernel is taken to reach on its padded work
# What app/diffusion/models/ names its scopes; the innermost one says whose an operation is.
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


class TooLarge(Exception):
    """The program does not fit into the chip's memory; in libtpu's words."""


@dataclass(frozen=True)
class Price:
    """Per chip where not said otherwise."""

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


def price(traced: "Traced", chip: Chip, shards: int = 1) -> Price:
    """Compiles it. Raises TooLarge where it does not fit."""
    from jax.errors import JaxRuntimeError

    total = count_flops(traced.jaxpr, chip.tile)
    began = time.perf_counter()
    try:
        compiled = traced.lower().compile()
    except JaxRuntimeError as error:
        text = str(error)
        if text.startswith("RESOURCE_EXHAUSTED") and re.search("hbm", text[:500], re.I):  # and not VMEM, say
            raise TooLarge(text.splitlines()[0].partition(": ")[2]) from None
        raise
    compile_s = time.perf_counter() - began
    memory, costs = compiled.memory_analysis(), compiled.cost_analysis() or {}
    count = count_cycles(compiled.as_text() or "")
    parts, notes = charged(count, total, chip, shards)
    cycles = sum(parts.values())
    return Price(
        chip=chip.name,
        shards=shards,
        compile_s=round(compile_s, 1),
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        tflop=total.flops / 1e12,
        bytes=costs.get("bytes accessed", 0.0),
        cycles=cycles,
        padded_cycles=round(total.padded_flops / shards / chip.flops_a_cycle),
        # The weights come from HBM at least once, whatever the operations' prices say.
        seconds=max(cycles / chip.clock, memory.argument_size_in_bytes / chip.hbm_bytes_s),
        parts=dict(parts.most_common()),
        notes=tuple(notes),
    )


def charged(count: CycleCount, total: FlopCount, chip: Chip, shards: int) -> tuple[Counter[str], list[str]]:
    """Cycles by part, with custom kernels; and what the sum leaves out."""
    parts: Counter[str] = Counter()
    for op_name, cycles in count.cycles.items():
        parts[part_of(op_name)] += cycles
    notes = [f"{number} x {opcode} (libtpu does not price it)" for opcode, number in sorted(count.unpriced.items())]
    padded: dict[str, float] = {}
    for stack, flops in total.kernels.items():
        padded[part_of(stack)] = padded.get(part_of(stack), 0.0) + flops
    own: Counter[str] = Counter()
    for op_name in count.kernels:
        own[part_of(op_name)] += count.kernel_cycles[op_name]
    for part in own.keys() | padded.keys():
        # A kernel of several chips stands in a shard_map, whose body counts once for each of them.
        least = padded.get(part, 0.0) / shards / chip.flops_a_cycle / KERNEL_SHARE
        parts[part] += round(max(own[part], least))
        if not least:
            notes.append(f"a kernel in {part} multiplies nothing that can be seen: only its own estimate is charged")
    if count.open_loops > total.open_loops:
        notes.append(f"{count.open_loops - total.open_loops} loops whose turns cannot be read count once")
    return parts, notes


def part_of(op_name: str) -> str:
    """By the innermost scope: `jit(step)/while/body/transformer/self-attention/dot_general` -> self-attention."""
    return next((scope for scope in reversed(op_name.split("/")) if scope in PARTS), OTHER)


def unet(model: str, size: tuple[int, int], rows: int, dtype: str, host: Host) -> "Traced":
    """A UNet's evaluation for so many rows, as a replica runs it, traced for one chip of the host."""
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from jax.sharding import SingleDeviceSharding

    from app.diffusion.device_programs import predict_noise
    from app.diffusion.sharding import ROWS_TOGETHER
    from capacity.models import shapes_of

    checkpoint = shapes_of(model, jnp.dtype(dtype))
    here = SingleDeviceSharding(devices(host)[0])

    def shape(*shape: int, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

    graph, params = nnx.split(checkpoint.unet)
    factor, text = checkpoint.vae.config.scale_factor, checkpoint.text_encoder.config
    latents = (size[1] // factor, size[0] // factor, checkpoint.unet.config.in_channels)
    evaluate = partial(predict_noise, partial(nnx.merge, graph), ROWS_TOGETHER["tpu"])
    return jax.jit(evaluate, out_shardings=here).trace(
        jax.tree.map(lambda x: shape(*x.shape, dtype=x.dtype), params),
        shape(rows, *latents, dtype=jnp.float32),
        shape(rows, dtype=jnp.float32),
        shape(rows, text.max_position_embeddings, text.hidden_size, dtype=checkpoint.unet.dtype),
    )


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
            tell(price(unet(arguments.model, size, rows, arguments.dtype, host), host.chip), rows, arguments)
    except ValueError as error:
        raise UsageError(str(error)) from None
    except TooLarge as error:
        raise UserError(str(error)) from None


def size_of(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d{1,3})x([1-9]\d{1,3})", text)
    if not found or int(found[1]) % 64 or int(found[2]) % 64:
        raise ValueError(f"--size must be WIDTHxHEIGHT in multiples of 64, such as 512x512, got {text}.")
    return int(found[1]), int(found[2])


def tell(priced: Price, rows: int, arguments: argparse.Namespace) -> None:
    if arguments.json:
        print(json.dumps({"model": arguments.model, "rows": rows, **asdict(priced)}), flush=True)
        return
    chip = CHIPS[priced.chip]
    print(
        f"{arguments.model} UNet, {arguments.size}, {rows} rows, {arguments.dtype}, one {priced.chip} chip (modelled)"
    )
    print(
        f"  {priced.cycles / 1e6:.1f} M cycles, {1e3 * priced.seconds:.1f} ms, "
        f"{priced.cycles / max(1, priced.padded_cycles):.2f} of the padded bound of {priced.padded_cycles / 1e6:.1f} M"
    )
    print(
        f"  {priced.tflop:.2f} TFLOP, {priced.bytes / GIB:.2f} GiB read and written; arguments "
        f"{priced.arguments / MIB:.0f} MiB, temporaries {priced.temporaries / MIB:.0f} MiB, "
        f"peak {priced.peak / GIB:.2f} of {chip.hbm_gib:g} GiB; compiled in {priced.compile_s:.1f} s"
    )
    for part in priced.parts:
        print(f"  {100 * priced.share(part):5.1f} %  {priced.parts[part] / 1e6:8.2f} M cycles  {part}")
    for note in priced.notes:
        print(f"  not counted: {note}")


if __name__ == "__main__":
    run_command(main)
