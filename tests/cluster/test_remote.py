"""The verbs of a remote cluster without a cluster: what they print and run.

tests/cluster/test_remote_ssh.py uses a real Ray over SSH. Google Cloud is not contacted.
"""

import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from ray.scripts.scripts import cli

from cluster import ROOT, connection, deploy, processes
from cluster.cli import UserError, run_command
from cluster.dashboard import Dashboard
from cluster.local.state import new
from cluster.remote import preflight, verbs
from cluster.remote.tunnel import tunnel
from cluster.terminal import make_command
from tests.clusters import in_this_process

TOKEN = "5ec2e7" * 10
BASE = (ROOT / "cluster.yaml").read_text()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home folder of a user who has a token."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    write(tmp_path / ".ray/auth_token", TOKEN)
    return tmp_path


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """cluster.yaml with a project."""
    return write(tmp_path / "cluster.yaml", BASE.replace("project_id: null", "project_id: my-project"))


def write(file: Path, text: str) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    file.chmod(0o600)
    return file


@pytest.fixture
def complete(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has all requirements."""
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(preflight, "find_spec", lambda name: True)
    monkeypatch.setattr("google.auth.default", lambda: (None, "mine"))


# Before anything is started


@pytest.mark.usefixtures("complete")
def test_nothing_is_said_where_nothing_is_missing(ours: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preflight.ready_to_start(ours)
    preflight.ready(ours)
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("complete")
def test_a_project_that_is_not_set_is_told_with_its_line(home: Path) -> None:
    path = write(home / "cluster.yaml", BASE)
    line = 1 + next(i for i, text in enumerate(BASE.splitlines()) if "project_id: null" in text)
    sentence = f"{path}:{line}: provider.project_id must be the id of your Google Cloud project, and is not set."
    for check in (preflight.ready, preflight.ready_to_start):
        assert missing(check, path) == [sentence]


def missing(check: Any, path: Path) -> list[str]:
    with pytest.raises(UserError) as stop:
        check(path)
    return str(stop.value).splitlines()


@pytest.mark.usefixtures("complete")
@pytest.mark.parametrize(
    ("program", "sentence"),
    [
        ("ssh", "ssh is not installed, and Ray's launcher needs it: sudo apt-get install openssh-client"),
        ("rsync", "rsync is not installed, and Ray's launcher needs it: sudo apt-get install rsync"),
    ],
)
def test_a_program_that_is_missing_is_told_with_its_package(
    ours: Path, monkeypatch: pytest.MonkeyPatch, program: str, sentence: str
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None if name == program else name)
    assert missing(preflight.ready, ours) == [sentence]


@pytest.mark.usefixtures("complete")
def test_googles_client_and_credentials_are_asked_for(ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from google.auth.exceptions import DefaultCredentialsError

    def none() -> None:
        raise DefaultCredentialsError("Your default credentials were not found. See elsewhere.")

    monkeypatch.setattr("google.auth.default", none)
    assert missing(preflight.ready, ours) == [
        "Google's credentials are missing (Your default credentials were not found): "
        "gcloud auth application-default login"
    ]
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    assert missing(preflight.ready, ours) == ["Google's client for Python is not installed: make gcp"]


@pytest.mark.slow
@pytest.mark.usefixtures("complete")
def test_the_token_must_be_there_and_be_the_users_alone(ours: Path, home: Path) -> None:
    file = home / ".ray/auth_token"
    file.chmod(0o644)
    assert missing(preflight.ready_to_start, ours) == [
        f"{file} can be read by others on this machine: chmod 600 {file}"
    ]
    file.write_text("\n")
    assert missing(preflight.ready_to_start, ours)[0].startswith(f"{file} is empty.")
    file.unlink()
    (sentence,) = missing(preflight.ready_to_start, ours)
    assert sentence.startswith(f"{file} is missing, the token that the cluster will ask its callers for. To make one: ")
    command = sentence.partition("To make one: ")[2].replace(
        ".venv/bin/ray", f"{sys.executable} -m ray.scripts.scripts"
    )
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "") and missing_none(ours)
    assert file.read_text().strip() not in done.stderr and file.stat().st_mode & 0o777 == 0o600


def missing_none(path: Path) -> bool:
    preflight.ready_to_start(path)
    return True


def test_all_that_is_missing_is_told_at_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    (home / ".ray/auth_token").unlink()
    assert len(missing(preflight.ready_to_start, write(home / "cluster.yaml", BASE))) == 5


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "There is no cluster file "),
        ("a: [", " is not valid YAML: "),
        ("a: 1", " must have a cluster_name and a provider with a type"),
        ("- a", " must have a cluster_name and a provider with a type"),
    ],
)
def test_a_file_that_is_none_is_one_sentence(home: Path, text: str | None, sentence: str) -> None:
    path = home / "x.yaml" if text is None else write(home / "x.yaml", text)
    for verb in ("up", "down", "monitor", "attach", "dashboard", "address"):
        command = ["cluster.remote", verb, "--cluster", str(path), "--run-dir", str(home / "run")]
        done = in_this_process(partial(run_command, verbs.main), command)
        assert done.returncode == 1 and done.stdout == "" and sentence in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_mistake_in_the_file_stops_up_before_anything_begins(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(home / "cluster.yaml", BASE.replace("acceleratorType: v5litepod-4", "acceleratorType: v5e-4"))
    with pytest.raises(UserError, match=r"error: .*Did you mean v5litepod-4\?\nNothing was started\."):
        verbs.up(path, home / "run")
    assert capsys.readouterr().out == ""
    assert not (home / "run").exists()


@pytest.mark.slow
def test_a_mistake_in_the_config_stops_deploy_and_advice_does_not(home: Path, ours: Path) -> None:
    config = (ROOT / "serve_config.yaml").read_text()
    advised = write(home / "advised.yaml", config.replace("proxy_location: HeadOnly", "proxy_location: EveryNode"))
    run_dir = home / "run"
    deploy.lint_first(advised, str(ours), run_dir)
    deploy.lint_first(advised, "local", run_dir)
    wrong = write(home / "wrong.yaml", config.replace("TPU: 4", "TPU: 8"))
    for cluster in (str(ours), "local"):
        with pytest.raises(UserError, match=r"wrong.yaml:\d+: error: .*\nNothing was started\."):
            deploy.lint_first(wrong, cluster, run_dir)
    run_dir.mkdir()
    eight = BASE.replace("acceleratorType: v5litepod-4", "acceleratorType: v5litepod-8").replace("TPU: 4", "TPU: 8")
    new(run_dir, 8265, write(home / "eight.yaml", eight)).save()  # a local cluster with its node types is up
    deploy.lint_first(wrong, "local", run_dir)


# The command lines and what they hold


@pytest.mark.parametrize(
    "arguments",
    [
        ("up", "--yes", "--no-config-cache", "x.yaml"),
        ("up", "--yes", "--no-restart", "--no-config-cache", "x.yaml"),
        ("down", "--yes", "x.yaml"),
        ("attach", "x.yaml"),
        ("exec", "x.yaml", "ray status"),
    ],
)
def test_rays_own_command_line_takes_what_it_is_given(arguments: tuple[str, ...]) -> None:
    command = verbs.ray(*arguments)
    assert command[: len(verbs.RAY)] == list(verbs.RAY)
    verb, *rest = command[len(verbs.RAY) :]
    assert cli.commands[verb].make_context(verb, rest).params["cluster_config_file"] == "x.yaml"


def test_ray_runs_in_token_mode_and_without_somebody_elses_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    os.environ.update({"RAY_ADDRESS": "elsewhere", "RAY_AUTH_TOKEN": "other", "RAY_AUTH_TOKEN_PATH": "/other"})
    connection.isolate("cluster.yaml", Path("/run"))
    assert {name for name in os.environ if name.startswith("RAY_")} == {"RAY_AUTH_MODE", "RAY_USAGE_STATS_ENABLED"}
    assert os.environ["RAY_AUTH_MODE"] == "token"
    connection.isolate("local", Path("/run"))
    assert (os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN_PATH"]) == ("token", "/run/token")
    assert "RAY_AUTH_TOKEN" not in os.environ


def test_the_token_is_in_the_request_and_in_no_text(home: Path) -> None:
    dashboard = Dashboard("http://127.0.0.1:1", "cluster.yaml", connection.authorization())
    assert dashboard.headers == {"Authorization": f"Bearer {TOKEN}"}
    assert TOKEN not in repr(dashboard)
    with pytest.raises(UserError) as stop:
        dashboard.details()
    assert str(stop.value).startswith("The dashboard of cluster.yaml's cluster does not answer: ")
    assert TOKEN not in str(stop.value)


@pytest.mark.parametrize("text", ["", " \n", f"{TOKEN} {TOKEN}", f"{TOKEN}\nmore", "\xff"])
def test_a_file_that_holds_no_token_is_told_without_quoting_it(home: Path, text: str) -> None:
    (home / ".ray/auth_token").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"auth_token holds no token.") as stop:
        connection.authorization()
    assert TOKEN not in str(stop.value)


def test_the_dashboards_port_is_the_one_that_the_head_starts_with() -> None:
    assert connection.dashboard_port(yaml.safe_load(BASE)) == 8265
    assert (
        connection.dashboard_port({"head_start_ray_commands": ["ray stop", "ray start --dashboard-port 9000"]}) == 9000
    )
    assert connection.dashboard_port({}) == 8265


def test_each_hint_names_the_cluster_that_was_meant() -> None:
    assert (
        make_command("deploy", "local") == "make deploy"
        and make_command("deploy", "x.yaml") == "make deploy CLUSTER=x.yaml"
    )
    assert deploy.reload("local") == "make undeploy deploy"
    assert deploy.reload("x.yaml") == "make down up deploy CLUSTER=x.yaml"


# The tunnel, with programs in ssh's place


def pretended(tmp_path: Path, script: str) -> list[str]:
    program = tmp_path / "ssh"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o700)
    return [str(program), "-i", "key", "ubuntu@10.0.0.2"]


def test_a_tunnel_binds_loopback_alone_and_ends_what_it_started(tmp_path: Path) -> None:
    way = pretended(tmp_path, f'echo "$@" > {tmp_path}/called; echo Welcome; echo open; exec cat > /dev/null')
    with tunnel(way, {18265: 8265, 18000: 8000}) as ssh:
        assert ssh.poll() is None
    assert ssh.poll() is not None
    words = (tmp_path / "called").read_text()
    assert words.startswith(
        "-i key -L127.0.0.1:18265:127.0.0.1:8265 -L127.0.0.1:18000:127.0.0.1:8000 ubuntu@10.0.0.2 echo open;"
    )


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        ("echo first >&2; echo 'Permission denied (publickey).' >&2; exit 255", ": Permission denied (publickey)."),
        ("exit 255", "."),
    ],
)
def test_an_ssh_that_does_not_get_through_is_told_in_its_words(tmp_path: Path, script: str, sentence: str) -> None:
    with pytest.raises(UserError) as stop, tunnel(pretended(tmp_path, script), {18265: 8265}):
        pass
    assert str(stop.value) == f"SSH does not get through to ubuntu@10.0.0.2{sentence}"


def test_ports_are_the_heads_own_where_they_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "free", lambda port: True)
    assert verbs.free_port("SERVE_PORT", None, 8000) == 8000
    assert verbs.free_port("SERVE_PORT", 9000, 8000) == 9000
    monkeypatch.setattr(processes, "free", lambda port: port >= 20000)
    assert verbs.free_port("SERVE_PORT", None, 8000) >= 20000
    with pytest.raises(UserError, match=r"Port 9000 is taken by .*\. Choose another one with SERVE_PORT="):
        verbs.free_port("SERVE_PORT", 9000, 8000)


# What plain clients need


def exports(capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, str], str]:
    output = capsys.readouterr()
    first, *lines = output.out.splitlines()
    assert all(re.fullmatch(r"export \w+=\S.*", line) for line in lines)
    assert first == "unset RAY_AUTH_TOKEN RAY_AUTH_TOKEN_PATH", "which a local cluster's address may have left"
    return dict(line.removeprefix("export ").split("=", 1) for line in lines), output.err


def test_address_tells_the_open_tunnels_and_else_that_there_are_none(
    ours: Path, home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    verbs.address(ours, home / "run")
    variables, note = exports(capsys)
    assert note == (
        f"These lead nowhere until another terminal holds the tunnels open: make dashboard CLUSTER={ours}\n"
    )
    assert variables["RAY_ADDRESS"] == variables["RAY_DASHBOARD_ADDRESS"] == "http://127.0.0.1:8265"
    assert variables["RAY_API_SERVER_ADDRESS"] == variables["RAY_ADDRESS"], (
        "which another cluster's address may have set"
    )
    assert (variables["IMAGINE_URL"], variables["RAY_AUTH_MODE"]) == ("http://127.0.0.1:8000", "token")
    assert variables["PATH"] == f"{Path(sys.executable).parent}:/usr/bin:/bin"
    with verbs.recorded(ours, home / "run", (18265, 18000)):
        verbs.address(ours, home / "run")
        variables, note = exports(capsys)
        assert (variables["RAY_ADDRESS"], variables["IMAGINE_URL"]) == (
            "http://127.0.0.1:18265",
            "http://127.0.0.1:18000",
        )
        assert note == "" and TOKEN not in str(variables)
        standing = verbs.tunnels(ours, home / "run")
        assert standing and standing[0].pid == psutil.Process().pid
    assert verbs.tunnels(ours, home / "run") is None


def test_the_path_is_not_made_longer_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/bin")
    monkeypatch.setenv("PATH", longer := verbs.variables(8265, 8000)["PATH"])
    assert verbs.variables(8265, 8000)["PATH"] == longer


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"process": {"pid": 1}, "ports": [1]}'])
def test_a_damaged_record_counts_as_no_tunnel(ours: Path, home: Path, text: str) -> None:
    file = verbs.folder(ours, home / "run") / "tunnels.json"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    assert verbs.tunnels(ours, home / "run") is None
