"""What a compiled program depends on, as plain facts that can be compared and logged.

They are versions, devices, flags, sources, shapes, and the values that the program's function holds. Knows nothing of
files.
"""

import hashlib
import importlib.metadata
import os
import platform
import re
import types
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from app.aot.program import Program
from app.aot.sources import ROOT, sources

FORMAT = 1
PACKAGES = ("jax", "jaxlib", "flax", "libtpu")
# A program for NVIDIA GPUs holds choices among the kernels of these libraries.
CUDA_PACKAGES = ("jax-cuda13-plugin", "nvidia-cublas", "nvidia-cudnn-cu13")
OPTIONS = (  # of JAX; they change what a function lowers or compiles to
    "jax_default_device",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_disable_most_optimizations",
    "jax_enable_x64",
    "jax_numpy_dtype_promotion",
    "jax_threefry_partitionable",
    "jax_use_shardy_partitioner",
)
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")


def fingerprint(devices: Iterable[jax.Device] | None = None) -> dict[str, str]:
    """Versions, devices, flags and sources, each under its name in the log: all but the program itself.

    It is the same on a TPU host as where libtpu compiles for such a host (capacity/libtpu.py).
    """
    first, *others = jax.devices() if devices is None else devices
    total = jax.device_count() if first in jax.devices() else 1 + len(others)
    facts = {package: version(package) for package in PACKAGES}
    facts |= {
        # A TPU's platform is libtpu, whose version is in the facts already.
        "platform": "tpu" if first.platform == "tpu" else f"{first.platform} {first.client.platform_version}",
        "device": first.device_kind,
        "devices": f"{1 + len(others)} of {total} in {jax.process_count()} processes",
    }
    if first.platform == "cpu":
        facts["host"] = host()
    if first.platform == "gpu":
        facts |= {package: version(package) for package in CUDA_PACKAGES}
    facts |= {option: str(getattr(jax.config, option, None)) for option in OPTIONS}
    facts |= {flag: os.environ.get(flag, "") for flag in FLAGS}
    return facts | {f"source {path.relative_to(ROOT)}": digest(path.read_bytes()) for path in sources(ROOT)}


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def host() -> str:
    """A CPU program is compiled for the CPU's instructions, and divides its loops among the cores."""
    features = platform.processor()
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
        features = digest(" ".join(sorted(set(re.findall(r"^(?:flags|Features)\s*:.*", text, re.M)))).encode())
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{platform.machine()} {features}, {cores} cores"


def key_of(program: Program, fingerprint: Mapping[str, str], seen: dict[int, str]) -> dict[str, Any]:
    """Everything that a saved program was made of. `seen` caches long descriptions that programs share."""
    return {
        "format": FORMAT,
        "program": program.name,
        "function": describe_function(program.function, seen),
        "arguments": [describe_argument(argument) for argument in program.arguments],
        "donate": list(program.donate),
        "compiler_options": dict(program.compiler_options),
        "out_shardings": [describe_sharding(x) for x in jax.tree.leaves(program.out_shardings)],
        "fingerprint": dict(fingerprint),
    }


def describe_function(value: Any, seen: dict[int, str]) -> str:
    """A function and the values in its partials and closures, which are part of the program as its source is."""
    if isinstance(value, partial):
        values = [*value.args, *(item for pair in sorted(value.keywords.items()) for item in pair)]
        return f"{describe_function(value.func, seen)}({', '.join(describe_function(x, seen) for x in values)})"
    if isinstance(value, types.FunctionType):
        values = [cell.cell_contents for cell in value.__closure__ or ()]
        return f"{value.__module__}.{value.__qualname__}" + "".join(f"[{describe_function(x, seen)}]" for x in values)
    if isinstance(value, jax.sharding.Sharding):
        return describe_sharding(value)
    if id(value) not in seen:
        arrays = [x for x in jax.tree.leaves(value) if isinstance(x, (np.ndarray, jax.Array))]
        # The repr of a Flax graph has functions with their addresses, which differ from run to run.
        text = re.sub(r" at 0x[0-9a-f]+", "", repr(value)) + "".join(digest(np.asarray(x).tobytes()) for x in arrays)
        seen[id(value)] = shorten(text, type(value).__name__)
    return seen[id(value)]


def describe_argument(argument: Any) -> str:
    leaves = jax.tree_util.tree_flatten_with_path(argument)[0]
    lines = [
        f"{jax.tree_util.keystr(path)} {leaf.dtype}{list(leaf.shape)} {describe_sharding(leaf.sharding)}".strip()
        for path, leaf in leaves
    ]
    return shorten("; ".join(lines), f"{len(leaves)} arrays")


def describe_sharding(sharding: Any) -> str:
    if sharding is None:
        return ""
    mesh = getattr(sharding, "mesh", None)
    return f"{sharding}" + (f" on {[device.id for device in mesh.devices.flat]}" if mesh is not None else "")


def shorten(text: str, what: str) -> str:
    return text if len(text) <= 300 else f"{what} {digest(text.encode())}"


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    """The facts that differ, with both values unless they are checksums."""
    names = [name for name in current if name != "fingerprint" and saved.get(name) != current[name]]
    for name in sorted(saved["fingerprint"] | current["fingerprint"]):
        was, now = saved["fingerprint"].get(name), current["fingerprint"].get(name)
        if was != now:
            names.append(name if name.startswith("source ") else f"{name} ({was!s:.80}, here {now!s:.80})")
    return ", ".join(names)
