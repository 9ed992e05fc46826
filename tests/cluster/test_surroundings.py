"""A user's environment must not change a command: another Python's packages, options of Python and of pip."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import ROOT, install, processes
from cluster.local import head
from cluster.local import state as clusters
from tests.clusters import surroundings

STRAY = {name: "1" for name in processes.PYTHON_VARIABLES} | {"PYTHONPATH": "/another", "PYTHONHOME": "/another"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "cluster.local",
        "cluster.job",
        "cluster.logs",
        "loadtest run",
        "jobs.batch_generate",
        "benchmarks.batch",
        "capacity.plan",
    ],
)
def test_no_command_takes_another_pythons_packages(tmp_path: Path, command: str) -> None:
    command_line = [sys.executable, "-m", *command.split(), "--help"]
    environment = os.environ | surroundings(tmp_path)
    done = subprocess.run(command_line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith("usage: "), done.stderr


def test_our_own_code_stays_where_the_path_names_it(tmp_path: Path) -> None:
    """As on a node, whose commands run elsewhere; what they start inherits it, and nothing else."""
    program = "import os, sys; print(os.environ['PYTHONPATH']); import cluster.node_watcher, yaml; print(yaml.__file__)"
    (tmp_path / "probe").mkdir()
    (tmp_path / "probe" / "__init__.py").write_text("import cluster")
    (tmp_path / "probe" / "__main__.py").write_text(program)
    environment = surroundings(tmp_path)
    environment["PYTHONPATH"] += f":{ROOT}"
    done = subprocess.run(
        [sys.executable, "-m", "probe"], cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True
    )
    path, package = done.stdout.splitlines()
    assert path == str(ROOT) and not package.startswith(str(tmp_path))


def test_a_process_of_ray_keeps_its_path(tmp_path: Path) -> None:
    """Its packages of a runtime environment stand there."""
    program = "import cluster, os, sys; print(os.environ['PYTHONPATH'], sys.path.count(sys.argv[1]))"
    path = f"{ROOT}:{tmp_path}"
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd="/", env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == f"{path} 1\n"


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_a_recipe_of_the_makefile_sees_none_of_them() -> None:
    command = ["make", "--eval=probe: ; @env", "probe"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | STRAY, capture_output=True, text=True, check=True)
    seen = {line.partition("=")[0] for line in done.stdout.splitlines()}
    assert not seen & set(STRAY) and "PATH" in seen


def test_what_runs_in_the_cluster_sees_none_of_them_and_has_room_for_its_sockets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in (STRAY | surroundings(tmp_path)).items():
        monkeypatch.setenv(name, value)
    environment = head.environment(clusters.new(tmp_path / ".run", 8265))
    assert {name: environment[name] for name in STRAY if name in environment} == {"PYTHONPATH": str(ROOT)}
    assert "somebody-elses" not in "".join(environment.values())
    socket = f"{environment['TMPDIR']}/pymp-01234567/listener-01234567"  # as Ray's dashboard makes them
    assert len(socket) <= 103, "macOS has room for so much, Linux for four more"


def test_pip_is_told_how_to_reach_packages_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {"PIP_INDEX_URL": "https://mirror", "PIP_CERT": "/ca", "HTTPS_PROXY": "http://proxy", "PYTHON": "python3.12"}
    dropped = {"PIP_TARGET": "/t", "PIP_USER": "1", "PIP_DRY_RUN": "1", "PIP_NO_DEPS": "1", "PIP_REQUIREMENT": "/r"}
    for name, value in (kept | dropped | STRAY).items():
        monkeypatch.setenv(name, value)
    environment = install.environment()
    assert kept.items() <= environment.items() and not (dropped | STRAY).keys() & environment.keys()


def test_an_environment_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    """The folder cannot be written. Even root cannot make a folder below a file."""
    (tmp_path / "file").touch()
    command = [sys.executable, "cluster/install.py", "runtime", "--venv", str(tmp_path / "file" / ".venv")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith(f"{tmp_path}/file/.venv")
    assert "cannot be read or written: Not a directory. You are " in done.stderr and done.stderr.count("\n") == 1
