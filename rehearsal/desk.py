"""The machine of the user who runs `make up`, for a rehearsal without hosts: a home, programs and variables.

`ssh` and `rsync` succeed without a host. They note their command lines, and keep what would lie on the head.
"""

import os
import shlex
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import yaml

from cluster import ROOT

PROJECT = "rehearsal-project"
PROGRAM = """#!/bin/sh
# Stands for a host that takes every command. Keeps small files that are copied to a home.
echo "$(basename "$0") $*" >> {log}
for source in "$@"; do
    case "$source" in *@*:*) [ -f "$previous" ] && cp "$previous" {head}/"$(basename "$source")" ;; esac
    previous=$source
done
exit 0
"""


class Desk:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.head, self.log = folder / "head", folder / "commands"
        for name in ("home/.ray", "bin", "head", "tmp"):
            (folder / name).mkdir(parents=True)
        token = folder / "home/.ray/auth_token"
        token.write_text("5ec2e7" * 10)
        token.chmod(0o600)
        self.log.touch()
        for name in ("ssh", "rsync"):
            program = folder / "bin" / name
            program.write_text(PROGRAM.format(log=shlex.quote(str(self.log)), head=shlex.quote(str(self.head))))
            program.chmod(0o755)

    def cluster_file(self, source: Path, mounted: Path = ROOT) -> Path:
        """A copy of a cluster file with the project filled in, which mounts folders of `mounted`."""
        text = source.read_text().replace("project_id: null", f"project_id: {PROJECT}")
        mounts = yaml.safe_load(text)["file_mounts"]
        for target, origin in mounts.items():
            if not origin.startswith("~"):
                text = text.replace(f"\n  {target}: {origin}\n", f"\n  {target}: {mounted / origin}\n")
        file = self.folder / source.name
        file.write_text(text)
        return file

    def commands(self) -> list[str]:
        return self.log.read_text().splitlines()

    @contextmanager
    def environment(self, google: Mapping[str, str]) -> Iterator[None]:
        """Puts this process at the desk."""
        before, folder = dict(os.environ), tempfile.tempdir
        kept = {name: value for name, value in before.items() if not name.startswith(("RAY_", "GOOGLE_"))}
        ours = {
            "HOME": str(self.folder / "home"),
            "PATH": f"{self.folder / 'bin'}{os.pathsep}{before.get('PATH', os.defpath)}",
            "TMPDIR": str(self.folder / "tmp"),
            "GOOGLE_CLOUD_PROJECT": PROJECT,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_UP_enable_autoscaler_v2": "1",
        }
        tempfile.tempdir = ours["TMPDIR"]
        os.environ.clear()
        os.environ.update({**kept, **ours, **google})
        try:
            yield
        finally:
            tempfile.tempdir = folder
            os.environ.clear()
            os.environ.update(before)
