"""How much a traced program multiplies, and the least that a matrix unit needs for it. Knows nothing of a compiler.

The padded bound counts each matrix product, and each tap of a convolution, with its inner and its narrower outer side
rounded up to the matrix unit's: a head of 40 features fills as much of it as one of 128. It is a model too: a compiler
may pack better.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

SUBLANES = 8  # rows go through a matrix unit in groups of so many


@dataclass
class Work:
    """Multiply-adds of a program on all its devices, as asked for and as padded; those inside custom kernels apart."""

    flops: float = 0.0
    padded_flops: float = 0.0
    kernels: dict[str, float] = field(default_factory=dict)  # name stack -> padded FLOPs of the kernels called there
    open_loops: int = 0  # whose number of turns only the caller knows: they count as one

    def add(self, other: "Work", times: float = 1) -> None:
        self.flops += other.flops * times
        self.padded_flops += other.padded_flops * times
        for name, padded in other.kernels.items():
            self.kernels[name] = self.kernels.get(name, 0.0) + padded * times
        self.open_loops += other.open_loops


def work(jaxpr: Any, tile: int, stack: str = "") -> Work:
    """Of a jaxpr, for matrix units of `tile` x `tile`."""
    total = Work()
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        here = "/".join(part for part in (stack, str(equation.source_info.name_stack)) if part)
        if name == "dot_general":
            total.add(product(equation, tile))
        elif name == "conv_general_dilated":
            total.add(convolution(equation, tile))
        elif name == "pallas_call":
            inner = Work()
            for inside in inner_jaxprs(parameters):
                inner.add(work(inside, tile), math.prod(parameters["grid_mapping"].grid))
            inner.kernels = {here: inner.padded_flops}
            total.add(inner)
        elif name == "cond":
            sides = [work(side.jaxpr, tile, here) for side in parameters["branches"]]
            total.add(max(sides, key=lambda side: side.padded_flops))
        else:
            times = parameters["length"] if name == "scan" else 1
            if name == "shard_map":
                times = shares(parameters)
            total.open_loops += name == "while"
            for inside in inner_jaxprs(parameters):
                total.add(work(inside, tile, here), times)
    return total


def shares(parameters: dict[str, Any]) -> int:
    """Among how many chips a shard_map divides; the others do the same as one of those."""
    named = [axes for spec in parameters["out_specs"] for axes in spec if axes is not None]
    sizes = parameters["mesh"].shape
    return math.prod(sizes[axis] for axes in named for axis in (axes if isinstance(axes, tuple) else (axes,)))


def inner_jaxprs(parameters: dict[str, Any]) -> Iterator[Any]:
    for value in parameters.values():
        for one in value if isinstance(value, (tuple, list)) else (value,):
            inside = getattr(one, "jaxpr", one)  # of a closed one
            if hasattr(inside, "eqns"):
                yield inside


def product(equation: Any, tile: int) -> Work:
    left, right = (operand.aval.shape for operand in equation.invars)
    (left_inner, right_inner), (left_batch, right_batch) = equation.params["dimension_numbers"]
    inner = math.prod(left[i] for i in left_inner)
    batch = math.prod(left[i] for i in left_batch)
    rows = math.prod(size for i, size in enumerate(left) if i not in (*left_inner, *left_batch))
    columns = math.prod(size for i, size in enumerate(right) if i not in (*right_inner, *right_batch))
    return matrix(batch, rows, inner, columns, tile)


def convolution(equation: Any, tile: int) -> Work:
    numbers, kernel = equation.params["dimension_numbers"], equation.invars[1].aval.shape
    out = equation.outvars[0].aval.shape
    outputs, inputs, *taps = (kernel[i] for i in numbers.rhs_spec)
    positions = math.prod(out) // outputs
    groups = equation.params["feature_group_count"]
    met = math.prod(taps) / math.prod(equation.params["lhs_dilation"])  # the others meet the zeros between pixels
    return matrix(groups * met, positions, inputs, outputs // groups, tile)


def matrix(batch: float, rows: int, inner: int, columns: int, tile: int) -> Work:
    """`batch` products of [rows, inner] and [inner, columns]; the longer outer side streams through the unit."""
    narrow, wide = sorted((rows, columns))
    padded = batch * up(narrow, tile) * up(wide, SUBLANES) * up(inner, tile)
    return Work(2.0 * batch * rows * inner * columns, 2.0 * padded)


def up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
