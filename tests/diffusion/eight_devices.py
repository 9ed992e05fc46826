"""Runs a program in a process of its own, whose CPU JAX takes for eight devices."""

import os
import subprocess
import sys

import pytest

from cluster import ROOT
from tests.compiling import LEAST_TIME


def printed_lines(program: str, *arguments: str) -> list[str]:
    """What the program printed. Fails the test where the program fails. It compiles as the test's own process does."""
    flags = {"xla_force_host_platform_device_count": 8, **LEAST_TIME}
    environment = os.environ | {
        "XLA_FLAGS": " ".join(f"--{name}={str(value).lower()}" for name, value in flags.items()),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    command = [sys.executable, "-c", program, *arguments]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    if child.returncode:
        pytest.fail(child.stdout + child.stderr[-3000:])
    return child.stdout.splitlines()
