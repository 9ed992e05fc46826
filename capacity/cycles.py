"""Adds up the cycles of a compiled program from its HLO text. Knows nothing of models or JAX.

libtpu writes an estimate beside most operations that it compiles (`estimated_cycles`). A loop's body counts once for
each iteration, and a conditional counts as its most expensive branch. The estimate of a fusion covers what is inside,
and counts as no less than the padded matrix products in it: libtpu underprices some nested products. A loop whose
number of iterations depends on the program's arguments counts once. Async copies have no estimate: they are assumed to
be hidden behind computation.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from capacity.chips import Chip
from capacity.hlo import BRANCHES, CALLED, LOOP, OPERANDS, Computation, Instruction, parse, trip_count
from capacity.hlo_products import padded_flops, product_flops

NO_ESTIMATE = 1 << 62  # libtpu writes this many cycles or more where its estimate failed
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
EXPENSIVE = (  # reported if they have no estimate
    *COLLECTIVES,
    "custom-call",
    "sort",
    "fusion",
    "convolution",
    "dot",
    "gather",
    "scatter",
)
TARGET = re.compile(r'custom_call_target="([^"]*)"')
KERNEL = "tpu_custom_call"
# Custom calls that compute nothing. `ConcatBitcast` joins slices that were prefetched side by side.
FREE_CALLS = {"AllocateBuffer", "AssumeGatherIndicesInBound", "ConcatBitcast", "GatherScatterIndicesBitpacked"}


@dataclass
class CycleCount:
    """Cycles by op_name. Custom kernels are counted apart, as their estimates are unreliable."""

    cycles: Counter[str] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)  # op_name -> calls
    kernel_cycles: Counter[str] = field(default_factory=Counter)  # op_name -> the kernels' own estimates
    unpriced: Counter[str] = field(default_factory=Counter)  # opcode -> how many have no estimate
    open_loops: int = 0  # loops of an unknown number of iterations, which count once

    def add(self, other: "CycleCount", times: int = 1) -> None:
        for name in ("cycles", "kernels", "kernel_cycles", "unpriced"):
            mine = getattr(self, name)
            for key, value in getattr(other, name).items():
                mine[key] += value * times
        self.open_loops += other.open_loops

    @property
    def total(self) -> int:
        return self.cycles.total() + self.kernel_cycles.total()


def count_cycles(text: str, chip: Chip) -> CycleCount:
    """Counts the cycles of a compiled program, given as the text of `Compiled.as_text()`."""
    computations, entry = parse(text)
    return Counting(computations, chip).count(entry)


class Counting:
    """Counts each computation once, however often it is called."""

    def __init__(self, computations: Mapping[str, Computation], chip: Chip):
        self.computations, self.chip = computations, chip
        self.counts: dict[str, CycleCount] = {}
        self.padded: dict[str, float] = {}  # FLOPs, by computation

    def count(self, name: str) -> CycleCount:
        if name not in self.counts:
            total = CycleCount()
            computation = self.computations.get(name, Computation({}))
            for instruction in computation.instructions.values():
                self.add(instruction, computation, total)
            self.counts[name] = total
        return self.counts[name]

    def add(self, instruction: Instruction, around: Computation, total: CycleCount) -> None:
        opcode, text, cycles = instruction.opcode, instruction.text, instruction.cycles
        target = TARGET.search(text) if opcode == "custom-call" else None
        if opcode == "while" and (loop := LOOP.search(text)):
            iterations = trip_count(instruction, around, self.computations)
            total.add(self.count(loop[2]), 1 if iterations is None else iterations)
            total.open_loops += iterations is None
        elif opcode == "conditional" and (match := BRANCHES.search(text)):
            branches = OPERANDS.findall(match[1]) if match[1] else [match[2], match[3]]
            total.add(max((self.count(branch) for branch in branches), key=lambda count: count.total))
        elif target and target[1] == KERNEL:
            total.kernels[instruction.op_name] += 1
            total.kernel_cycles[instruction.op_name] += cycles or 0
        elif cycles is not None:
            failed = cycles >= NO_ESTIMATE
            total.cycles[instruction.op_name] += max(0 if failed else cycles, self.least(instruction, around))
            if failed:
                total.unpriced[opcode] += 1
        elif opcode in ("fusion", "call", "async-start") and (called := CALLED.search(text)):
            total.add(self.count(called[1]))
        elif opcode in EXPENSIVE and not (target and target[1] in FREE_CALLS):
            total.unpriced[f"{opcode} {target[1]}" if target else opcode] += 1

    def least(self, instruction: Instruction, around: Computation) -> int:
        """The cycles that the matrix units need for the products in an instruction."""
        flops = product_flops(instruction, around.instructions, self.chip.tile)
        if instruction.opcode == "fusion" and (called := CALLED.search(instruction.text)):
            flops = padded_flops(called[1], self.computations, self.chip.tile, self.padded)
        return round(flops / self.chip.flops_a_cycle)
