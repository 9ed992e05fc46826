"""Padded FLOPs of the matrix products in HLO text, counted as capacity/flops.py counts those of a traced program.

libtpu writes every product as a convolution. The axes of a batch, or of several rows, columns or inner sides, become
spatial dimensions of it, with windows and dilations that leave a single tap where an axis is no real window.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from capacity.flops import matrix
from capacity.hlo import CALLED, Computation, Instruction

WINDOW = re.compile(r"window=\{([^}]*)\}")
LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
GROUPS = re.compile(r"(?:feature|batch)_group_count=(\d+)")
DOT_AXES = re.compile(r"(lhs|rhs)_(contracting|batch)_dims=\{([\d,]*)\}")


def padded_flops(name: str, computations: Mapping[str, Computation], tile: int, done: dict[str, float]) -> float:
    """Of all products in a fusion's computation and in the fusions nested in it."""
    if name not in done:
        total = 0.0
        inside = computations[name].instructions if name in computations else {}
        for instruction in inside.values():
            if instruction.opcode == "fusion" and (called := CALLED.search(instruction.text)):
                total += padded_flops(called[1], computations, tile, done)
            else:
                total += product_flops(instruction, inside, tile)
        done[name] = total
    return done[name]


def product_flops(instruction: Instruction, around: Mapping[str, Instruction], tile: int) -> float:
    """0 for an instruction that is no product, or whose operands are not seen."""
    if instruction.opcode not in ("convolution", "dot"):
        return 0.0
    operands = [around[name].dimensions for name in instruction.operands if name in around]
    if len(operands) != 2:
        return 0.0
    left, right = operands
    flops_of = dot_flops if instruction.opcode == "dot" else convolution_flops
    return flops_of(instruction, left, right, tile)


def dot_flops(instruction: Instruction, left: tuple[int, ...], right: tuple[int, ...], tile: int) -> float:
    axes = {
        (side, kind): [int(i) for i in numbers.split(",") if i]
        for side, kind, numbers in DOT_AXES.findall(instruction.text)
    }
    inner = math.prod(left[i] for i in axes.get(("lhs", "contracting"), []))
    batch = math.prod(left[i] for i in axes.get(("lhs", "batch"), []))
    rows, columns = (math.prod(sides) // max(1, inner * batch) for sides in (left, right))
    return matrix(batch, rows, inner, columns, tile).padded_flops


def convolution_flops(instruction: Instruction, left: tuple[int, ...], right: tuple[int, ...], tile: int) -> float:
    labels = LABELS.search(instruction.text)
    if not labels:
        return 0.0
    inputs, kernel, output = (
        dict(zip(names, sides, strict=True))
        for names, sides in zip(labels.groups(), (left, right, instruction.dimensions), strict=True)
    )
    groups = math.prod(int(number) for number in GROUPS.findall(instruction.text))
    batch, rows, inner, columns = float(groups), output["b"], kernel["i"], output["f"] // groups
    axes = sorted(name for name in labels[2] if name.isdigit())
    for axis, window in zip(axes, windows(instruction, len(axes)), strict=True):
        taps = window.taps(inputs[axis], output[axis])
        if window.size == 1:
            rows *= output[axis]
        elif inputs[axis] == 1:  # the window runs over an axis of the kernel alone
            columns *= output[axis]
        elif output[axis] == 1:  # a sum over an axis
            inner *= taps
        elif taps == output[axis]:  # each position meets one tap, which is its own matrix
            batch *= taps
        else:
            batch *= taps / output[axis]
            rows *= output[axis]
    return matrix(batch, rows, inner, columns, tile).padded_flops


@dataclass(frozen=True)
class Window:
    """One spatial dimension of a convolution."""

    size: int
    stride: int = 1
    before: int = 0  # padding
    input_dilation: int = 1
    kernel_dilation: int = 1

    def taps(self, inputs: int, outputs: int) -> int:
        """How many pairs of an output's position and a tap read an input, and neither padding nor a dilation's hole."""
        return taps(self, inputs, outputs)


@lru_cache(None)
def taps(window: Window, inputs: int, outputs: int) -> int:
    if window.size == 1:
        return outputs
    count = 0
    for tap in range(window.size):
        offset = tap * window.kernel_dilation - window.before
        for position in range(outputs):
            read, hole = divmod(position * window.stride + offset, window.input_dilation)
            count += not hole and 0 <= read < inputs
    return count


def windows(instruction: Instruction, count: int) -> list[Window]:
    """`window={size=3x3 pad=1_1x1_1}` -> a Window for each of `count` spatial dimensions."""
    match = WINDOW.search(instruction.text)
    fields = dict(field.split("=") for field in match[1].split()) if match else {}

    def numbers(name: str, default: int) -> list[int]:
        sides = fields[name].split("x") if name in fields else [str(default)] * count
        return [int(side.split("_")[0]) for side in sides]  # padding is `before_after`

    names = {"size": 1, "stride": 1, "pad": 0, "lhs_dilate": 1, "rhs_dilate": 1}
    return [Window(*column) for column in zip(*(numbers(*item) for item in names.items()), strict=True)]
