"""Installs libtpu and sets it up as a compiler for TPUs that are not there.

It is installed under .cache and not in .venv: beside JAX, each JAX process would look for TPUs and warn that there are
none.
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
HOME = Path(os.environ.get("IMAGINE_HOME", ROOT)).expanduser()  # on a remote head, the folder that persists
FOLDER = HOME / ".cache" / "libtpu"
# It only compiles: no metadata server, no lock on chips, no log files. Its errors are raised as exceptions too.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else a second process ends because of the first one's lock file
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",  # any type: it warns if there is none
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def pinned() -> str:
    """The requirement with its hashes, as `make lock` pinned it."""
    match = re.search(r"^libtpu==\S+(?: *\\\n +--hash=\S+)+", REQUIREMENTS.read_text("utf-8"), re.M)
    if not match:
        raise ValueError(f"{REQUIREMENTS} pins no libtpu.")
    return match[0]


def version() -> str:
    return pinned().split()[0].removeprefix("libtpu==")


def library() -> Path:
    return FOLDER / version() / "libtpu" / "libtpu.so"


def missing() -> str:
    """Why programs cannot be compiled for TPUs on this machine; empty if they can."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return f"libtpu, which compiles for TPUs, exists for x86-64 Linux only, and this is {platform.platform()}."
    return "" if library().exists() else "libtpu, which compiles for TPUs, is not installed: make libtpu"


def compile_only(environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets the environment. Must be called before JAX is imported, as JAX reads it only once."""
    environment.update(ENVIRONMENT, TPU_LIBRARY_PATH=str(library()))
    set_flags(environment)  # as the pipeline does on a TPU


def devices(host: Host) -> list[Any]:
    """The devices of such a host, one for each chip. They can only be compiled for."""
    from jax.experimental import topologies

    shape = [int(side) for side in SHAPES[host.chips].split("x")] + [1]
    options: dict[str, Any] = {"chips_per_host_bounds": shape}
    if host.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # one device for both cores of a chip, as on a real v4
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
            if missing():  # another make may have installed it meanwhile
                fetch()


def fetch() -> None:
    say(f"Installing libtpu {version()} into {FOLDER} (213 MB)")
    with tempfile.TemporaryDirectory(dir=FOLDER) as work:
        requirement = Path(work) / "libtpu.txt"
        requirement.write_text(pinned() + "\n", "utf-8")
        command = [*installer(), "--quiet", "--no-deps", "--require-hashes", "--target", f"{work}/libtpu"]
        if subprocess.run([*command, "-r", str(requirement)]).returncode:
            raise UserError("libtpu could not be installed, for the reason above. To try again, run the same command.")
        target = FOLDER / version()
        shutil.rmtree(target, ignore_errors=True)
        os.replace(f"{work}/libtpu", target)  # whole or not at all


def installer() -> list[str]:
    """pip, or uv on a cluster's nodes, whose Python has no pip."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip", "install", "--no-input", "--disable-pip-version-check", "--no-compile"]
    return [str(HOME / "uv"), "pip", "install", "--python", sys.executable]


if __name__ == "__main__":
    run_command(install)
