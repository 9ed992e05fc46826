"""`make api-key`: what it prints, what it writes, and what it leaves alone."""

import fcntl
import os
import re
import stat
import subprocess
from functools import partial
from pathlib import Path

import pytest

from app.api.api_keys import ApiKeys, parse
from cluster import ROOT, api_key
from cluster.cli import UserError, run_command
from tests.clusters import in_this_process


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "api_keys.yaml"


def make(file: Path, name: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = ["api_key", "--name", name, "--file", str(file), *options]
    return in_this_process(partial(run_command, api_key.main), command)


def made(file: Path, name: str, *options: str) -> str:
    done = make(file, name, *options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(file: Path, name: str, *options: str) -> str:
    done = make(file, name, *options)
    assert done.returncode == 1 and done.stdout == "" and len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


def test_the_key_is_told_once_and_only_its_hash_is_kept(file: Path) -> None:
    done = make(file, "alice")
    assert re.fullmatch(r"imagine-[\w-]{43}\n", done.stdout), "stdout is the key alone"
    key = done.stdout.strip()
    assert key not in done.stderr and "alice" in done.stderr
    assert key not in file.read_text() and key.removeprefix("imagine-") not in file.read_text()
    key_in_file = ApiKeys(file).find(key.encode())
    assert key_in_file and key_in_file.entry.name == "alice"
    assert (key_in_file.entry.requests_per_minute, key_in_file.entry.concurrent_requests) == (None, None)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and [*file.parent.iterdir()] == [file]


def test_limits_are_written_and_what_stood_in_the_file_stays(file: Path) -> None:
    before = f"# Ours. Ask Carol before you delete one.\n- name: carol\n  sha256: {'c' * 64}\n"
    file.write_text(f"{before}...\n# All of ours stand above.")
    file.chmod(0o640)
    key = made(file, "yes", "--rpm", "30", "--concurrent", "2").strip()  # a name that YAML would take for a truth
    text = file.read_text()
    assert text.startswith(before) and text.endswith("\n...\n# All of ours stand above.")
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    key_in_file = ApiKeys(file).find(key.encode())
    assert key_in_file and key_in_file.entry.name == "yes"
    assert (key_in_file.entry.requests_per_minute, key_in_file.entry.concurrent_requests) == (30, 2)
    assert [entry.name for entry in parse(file.read_bytes(), "")] == ["carol", "yes"]


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        (
            "",
            [],
            "NAME must be 1 to 64 letters, digits, dots, dashes and underscores, a letter or digit first, got ''.",
        ),
        ("al ice", [], "NAME must be 1 to 64"),
        ("alice", ["--rpm", "0"], "RPM must be an integer of at least 1, got 0."),
        ("alice", ["--rpm", "many"], "RPM must be an integer of at least 1, got 'many'."),
        ("alice", ["--concurrent", "-1"], "CONCURRENT must be an integer of at least 1, got '-1'."),
        ("carol", [], "has a key named carol. Take another name, or delete that entry first."),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(file: Path, name: str, options: list[str], sentence: str) -> None:
    file.write_text(f"- name: carol\n  sha256: {'c' * 64}\n...\n")
    before = file.read_bytes()
    assert sentence in refused(file, name, *options)
    assert file.read_bytes() == before and [*file.parent.iterdir()] == [file]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (f"[{{name: carol, sha256: {'c' * 64}}}]\n", "must be a list with one `- name:` below the other"),
        (f"  - name: carol\n    sha256: {'c' * 64}\n...\n", "must be a list with one `- name:` below the other"),
        ("", "is empty. A file without keys must say []"),
        (f"- name: carol\n  sha256: {'c' * 64}\n", "must end with a line ... below the last key"),
        ("name: carol", "must be a list of keys"),
        ("- name: carol\n", "entry 1 (carol): sha256 is missing"),
    ],
)
def test_a_file_that_nothing_can_be_added_to_is_left_as_it_is(file: Path, content: str, sentence: str) -> None:
    file.write_text(content)
    assert sentence in refused(file, "alice")
    assert file.read_text() == content and [*file.parent.iterdir()] == [file]


@pytest.mark.parametrize("text", ["[]", "# None yet.\n[]\n# Below.\n", "---\n[ ]\n...\n"])
def test_the_first_key_takes_the_place_of_the_empty_list(file: Path, text: str) -> None:
    file.write_text(text)
    made(file, "alice")
    made(file, "bob")
    assert [entry.name for entry in parse(file.read_bytes(), "")] == ["alice", "bob"]
    assert [line for line in file.read_text().splitlines() if "#" in line] == [
        line for line in text.splitlines() if "#" in line
    ]


def test_a_pipe_is_refused_at_once(file: Path) -> None:
    os.mkfifo(file)
    assert "must be a regular file." in refused(file, "alice")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file away")
def test_the_file_keeps_its_owner(file: Path) -> None:
    made(file, "alice")
    os.chown(file, 65534, 65533)
    made(file, "bob")
    status = file.stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (65534, 65533, 0o600)


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    assert "cannot be written: No such file or directory." in refused(tmp_path / "nowhere/keys.yaml", "alice")


def test_a_write_that_fails_leaves_the_old_file_and_no_draft(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api_key.add(api_key.entry_for("a", "alice", "", ""), file)
    before = file.read_bytes()

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        api_key.add(api_key.entry_for("b", "bob", "", ""), file)
    assert file.read_bytes() == before and [*file.parent.iterdir()] == [file]


def test_a_link_stays_a_link(file: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    file.symlink_to("elsewhere/keys.yaml")
    made(file, "alice")
    assert file.is_symlink() and "alice" in (tmp_path / "elsewhere/keys.yaml").read_text()


def test_between_reading_and_replacing_the_file_nobody_else_may(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replaced = []

    def replace(target: Path, content: bytes) -> None:
        descriptor = os.open(target.parent, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)
        replaced.append(target)

    monkeypatch.setattr(api_key, "replace", replace)
    for name in ("alice", "bob"):  # and the first leaves no lock behind
        api_key.add(api_key.entry_for(name, name, "", ""), file)
    assert replaced == [file, file]


def test_the_default_file_is_in_no_commit() -> None:
    assert "api_keys.yaml" in (ROOT / ".gitignore").read_text().splitlines()
