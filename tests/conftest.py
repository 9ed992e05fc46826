"""What all tests share."""

import os
import signal

import pytest

pytest_plugins = ["tests.skips"]

# What is tested is the CPU, also where JAX for CUDA is installed: tests compare bits, and run in several processes.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# An accidental broadcast between ranks is an error; JAX reads this when it is imported.
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"

# A shell that starts the tests in the background has Ctrl-C ignored, which the commands that tests stop would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts files with slow tests first: the processes of pytest-xdist then end at nearly the same time."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
