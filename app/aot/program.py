"""A program: a function with the shapes that it is compiled for. Knows nothing of what it computes."""

import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
from jax.stages import Compiled, Lowered, Traced


@dataclass(frozen=True)
class Program:
    """Once compiled it takes arrays of exactly the declared shapes and types, from JAX or numpy.

    Arrays of JAX must be on the declared devices; those of numpy go there by themselves. Of Python's scalars it takes
    an int for a declared int32, and a float for a float32. Anything else is a TypeError or a ValueError, and never a
    compile. Donated arguments are consumed.
    """

    name: str  # unique among the programs of a pipeline
    function: Callable[..., Any]  # pure; a function, or a partial of one
    arguments: tuple[Any, ...]  # pytrees of jax.ShapeDtypeStruct
    donate: tuple[int, ...] = ()
    out_shardings: Any = None
    compiler_options: Mapping[str, str] = field(default_factory=dict)  # of XLA, for this program alone

    def __post_init__(self) -> None:
        inner = self.function
        while isinstance(inner, partial):
            inner = inner.func
        if not isinstance(inner, types.FunctionType):  # what else could change without changing a saved program's key?
            raise ValueError(f"{self.name}: function must be a function or a partial of one, got {inner!r}.")

    def trace(self) -> Traced:
        options = {} if self.out_shardings is None else {"out_shardings": self.out_shardings}
        return jax.jit(self.function, donate_argnums=self.donate, **options).trace(*self.arguments)

    def lower(self) -> Lowered:
        lowered: Lowered = self.trace().lower()
        return lowered

    def compile(self, lowered: Lowered) -> Compiled:
        return lowered.compile(compiler_options=dict(self.compiler_options) or None)
