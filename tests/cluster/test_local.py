"""cluster/local/verbs.py and cluster/processes.py with ordinary processes. tests/on_cluster/test_verbs.py uses Ray."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from cluster import ROOT, processes
from cluster.cli import UserError
from cluster.local import autoscaler_config, head, verbs
from cluster.local import state as clusters
from cluster.local.autoscaler_config import Timings
from cluster.local.state import Cluster
from cluster.processes import MARK
from tests.clusters import ports as ports_for_a_test

Start = Callable[..., psutil.Process]
SLEEP = "print(flush=True); import time; time.sleep(60)"
OURS, OTHERS = f"run{os.getpid()}#1", f"run{os.getpid()}#2"  # unique to this run of the tests
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEP}"
# A child with an empty environment and its own session: only its parent shows that it belongs to a cluster.
PARENT = (
    "import subprocess, sys, time\n"
    f"child = subprocess.Popen([sys.executable, '-c', {SLEEP!r}], env={{}}, stdout=subprocess.PIPE, "
    "start_new_session=True)\n"
    "child.stdout.readline()  # a process that is only just starting has no environment yet\n"
    "print(child.pid, flush=True); time.sleep(60)"
)


@pytest.fixture
def start() -> Iterator[Start]:
    """Runs a Python program with some mark, and waits until it prints its first line."""
    started: list[subprocess.Popen[str]] = []

    def run(program: str, mark: str = "") -> psutil.Process:
        process = subprocess.Popen(
            [sys.executable, "-c", program], env=os.environ | {MARK: mark}, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout
        process.first_line = process.stdout.readline()  # type: ignore[attr-defined]
        child = psutil.Process(process.pid)
        child.first_line = process.first_line  # type: ignore[attr-defined]
        return child

    yield run
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path.resolve() / ".run"


def cluster_in(run_dir: Path) -> Cluster:
    """A cluster as `up` leaves it on disk, without Ray."""
    run_dir.mkdir(exist_ok=True)
    cluster = clusters.new(run_dir, 8265)
    cluster.temp_dir.mkdir(mode=0o700)
    cluster.save()
    return cluster


def test_a_marked_process_is_ended_and_a_stranger_is_not(start: Start) -> None:
    ours, stranger, neighbour = start(SLEEP, OURS), start(SLEEP), start(SLEEP, OTHERS)
    assert processes.end(lambda: processes.belonging(OURS), grace_s=5) == 1
    assert processes.dead(ours) and not processes.dead(stranger) and not processes.dead(neighbour)


def test_a_process_that_ignores_sigterm_is_killed(start: Start) -> None:
    ours = start(STUBBORN, OURS)
    processes.end(lambda: processes.belonging(OURS), grace_s=0.3)
    assert processes.dead(ours)


def test_a_child_without_the_mark_is_found_through_its_parent(start: Start) -> None:
    parent = start(PARENT, OURS)
    child = psutil.Process(int(parent.first_line))  # type: ignore[attr-defined]
    assert {child, parent} == set(processes.belonging(OURS))
    processes.end(lambda: processes.belonging(OURS), grace_s=5)
    assert processes.dead(child)


def test_a_marked_process_is_found_after_its_parent_was_killed(start: Start) -> None:
    program = PARENT.replace("env={}", f"env={{{MARK!r}: {OURS!r}}}")
    parent = start(program, OURS)
    child = psutil.Process(int(parent.first_line))  # type: ignore[attr-defined]
    parent.send_signal(signal.SIGKILL)
    parent.wait(5)
    assert processes.belonging(OURS) == [child]
    processes.end(lambda: processes.belonging(OURS), grace_s=5)


def test_a_recorded_pid_that_was_given_to_another_process_is_not_ours(start: Start) -> None:
    stranger = start(SLEEP)
    recorded = processes.record(stranger)
    assert processes.find(recorded) == stranger
    reused = replace(recorded, started=recorded.started - 60)
    assert processes.find(reused) is None
    assert processes.belonging(OURS, [reused]) == []


def test_the_caller_is_never_among_them(monkeypatch: pytest.MonkeyPatch) -> None:
    me = processes.record(psutil.Process())
    assert processes.belonging(OURS, [me]) == []


def test_a_taken_port_is_told_with_its_owner() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert not processes.free(port)
        assert str(os.getpid()) in processes.listener(port)
    assert processes.free(port)


def test_free_ports_differ() -> None:
    ports = processes.free_ports(12)
    assert len(set(ports)) == 12 and all(20000 <= port < 32000 for port in ports)


def test_a_tests_ports_are_no_other_tests_before_they_are_in_use() -> None:
    """A cluster's dashboard took the proxy's port of another test's, as both had found it free."""
    command = [sys.executable, "-c", "from tests.clusters import ports; print(*ports(2))"]
    mine = ports_for_a_test(2)
    others = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert len({*mine, *map(int, others)}) == 4


def test_somebody_elses_ray_is_not_passed_on(monkeypatch: pytest.MonkeyPatch, run_dir: Path) -> None:
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_JOB_HEADERS"):
        monkeypatch.setenv(name, "elsewhere")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setenv("no_proxy", "internal.example")
    cluster = clusters.new(run_dir, 8265)
    environment = head.environment(cluster)
    assert "elsewhere" not in "".join(environment.values())
    assert environment["PYTHONPATH"] == str(ROOT)
    assert environment["no_proxy"] == "internal.example,127.0.0.1,localhost"
    assert environment[MARK] == cluster.mark


@pytest.mark.parametrize("base", ["/tmp", "/var/folders/zz/zyxvpxvq6csfxvn_n0000000000000/T"])
def test_rays_sockets_fit_into_the_systems_limit(monkeypatch: pytest.MonkeyPatch, base: str) -> None:
    monkeypatch.setattr(tempfile, "tempdir", base)
    session = "session_2026-11-23_14-22-53_512762_4194304"
    socket_path = clusters.temp_dir_of("a/long/run/dir#0123abcd") / "ray" / session / "sockets" / "dash_MetricsHead"
    assert len(str(socket_path)) < 104


def test_a_cluster_is_read_back_as_it_was_saved(run_dir: Path) -> None:
    cluster = replace(cluster_in(run_dir), processes=(processes.record(psutil.Process()),))
    cluster.save()
    assert Cluster.load(run_dir) == cluster
    shutil.rmtree(cluster.temp_dir)


@pytest.mark.parametrize("content", ["", "{}", "[]", json.dumps({"mark": "x", "temp_dir": "y", "processes": 3})])
def test_a_damaged_state_counts_as_none(run_dir: Path, content: str) -> None:
    run_dir.mkdir()
    (run_dir / "cluster.json").write_text(content)
    with pytest.raises(UserError, match="No cluster is up"):
        clusters.running(run_dir)


def test_a_cluster_whose_raylet_is_gone_is_told(run_dir: Path) -> None:
    cluster = cluster_in(run_dir)
    with pytest.raises(UserError, match=r"The cluster died \(dashboard, gcs_server, monitor, raylet gone\)"):
        clusters.running(run_dir)
    shutil.rmtree(cluster.temp_dir)


def test_down_ends_what_a_crash_left_and_removes_its_folder(
    start: Start, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = cluster_in(run_dir)
    left, stranger = start(SLEEP, cluster.mark), start(SLEEP)
    verbs.down(run_dir)
    assert processes.dead(left) and not processes.dead(stranger)
    assert not cluster.temp_dir.exists() and not (run_dir / "cluster.json").exists()
    assert capsys.readouterr().out == f"The local cluster is down: 1 process ended, {cluster.temp_dir} removed.\n"


def test_down_finds_a_cluster_whose_state_was_deleted(start: Start, run_dir: Path) -> None:
    cluster = cluster_in(run_dir)
    left = start(SLEEP, cluster.mark)
    shutil.rmtree(run_dir)
    verbs.down(run_dir)
    assert processes.dead(left) and not cluster.temp_dir.exists()


def test_down_spares_the_cluster_of_another_checkout(start: Start, tmp_path: Path) -> None:
    ours, other = cluster_in(tmp_path / "run"), cluster_in(tmp_path / "run2")
    neighbour = start(SLEEP, other.mark)
    verbs.down(ours.run_dir)
    assert not processes.dead(neighbour) and other.temp_dir.exists()
    verbs.down(other.run_dir)
    assert processes.dead(neighbour)


def test_down_with_nothing_up_is_a_plain_line(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verbs.down(run_dir)
    assert capsys.readouterr().out == "Nothing is up in this checkout, so nothing to end.\n"


def test_up_names_who_has_its_port(run_dir: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(
            UserError, match=rf"Port {port} is taken by process {os.getpid()} .*RAY_DASHBOARD_PORT={port + 1}"
        ):
            verbs.up(run_dir, port)


def test_a_port_that_is_taken_while_ray_starts_is_the_reason_that_is_told(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as listener:

        def command(cluster: Cluster, types: object) -> list[str]:
            listener.bind(("127.0.0.1", cluster.dashboard_port))
            listener.listen()
            return [sys.executable, "-c", ""]

        monkeypatch.setattr(head, "command", command)
        with pytest.raises(UserError, match=rf"is taken by process {os.getpid()} "):
            verbs.up(run_dir, processes.free_ports(1)[0])


def test_a_failed_start_says_why_and_leaves_nothing(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "command", lambda cluster, types: [sys.executable, "-c", "raise SystemExit('no room')"])
    with pytest.raises(UserError, match="Ray did not start. It says: no room"):
        verbs.up(run_dir, processes.free_ports(1)[0])
    assert [path.name for path in run_dir.iterdir()] == ["lock"]


def test_a_cluster_file_that_google_cloud_would_not_take_is_refused_here_too(run_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text((ROOT / "cluster.yaml").read_text().replace("TPU: 4", "TPU: 8"))
    with pytest.raises(UserError, match=r"cluster.yaml:\d+: error: .*TPU must be 4, .*, got 8"):
        verbs.up(run_dir, processes.free_ports(1)[0], file)


def test_timings_that_return_to_their_defaults_are_named(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir.mkdir(exist_ok=True)
    monkeypatch.setattr(autoscaler_config, "read", lambda path: None)
    monkeypatch.setattr(head, "configure", lambda cluster, types: None)
    cluster = replace(clusters.new(run_dir, 8265), timings=Timings(stock_out=1.0))
    cluster = verbs.reconfigured(cluster, None, None, {"stock_out": "0"})
    assert capsys.readouterr().out == "From now on: no launch delay, no stock-outs, no preemption\n"
    verbs.reconfigured(cluster, None, None, {"launch_s": "5"})
    assert capsys.readouterr().out == "From now on: LAUNCH_S=5\n"


def test_two_at_a_time_are_one_too_many(run_dir: Path) -> None:
    with verbs.locked(run_dir), pytest.raises(UserError, match="Another make up or make down is running"):
        verbs.down(run_dir)


@pytest.mark.parametrize("text", ["80", "65536", "http", "-1", ""])
def test_a_port_is_a_number_in_range(text: str) -> None:
    with pytest.raises(UserError, match="A port must be between 1024 and 65535, got"):
        verbs.port(text)
