"""libtpu as a compiler for chips that are not there: the environment that it needs, and devices to compile for."""

import os
import platform
from collections.abc import MutableMapping
from typing import Any

from app.libtpu_flags import set_flags
from tpu.chips import SHAPES, Host

# It compiles only: no metadata server, no lock on chips, no log files; of what it would write to stderr, errors reach
# us as exceptions.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",  # any: without one it complains
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def compile_only(environment: MutableMapping[str, str] = os.environ) -> None:
    """To be called before JAX is imported: it reads the environment once."""
    environment.update(ENVIRONMENT)
    set_flags(environment)  # as the pipeline does on a TPU


def missing() -> str:
    """Why programs cannot be compiled for TPUs here; nothing if they can."""
    try:
        import libtpu  # noqa: F401
    except ImportError:
        if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
            return f"libtpu, which compiles for TPUs, exists for x86-64 Linux only, and this is {platform.platform()}."
        return "libtpu, which compiles for TPUs, is not installed: make tpu"
    return ""


def devices(host: Host) -> list[Any]:
    """Devices of one such host, for compiling only. There is one for each chip."""
    from jax.experimental import topologies

    shape = [int(side) for side in SHAPES[host.chips].split("x")] + [1]
    options: dict[str, Any] = {"chips_per_host_bounds": shape}
    if host.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # both cores of a chip as one device, as JAX has them on a real v4
    name = SHAPES[host.chips] if host.chip.flat else f"{SHAPES[host.chips]}x1"
    topology = topologies.get_topology_desc(f"{host.chip.name}:{name}", "tpu", **options)
    return list(topology.devices)
