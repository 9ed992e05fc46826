"""Runs a program in a process of its own, whose CPU JAX takes for eight devices."""

import os
import subprocess
import sys

import pytest

from cluster import ROOT


def printed_lines(program: str, *arguments: str, flags: str = "") -> list[str]:
    """What the program printed. Fails the test where the program fails. `flags` are further XLA flags."""
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=8 {flags}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # as in tests/conftest.py
    }
    command = [sys.executable, "-c", program, *arguments]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    if child.returncode:
        pytest.fail(child.stdout + child.stderr[-3000:])
    return child.stdout.splitlines()
