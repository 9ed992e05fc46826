"""jobs/unfinished.py: several runs in one folder, and what is left of those that were killed."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cluster import ROOT
from cluster.cli import UserError
from jobs.entry import report
from jobs.unfinished import PREFIX, STALE_S, drafts, write


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_a_run_that_ends_leaves_the_drafts_of_another_alone(tmp_path: Path) -> None:
    with drafts(tmp_path) as mine:
        with drafts(tmp_path) as other:
            assert mine != other
        write(tmp_path / "picture", b"whole", mine)
    assert (tmp_path / "picture").read_bytes() == b"whole" and names(tmp_path) == {"picture"}


def killed(out: Path) -> Path:
    """The drafts of a run that was killed while it wrote."""
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom jobs.unfinished import drafts\n"
        "with drafts(Path(sys.argv[1])) as place:\n    (place / 'half').touch()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(out)], cwd=ROOT, timeout=60).returncode == -9
    (place,) = out.glob(f"{PREFIX}*")
    assert (place / "half").exists()
    return place


def test_what_a_killed_run_left_goes_with_the_next_on_its_machine(tmp_path: Path) -> None:
    killed(tmp_path)
    with drafts(tmp_path):
        pass
    assert not names(tmp_path)


def test_a_place_of_another_machine_stays_for_a_day(tmp_path: Path) -> None:
    place = killed(tmp_path)
    other = place.rename(tmp_path / f"{PREFIX}elsewhere.x")
    with drafts(tmp_path):
        pass
    assert names(tmp_path) == {other.name}
    before = other.stat().st_mtime - STALE_S - 1
    os.utime(other, (before, before))
    with drafts(tmp_path):
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


def test_a_draft_that_cannot_be_put_in_place_is_not_left(tmp_path: Path) -> None:
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
