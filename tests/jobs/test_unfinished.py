"""jobs/unfinished.py with several runs in one folder, some of which are killed."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cluster import ROOT
from cluster.cli import UserError
from jobs.entry import report
from jobs.unfinished import PREFIX, STALE_S, unfinished_folder, write


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_a_run_that_ends_keeps_the_unfinished_files_of_another(tmp_path: Path) -> None:
    with unfinished_folder(tmp_path) as mine:
        with unfinished_folder(tmp_path) as other:
            assert mine != other
        write(tmp_path / "picture", b"whole", mine)
    assert (tmp_path / "picture").read_bytes() == b"whole" and names(tmp_path) == {"picture"}


def killed(out: Path) -> Path:
    """The folder of a run that was killed while it wrote."""
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom jobs.unfinished import unfinished_folder\n"
        "with unfinished_folder(Path(sys.argv[1])) as folder:\n    (folder / 'half').touch()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(out)], cwd=ROOT, timeout=120).returncode == -9
    (folder,) = out.glob(f"{PREFIX}*")
    assert (folder / "half").exists()
    return folder


def test_the_next_run_on_a_machine_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    killed(tmp_path)
    with unfinished_folder(tmp_path):
        pass
    assert not names(tmp_path)


def test_a_folder_of_another_machine_stays_for_a_day(tmp_path: Path) -> None:
    folder = killed(tmp_path)
    other = folder.rename(tmp_path / f"{PREFIX}elsewhere.x")
    with unfinished_folder(tmp_path):
        pass
    assert names(tmp_path) == {other.name}
    before = other.stat().st_mtime - STALE_S - 1
    os.utime(other, (before, before))
    with unfinished_folder(tmp_path):
        pass
    assert not names(tmp_path)


def test_files_that_several_write_at_once_are_whole(tmp_path: Path) -> None:
    file = tmp_path / "manifest.jsonl"
    contents = [bytes([letter]) * 500_000 for letter in b"abcd"]

    def work(content: bytes) -> None:
        for _ in range(20):
            write(file, content)

    threads = [threading.Thread(target=work, args=[content]) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert file.read_bytes() in contents and names(tmp_path) == {file.name}


def test_a_file_that_cannot_be_renamed_is_not_left(tmp_path: Path) -> None:
    (tmp_path / "picture").mkdir()
    with pytest.raises(OSError):
        write(tmp_path / "picture", b"x")
    assert names(tmp_path) == {"picture"}


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    def job() -> str:
        (tmp_path / "file" / "images").mkdir()
        return ""

    with pytest.raises(UserError, match=f"^{tmp_path}/file/images: Not a directory\\.$"):
        report(job)
