"""cluster/ownership.py, cluster/auth_token.py, and the verbs when files belong to another user."""

import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from cluster import ROOT, auth_token, ownership, processes
from cluster.cli import UserError
from cluster.local import state as clusters
from cluster.local import verbs
from cluster.local.state import Cluster
from tests import other_user
from tests.clusters import refuses


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_what_is_written_is_for_its_owner_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        ownership.make_folder(tmp_path / "a" / "b", "RUN_DIR=")
        ownership.write(tmp_path / "a" / "file", "text")
    finally:
        os.umask(before)
    assert [mode(tmp_path / name) for name in ("a", "a/b", "a/file")] == [0o700, 0o700, 0o600]
    assert ownership.read(tmp_path / "a" / "file") == "text"


def test_a_folder_in_which_others_may_write_no_longer_lets_them(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    ownership.make_folder(tmp_path, "RUN_DIR=")
    assert mode(tmp_path) == 0o755


def test_no_link_is_followed(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("precious")
    link.symlink_to(target)
    with pytest.raises(UserError, match="is a link, which is not followed"):
        ownership.read(link)
    (tmp_path / "file.draft").symlink_to(target)
    ownership.write(tmp_path / "file", "text")
    assert target.read_text() == "precious" and (tmp_path / "file").read_text() == "text"
    (tmp_path / "lock").symlink_to(target)
    with pytest.raises(OSError), verbs.locked(tmp_path):
        pass
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "to-folder").symlink_to(folder)
    assert ownership.is_own_folder(folder) and not ownership.is_own_folder(tmp_path / "to-folder")
    assert not ownership.is_own_folder(target) and not ownership.is_own_folder(tmp_path / "nothing")


@pytest.mark.parametrize("kind", [os.mkdir, os.mkfifo])
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, kind: Callable[[Path], None]) -> None:
    kind(tmp_path / "file")
    with pytest.raises(UserError, match="file is no file"):
        ownership.read(tmp_path / "file")


def test_each_token_differs_and_is_for_its_owner_alone(tmp_path: Path) -> None:
    tokens = set()
    for _ in range(3):
        auth_token.create(tmp_path / "token")
        tokens.add(auth_token.read_local(tmp_path / "token"))
        assert mode(tmp_path / "token") == 0o600
    assert len(tokens) == 3 and all(len(token) == 64 for token in tokens)


@pytest.mark.parametrize(
    ("content", "rights", "reason"),
    [
        (b"", 0o600, "holds no token"),
        (b"two words", 0o600, "holds no token"),
        (b"\xff\xfe", 0o600, "holds no token"),
        (b"secret", 0o640, "can be read by others on this machine, who may have the token now"),
    ],
)
def test_a_token_that_cannot_be_trusted_is_told_without_quoting_it(
    tmp_path: Path, content: bytes, rights: int, reason: str
) -> None:
    file = tmp_path / "token"
    with pytest.raises(UserError, match="token is missing, the token that the local cluster asks for"):
        auth_token.read_local(file)
    file.write_bytes(content)
    file.chmod(rights)
    with pytest.raises(UserError) as stop:
        auth_token.read_local(file)
    assert reason in str(stop.value) and "make down up" in str(stop.value) and "secret" not in str(stop.value)


# Root in what another user could write


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder of the user nobody, which other users can reach."""
    with tempfile.TemporaryDirectory(prefix="shared-", dir="/tmp") as folder:
        os.chown(folder, other_user.NOBODY, other_user.NOBODY)
        os.chmod(folder, 0o777)
        yield Path(folder)


@pytest.fixture
def victim() -> Iterator[psutil.Process]:
    with subprocess.Popen(
        [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"], stdout=-1
    ) as process:
        assert process.stdout
        process.stdout.readline()
        yield psutil.Process(process.pid)
        process.kill()


def planted(run_dir: Path, temp_dir: Path, recorded: processes.Recorded) -> Cluster:
    """Writes a state file as an attacker would, who wants root to end a process and remove a folder."""
    cluster = Cluster(
        run_dir, f"{run_dir}#01234567", temp_dir, 8265, {"port": 1}, "cluster.yaml", processes=(recorded,)
    )
    run_dir.mkdir(exist_ok=True)
    cluster.save()
    return cluster


@other_user.as_root
def test_root_does_not_believe_what_another_user_wrote(shared: Path, victim: psutil.Process, tmp_path: Path) -> None:
    precious = tmp_path / "imagine-0123abcd"
    precious.mkdir()
    run_dir = shared / "run"
    planted(run_dir, precious, processes.record(victim))
    os.chown(run_dir / "cluster.json", other_user.NOBODY, other_user.NOBODY)
    for verb in (lambda: verbs.down(run_dir), lambda: clusters.running(run_dir), lambda: verbs.up(run_dir, 18264)):
        with pytest.raises(UserError, match="cluster.json belongs to nobody, and you are root: it is not trusted"):
            verb()
    os.chown(run_dir, other_user.NOBODY, other_user.NOBODY)
    with pytest.raises(
        UserError, match=r"run belongs to nobody, and you are root: .* Name a folder of your own: RUN_DIR="
    ):
        verbs.down(run_dir)
    assert precious.exists() and not processes.dead(victim)


@other_user.as_root
def test_root_leaves_alone_what_is_another_users_though_our_own_file_names_it(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shared / "imagine-0123abcd"
    folder.mkdir()
    os.chown(folder, other_user.NOBODY, other_user.NOBODY)
    program = f"import sys, time{other_user.BECOME}print(flush=True); time.sleep(60)"
    mark = {processes.MARK: f"{tmp_path}/run#01234567"}
    with subprocess.Popen([sys.executable, "-c", program], env=os.environ | mark, stdout=-1) as process:
        assert process.stdout
        process.stdout.readline()
        other = psutil.Process(process.pid)
        planted(tmp_path / "run", folder, processes.record(other))
        verbs.down(tmp_path / "run")
        assert folder.exists() and not processes.dead(other)
        process.kill()
    assert f"{folder} is not our own folder, and is left alone.\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["imagine-0123abcd", "imagine-", "imagine-0123abcd-old", "thesis"])
def test_down_removes_no_folder_but_one_that_up_makes(tmp_path: Path, name: str) -> None:
    """A link with the right name is not followed."""
    precious, run_dir = tmp_path / "precious", tmp_path / "run"
    precious.mkdir()
    (precious / "file").touch()
    folder = tmp_path / name
    folder.symlink_to(precious) if name == "imagine-0123abcd" else folder.mkdir()
    planted(run_dir, folder, processes.Recorded(2**22 + 1, 0.0, "gone"))
    verbs.down(run_dir)
    assert (precious / "file").exists() and os.path.lexists(folder)
    assert not (run_dir / "cluster.json").exists()


# A checkout that cannot be written, or is somebody else's


@pytest.fixture
def unwritable(tmp_path: Path) -> Iterator[Path]:
    """Runs a command as the user nobody if we are root, else as ourselves."""
    with tempfile.TemporaryDirectory(prefix="checkout-", dir="/tmp") as folder:
        os.chmod(folder, 0o555)
        yield Path(folder)
        os.chmod(folder, 0o755)


def run_as_another(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    if os.geteuid() == 0:
        return other_user.run(other_user.VERB, module, *arguments)
    return subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_a_checkout_that_cannot_be_written_is_one_sentence(unwritable: Path) -> None:
    for verb in ("up", "down"):
        sentence = refuses(run_as_another("cluster.local.verbs", verb, "--run-dir", str(unwritable / ".run")))
        assert (
            sentence.startswith(f"{unwritable}/.run cannot be made: Permission denied. You are ")
            and "\n" not in sentence
        )
        assert f", and {unwritable} belongs to " in sentence and sentence.endswith(
            "Name a folder of your own: RUN_DIR="
        )
    for arguments in (("deploy", "status"), ("job", "list"), ("logs",), ("local.verbs", "address")):
        module, *rest = arguments
        sentence = refuses(run_as_another(f"cluster.{module}", *rest, "--run-dir", str(unwritable / ".run")))
        assert sentence == "No cluster is up in this checkout. Start one with: make up"


def test_a_command_that_may_not_write_says_where_and_no_more(unwritable: Path) -> None:
    sentence = refuses(run_as_another("cluster.api_key", "--name", "alice", "--file", str(unwritable / "keys.yaml")))
    assert f"{unwritable}/" in sentence and "Permission denied" in sentence and "\n" not in sentence


@other_user.as_root
def test_a_cluster_that_is_somebody_elses_is_one_sentence(shared: Path) -> None:
    run_dir = shared / "run"
    ownership.make_folder(run_dir, "RUN_DIR=")
    planted(run_dir, shared / "imagine-0123abcd", processes.Recorded(2**22 + 1, 0.0, "gone"))
    sentence = refuses(run_as_another("cluster.local.verbs", "down", "--run-dir", str(run_dir)))
    assert sentence.startswith(f"{run_dir} belongs to root, and you are nobody")
    sentence = refuses(run_as_another("cluster.deploy", "status", "--run-dir", str(run_dir)))
    assert sentence == f"{run_dir}/cluster.json cannot be read: Permission denied. You are nobody."
