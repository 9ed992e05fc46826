"""cluster/install.py: when .venv is reused or recreated, and what the command prints. pip is not run."""

import importlib.util
import shutil
import subprocess
import sys
import venv as stdlib_venv
from pathlib import Path

import pytest

from cluster import install


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """Files as `python -m venv` makes them, without pip, which takes seconds."""
    folder = tmp_path.resolve() / ".venv"
    stdlib_venv.create(folder, with_pip=False)
    (folder / "bin" / "pip").touch()
    return folder


@pytest.fixture
def pips(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The levels that pip was called for."""
    levels: list[str] = []
    monkeypatch.setattr(install, "run_pip", lambda venv, level: levels.append(level))
    return levels


def change_settings(venv: Path, **changes: str) -> None:
    settings = install.settings(venv) | changes
    (venv / "pyvenv.cfg").write_text("\n".join(f"{key} = {value}" for key, value in settings.items()))


def test_a_level_is_installed_once(venv: Path, pips: list[str]) -> None:
    for _ in range(3):
        install.install(venv, "runtime", this_python=False)
    assert pips == ["runtime"]


def test_dev_brings_runtime_but_not_the_other_way_round(venv: Path, pips: list[str]) -> None:
    for level in ("dev", "runtime", "parity", "dev"):
        install.install(venv, level, this_python=False)
    assert pips == ["dev", "parity"]
    assert not install.current(venv, "tpu")


def test_changed_requirements_are_installed(
    venv: Path, pips: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for level in install.LEVELS:
        (tmp_path / f"{level}.txt").write_text("a==1")
    monkeypatch.setattr(install, "REQUIREMENTS", tmp_path)
    install.install(venv, "dev", this_python=False)
    (tmp_path / "dev.txt").write_text("a==2")
    install.install(venv, "dev", this_python=False)
    assert pips == ["dev", "dev"]


def test_an_environment_that_somebody_made_by_hand_is_kept(venv: Path, pips: list[str]) -> None:
    (venv / "keep").touch()
    install.install(venv, "runtime", this_python=True)
    assert (venv / "keep").exists() and pips == ["runtime"]


def test_an_interrupted_installation_starts_anew(venv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(venv: Path, level: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(install, "run_pip", interrupted)
    with pytest.raises(KeyboardInterrupt):
        install.install(venv, "runtime", this_python=False)
    assert not install.current(venv, "runtime")
    assert install.why_recreate(venv, this_python=False) == "its last installation was interrupted"


def test_a_moved_checkout_is_noticed(venv: Path) -> None:
    moved = venv.parent / "elsewhere" / ".venv"
    moved.parent.mkdir()
    venv.rename(moved)
    assert install.why_recreate(moved, this_python=False) == "it was made in another folder"


def test_a_link_to_the_checkout_is_not_a_move(venv: Path) -> None:
    (venv.parent / "link").symlink_to(venv.parent)
    assert install.why_recreate(venv.parent / "link" / ".venv", this_python=False) == ""


def test_a_python_that_was_removed_is_noticed(venv: Path) -> None:
    for name in ("python", "python3", f"python3.{sys.version_info[1]}"):
        (venv / "bin" / name).unlink()
        (venv / "bin" / name).symlink_to("/nowhere/python3")
    assert install.why_recreate(venv, this_python=False) == "the Python that made it is gone"


def test_another_python_matters_only_if_it_is_too_old_or_asked_for(venv: Path) -> None:
    change_settings(venv, version="3.10.4")
    assert install.why_recreate(venv, this_python=False) == "Python 3.10 made it"
    other = (3, 11 if sys.version_info[1] > 11 else 12)
    change_settings(venv, version=f"3.{other[1]}.9")
    assert install.why_recreate(venv, this_python=False) == ""
    assert install.why_recreate(venv, this_python=True).startswith(f"Python 3.{other[1]} made it, and")


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(install.InstallError, match="is not a virtual environment"):
        install.install(tmp_path, "runtime", this_python=False)
    assert (tmp_path / "thesis.txt").exists()


def test_an_old_python_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: name if name == "python3.12" else None)
    sentence = (
        "Python 3.11 to Python 3.14 is needed, and this is Python 3.9. Name another one: make PYTHON=python3.12 ..."
    )
    assert install.complaint((3, 9)) == sentence
    assert install.complaint((3, 15)).startswith("Python 3.11 to Python 3.14 is needed")


def test_debians_missing_half_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ensurepip" else object())
    assert install.complaint((3, 11)) == (
        "This Python has no module ensurepip. On Debian or Ubuntu: apt install python3.11-venv"
    )
    monkeypatch.undo()
    assert install.complaint((3, 11)) == ""


def test_a_failing_pip_is_told_in_one_line(venv: Path, tmp_path: Path) -> None:
    (venv / "bin" / "python").unlink()
    (venv / "bin" / "python").write_text(
        "#!/bin/sh\necho 'Collecting x==1'; echo 'ERROR: No matching distribution.'; exit 1\n"
    )
    (venv / "bin" / "python").chmod(0o755)
    with pytest.raises(install.InstallError) as stop:
        install.run_pip(venv, "runtime")
    assert str(stop.value) == (
        "The installation failed. ERROR: No matching distribution. To go on, run the same make again."
    )


def test_it_needs_nothing_that_is_not_in_the_standard_library() -> None:
    program = "import runpy; runpy.run_path('cluster/install.py', run_name='cluster.install')"
    subprocess.run([sys.executable, "-I", "-S", "-c", program], check=True)
