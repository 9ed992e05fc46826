"""Counts the FLOPs of a traced program for TPUs, and those that a matrix unit spends with padding. Knows no compiler.

For the padded count, the inner and the narrower outer side of each matrix product, and of each tap of a convolution,
are rounded up to the matrix unit's side: a head of 40 features costs as much as one of 128. The padded count is a
model, and a compiler may pack better. Products whose results nobody reads do not count.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

SUBLANES = 8  # rows go through a matrix unit in groups of this size


@dataclass
class FlopCount:
    """FLOPs of a program on all its devices. The padded ones of custom kernels are counted by kernel too."""

    flops: float = 0.0
    padded_flops: float = 0.0
    kernels: dict[str, float] = field(default_factory=dict)  # name stack -> padded FLOPs of the kernels called there
    open_loops: int = 0  # loops of an unknown number of iterations, which count once

    def add(self, other: "FlopCount", times: float = 1) -> None:
        self.flops += other.flops * times
        self.padded_flops += other.padded_flops * times
        for name, padded in other.kernels.items():
            self.kernels[name] = self.kernels.get(name, 0.0) + padded * times
        self.open_loops += other.open_loops


def count_flops(jaxpr: Any, tile: int) -> FlopCount:
    """Counts the FLOPs of a jaxpr, closed or not, for matrix units of `tile` x `tile`."""
    from jax.interpreters.partial_eval import dce_jaxpr

    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)  # of a closed one
    live, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return count_equations(live, tile, "")


def count_equations(jaxpr: Any, tile: int, stack: str) -> FlopCount:
    total = FlopCount()
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        scope = "/".join(part for part in (stack, str(equation.source_info.name_stack)) if part)
        if name == "dot_general":
            total.add(product(equation, tile))
        elif name == "conv_general_dilated":
            total.add(convolution(equation, tile))
        elif name == "pallas_call":
            inner = FlopCount()
            for inside in inner_jaxprs(parameters):
                inner.add(count_equations(inside, tile, ""), math.prod(parameters["grid_mapping"].grid))
            declared = parameters.get("cost_estimate")
            done = min(1.0, declared.flops / inner.flops) if declared and inner.flops else 1.0  # some cells may do less
            padded = inner.padded_flops * done
            total.add(FlopCount(inner.flops * done, padded, {scope: padded}))
        elif name == "cond":
            branches = [count_equations(branch.jaxpr, tile, scope) for branch in parameters["branches"]]
            total.add(chosen(branches, parameters.get("branches_platforms")))
        else:
            times = parameters["length"] if name == "scan" else 1
            if name == "shard_map":
                times = shares(parameters)
            total.open_loops += name == "while"
            for inside in inner_jaxprs(parameters):
                total.add(count_equations(inside, tile, scope), times)
    return total


def chosen(branches: Sequence[FlopCount], platforms: Sequence[Sequence[str] | None] | None) -> FlopCount:
    """The most expensive branch. Of a choice by platform the TPU's kernels, with no more work than the default's, as
    both compute the same."""
    if platforms is None:
        return max(branches, key=lambda branch: branch.padded_flops)
    tpu, *others = [b for b, names in zip(branches, platforms, strict=True) if names is None or "tpu" in names]
    least = min((*others, tpu), key=lambda branch: (branch.padded_flops, branch.flops))
    return replace(least, kernels=tpu.kernels)


def shares(parameters: dict[str, Any]) -> int:
    """The number of different shards of a shard_map. Further chips repeat the work of these."""
    named = [axes for spec in parameters["out_specs"] for axes in spec if axes is not None]
    sizes = parameters["mesh"].shape
    return math.prod(sizes[axis] for axes in named for axis in (axes if isinstance(axes, tuple) else (axes,)))


def inner_jaxprs(parameters: dict[str, Any]) -> Iterator[Any]:
    for value in parameters.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            inside = getattr(item, "jaxpr", item)  # of a closed jaxpr
            if hasattr(inside, "eqns"):
                yield inside


def product(equation: Any, tile: int) -> FlopCount:
    left, right = (operand.aval.shape for operand in equation.invars)
    (left_inner, right_inner), (left_batch, right_batch) = equation.params["dimension_numbers"]
    inner = math.prod(left[i] for i in left_inner)
    batch = math.prod(left[i] for i in left_batch)
    rows = math.prod(size for i, size in enumerate(left) if i not in (*left_inner, *left_batch))
    columns = math.prod(size for i, size in enumerate(right) if i not in (*right_inner, *right_batch))
    return matrix(batch, rows, inner, columns, tile)


def convolution(equation: Any, tile: int) -> FlopCount:
    numbers, kernel = equation.params["dimension_numbers"], equation.invars[1].aval.shape
    out = equation.outvars[0].aval.shape
    outputs, inputs, *taps = (kernel[i] for i in numbers.rhs_spec)
    positions = math.prod(out) // outputs
    groups = equation.params["feature_group_count"]
    used = math.prod(taps) / math.prod(equation.params["lhs_dilation"])  # the other taps multiply zeros between pixels
    return matrix(groups * used, positions, inputs, outputs // groups, tile)


def matrix(batch: float, rows: int, inner: int, columns: int, tile: int) -> FlopCount:
    """`batch` products of [rows, inner] and [inner, columns]. The longer outer side streams through the unit."""
    narrow, wide = sorted((rows, columns))
    padded = batch * round_up(narrow, tile) * round_up(wide, SUBLANES) * round_up(inner, tile)
    return FlopCount(2.0 * batch * rows * inner * columns, 2.0 * padded)


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
