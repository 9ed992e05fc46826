"""libtpu as a compiler for chips that are not there: its installation, the environment that it needs, and devices.

It has a folder of its own under .cache and stays out of .venv: where it is installed, every JAX that starts looks for
TPUs with it, and complains that there are none.
"""

import fcntl
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from app.aot.libtpu_flags import set_flags
from capacity.chips import SHAPES, Host
from cluster import ROOT
from cluster.cli import UserError, run_command
from cluster.terminal import say

REQUIREMENTS = ROOT / "requirements" / "tpu.txt"
HOME = Path(os.environ.get("IMAGINE_HOME", ROOT)).expanduser()  # on a head elsewhere, where what we install stays
FOLDER = HOME / ".cache" / "libtpu"
# It compiles only: no metadata server, no lock on chips, no log files; of what it would write to stderr, errors reach
# us as exceptions.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else a second process at the same time finds a lock file, and ends
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",  # any: without one it complains
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def pinned() -> str:
    """Its requirement with its hashes, as `make lock` has pinned it."""
    found = re.search(r"^libtpu==\S+(?: *\\\n +--hash=\S+)+", REQUIREMENTS.read_text("utf-8"), re.M)
    if not found:
        raise ValueError(f"{REQUIREMENTS} pins no libtpu.")
    return found[0]


def version() -> str:
    return pinned().split()[0].removeprefix("libtpu==")


def library() -> Path:
    return FOLDER / version() / "libtpu" / "libtpu.so"


def missing() -> str:
    """Why programs cannot be compiled for TPUs here; nothing if they can."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return f"libtpu, which compiles for TPUs, exists for x86-64 Linux only, and this is {platform.platform()}."
    return "" if library().exists() else "libtpu, which compiles for TPUs, is not installed: make libtpu"


def compile_only(environment: MutableMapping[str, str] = os.environ) -> None:
    """To be called before JAX is imported: it reads the environment once."""
    environment.update(ENVIRONMENT, TPU_LIBRARY_PATH=str(library()))
    set_flags(environment)  # as the pipeline does on a TPU


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


def install() -> None:
    if reason := missing():
        if not reason.endswith("make libtpu"):
            raise UserError(reason)
        FOLDER.mkdir(parents=True, exist_ok=True)
        with open(FOLDER / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if missing():  # and not installed by another make, while this one waited
                fetch()


def fetch() -> None:
    say(f"Installing libtpu {version()} into {FOLDER} (213 MB)")
    with tempfile.TemporaryDirectory(dir=FOLDER) as work:
        requirement = Path(work) / "libtpu.txt"
        requirement.write_text(pinned() + "\n", "utf-8")
        command = [*installer(), "--quiet", "--no-deps", "--require-hashes", "--target", f"{work}/there"]
        if subprocess.run([*command, "-r", str(requirement)]).returncode:
            raise UserError("libtpu could not be installed, for the reason above. To try again, run the same command.")
        there = FOLDER / version()
        shutil.rmtree(there, ignore_errors=True)
        os.replace(f"{work}/there", there)  # complete, or not there


def installer() -> list[str]:
    """pip, or where this Python has none, on a cluster's nodes, the uv that set them up."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip", "install", "--no-input", "--disable-pip-version-check", "--no-compile"]
    return [str(HOME / "uv"), "pip", "install", "--python", sys.executable]


if __name__ == "__main__":
    run_command(install)
