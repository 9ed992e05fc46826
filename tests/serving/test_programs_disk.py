"""A disk of compiled programs that is full, cannot be written or holds torn files: a replica serves all the same, and
one warning in its log says so. The disks are real ones, mounted here, which takes root."""

import asyncio
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from app.aot import compile as aot_compile
from app.aot.compile import compiled
from app.api.messages import Images
from app.serving.replica import StableDiffusion
from tests.aot.test_program import FACTS, add
from tests.serving.test_replica import SETTINGS, SPEC, Pipeline, asking

pytestmark = pytest.mark.slow

NAMES = ["add rows 5", "add rows 6", "add rows 7"]
Started = Callable[[Path], tuple[dict[str, int], list[str]]]


class CompilingPipeline(Pipeline):
    """Real programs, kept where the replica was told; the pictures are the fake's."""

    def warmup(self) -> None:
        declared = [add(name, rows=int(name[-1])) for name in NAMES]
        (_, spec) = self.events[0]
        compiled(declared, folder=spec.programs, fingerprint=FACTS)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A file system of its own, of so many kilobytes."""
    mounted: list[Path] = []

    def mount(kilobytes: int) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k,mode=700", "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True) if os.geteuid() == 0 else None
        if done is None or done.returncode:
            pytest.skip(f"no disk can be mounted: {done.stderr.strip() if done else 'that takes root'}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def remount(folder: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=True)


@pytest.fixture
def started(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Started:
    """Starts a replica with this folder of programs and has it draw; how many it loaded and compiled, and warnings."""
    monkeypatch.setitem(sys.modules, "app.diffusion.pipeline", SimpleNamespace(Pipeline=CompilingPipeline))
    caplog.set_level(logging.INFO, aot_compile.logger.name)

    async def serve(folder: Path) -> Any:
        replica = StableDiffusion(replace(SPEC, programs=folder), **SETTINGS)
        try:
            await replica.check_health()
            return await replica.generate(asking())
        finally:
            await replica.shut_down()

    def started(folder: Path) -> tuple[dict[str, int], list[str]]:
        caplog.clear()
        assert isinstance(asyncio.run(serve(folder)), Images)
        records = [record for record in caplog.records if record.name == aot_compile.logger.name]
        began = [record.getMessage().split()[0] for record in records if record.levelno == logging.INFO]
        warnings = [record.getMessage() for record in records if record.levelno > logging.INFO]
        return {word: began.count(word) for word in began}, warnings

    return started


def test_a_replica_serves_with_a_full_disk_and_saves_once_there_is_room(
    disk: Callable[[int], Path], started: Started
) -> None:
    folder = disk(64)
    (folder / "full").write_bytes(b"x" * 60 * 1024)
    began, (warning,) = started(folder)
    assert began == {"compiled": 3}
    assert warning == (
        f"add rows 5 and 2 other compiled programs were not saved in {folder}, so the next start compiles again: "
        "OSError: [Errno 28] No space left on device"
    )
    assert [path.name for path in folder.iterdir()] == ["full"], "no half file stays"
    (folder / "full").unlink()
    assert started(folder) == ({"compiled": 3}, []) and started(folder) == ({"loaded": 3}, [])


def test_a_replica_serves_with_a_disk_that_cannot_be_written(disk: Callable[[int], Path], started: Started) -> None:
    folder = disk(1024)
    remount(folder, "ro")
    began, (warning,) = started(folder)
    assert began == {"compiled": 3} and re.search(r"were not saved in .* Read-only file system", warning)
    began, (warning,) = started(folder / "below")
    assert began == {"compiled": 3}
    assert re.match(r"compiled programs are neither loaded nor saved: .* Read-only file system", warning)
    remount(folder, "rw")
    assert started(folder) == ({"compiled": 3}, [])
    remount(folder, "ro")
    assert started(folder) == ({"loaded": 3}, []), "it is still read"


def test_a_replica_serves_with_torn_files_and_mends_them(tmp_path: Path, started: Started) -> None:
    folder = tmp_path / "programs"
    started(folder)
    for number, file in enumerate(sorted(folder.glob("*.xla"))):
        os.truncate(file, file.stat().st_size * number // 3)
    assert started(folder) == ({"compiled": 3}, [])
    assert started(folder) == ({"loaded": 3}, [])
