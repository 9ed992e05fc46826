"""What all benchmarks report alike: medians with their spread, the machine, progress, a table and a JSON file."""

import importlib.metadata
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from cluster import ROOT

OUTPUTS = ROOT / "outputs"
WIDTH = 120  # of tables when the output is not a terminal
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "ray")

progress = Console(stderr=True)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """The median and range over runs, and the value of each run."""
    runs = [float(value) for value in values]
    return {"median": statistics.median(runs), "min": min(runs), "max": max(runs), "runs": runs}


def machine() -> dict[str, Any]:
    """What a figure depends on besides the code. `load` shows whether other work was running. Starts JAX."""
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        "devices": sorted({f"{device.platform} {device.device_kind}" for device in jax.devices()}),
        "packages": {package: importlib.metadata.version(package) for package in PACKAGES},
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def processor() -> str:
    try:
        names = re.findall(r"^model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text("utf-8"), re.M)
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def log(text: str) -> None:
    """Prints a line of progress on stderr."""
    progress.print(f"[dim]{time.strftime('%H:%M:%S')}[/dim] {text}", highlight=False)


def write(name: str, result: dict[str, Any], table: Table) -> Path:
    """Prints the table and writes the result to outputs/bench-NAME.json."""
    path = OUTPUTS / f"bench-{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    console.print(table)
    console.print(f"Written to {path}.")
    return path
