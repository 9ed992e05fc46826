"""What lies on the hosts' disks beforehand: packages as wheels, and the Python that uv would download.

Made once in .cache/rehearsal, through pip's own configuration. A host reaches no package index.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from cluster import ROOT
from cluster.cli import UserError

FOLDER = ROOT / ".cache" / "rehearsal"
REQUIREMENTS = ("gcp", "tpu")
WRITTEN = ("uv-cache", "pycache", "programs")  # folders that the hosts write to and share


def make(folder: Path = FOLDER) -> Path:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] != (3, 11):
        raise UserError(f"A rehearsal with hosts needs Python 3.11, as cluster.yaml does, and this is {version}.")
    python = folder / "python" / f"cpython-{version}-linux-x86_64-gnu"
    if not python.exists():
        ignored = shutil.ignore_patterns("site-packages", "test", "__pycache__")
        partial = folder / "python.partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(sys.base_prefix, partial, symlinks=True, ignore=ignored)
        (partial / f"lib/python{version.rpartition('.')[0]}/site-packages").mkdir()
        python.parent.mkdir(parents=True, exist_ok=True)
        partial.rename(python)
    wheels, files = folder / "wheels", [ROOT / f"requirements/{name}.txt" for name in REQUIREMENTS]
    pinned = "".join(file.read_text() for file in files)
    stamp = wheels / "requirements"
    if not stamp.exists() or stamp.read_text() != pinned:
        wheels.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        for arguments in ([*(part for file in files for part in ("-r", str(file)))], [uv_requirement()]):
            hashes = ["--require-hashes"] if "-r" in arguments else []
            done = subprocess.run([*command, *hashes, *arguments, "-d", str(wheels)], capture_output=True, text=True)
            if done.returncode:
                raise UserError(f"The hosts' packages could not be downloaded: {done.stderr.strip().splitlines()[-1]}")
        stamp.write_text(pinned)
    for name in WRITTEN:
        (folder / name).mkdir(exist_ok=True)
    return folder


def uv_requirement() -> str:
    """The uv that cluster.yaml installs."""
    name = next(word for word in (ROOT / "cluster.yaml").read_text().split("/") if word.startswith("uv-"))
    return f"uv=={name.split('-')[1]}"
