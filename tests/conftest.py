"""What all tests share."""

import gc
import os
import signal
from collections.abc import Iterator

import jax
import pytest

from tests.compiling import compile_in_the_least_time

# Imports and collection leave a million objects that stay, and little garbage. To look for it is a third of their time.
gc.disable()

pytest_plugins = ["tests.skips", "tests.scheduling"]

# What is tested is the CPU, also where JAX for CUDA is installed: tests compare bits, and run in several processes.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])

# An accidental broadcast between ranks is an error, also in the processes that tests start.
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
jax.config.update("jax_numpy_rank_promotion", "raise")
# Tests compile much and compute little.
compile_in_the_least_time(True)

# A shell that starts the tests in the background has Ctrl-C ignored, which the commands that tests stop would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts files with slow tests first: the processes of pytest-xdist then end at nearly the same time."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="module")
def fully_optimized() -> Iterator[None]:
    """Compiles as a replica does, for claims about single bits: these depend on how loops are vectorized."""
    compile_in_the_least_time(False)
    yield
    compile_in_the_least_time(True)


@pytest.fixture
def compiled_quickly(fully_optimized: None) -> Iterator[None]:
    """Of a module with claims about single bits, a test that makes none and compiles programs of its own."""
    compile_in_the_least_time(True)
    yield
    compile_in_the_least_time(False)
