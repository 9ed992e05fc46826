"""How XLA compiles in a process of pytest: in the least time, or as a replica does. Processes that tests start do the
latter, but for those of tests/diffusion/eight_devices.py. The private function of JAX was seen in 0.10.2; a test in
tests/aot/test_jax_internals.py holds it to that."""

from typing import Any

import jax
from jax._src import compiler

# The emitters of fusions go through MLIR, which is more than half of a small program's compile on a CPU.
LEAST_TIME = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}

options: dict[str, Any] = {}  # of each compile, unless the program has its own
get_compile_options = compiler.get_compile_options


def with_options(env_options_overrides: dict[str, Any] | None = None, **others: Any) -> Any:
    return get_compile_options(env_options_overrides=options | (env_options_overrides or {}), **others)


compiler.get_compile_options = with_options  # type: ignore[assignment]


def compile_in_the_least_time(least: bool) -> None:
    """Also leaves out the slow passes of LLVM."""
    jax.config.update("jax_disable_most_optimizations", least)
    options.clear()
    options.update(LEAST_TIME if least else {})
