"""Shared by tests of a real local cluster: the Makefile's verbs as a user runs them, and plain HTTP."""

import atexit
import contextlib
import fcntl
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn
from unittest.mock import patch
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from cluster import ROOT, processes
from cluster.local.state import Cluster


@dataclass(frozen=True)
class Verbs:
    """Runs the modules behind the Makefile's verbs, as its recipes do."""

    run_dir: Path
    dashboard_port: int
    serve_port: int
    cluster_file: Path = ROOT / "cluster.yaml"
    config: Path = ROOT / "serve_config.yaml"

    def __call__(self, module: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        environment = os.environ | surroundings(self.run_dir / "surroundings")
        command = [sys.executable, "-m", f"cluster.{module}", *arguments, "--run-dir", str(self.run_dir)]
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)

    def up(self, *options: str) -> subprocess.CompletedProcess[str]:
        return self(
            "local", "up", "--dashboard-port", str(self.dashboard_port), "--twin", str(self.cluster_file), *options
        )

    def down(self) -> subprocess.CompletedProcess[str]:
        return self("local", "down")

    def deploy(self, config: Path) -> subprocess.CompletedProcess[str]:
        return self("deploy", "deploy", "--config", str(config))

    @property
    def cluster(self) -> Cluster:
        cluster = Cluster.load(self.run_dir)
        assert cluster
        return cluster


def surroundings(folder: Path) -> dict[str, str]:
    """An environment that must not matter: another cluster and token, another Python's packages, and a temporary folder
    whose path is too long for sockets."""
    temporary, packages = folder / ("t" * (100 - len(str(folder)))), folder / "packages"
    temporary.mkdir(parents=True, exist_ok=True)
    for name in ("pydantic", "yaml", "psutil"):
        (packages / name).mkdir(parents=True, exist_ok=True)
        (packages / name / "__init__.py").write_text("raise ImportError('of another Python')")
    cluster = {"RAY_ADDRESS": "10.255.255.1:6379", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "somebody-elses"}
    return {**cluster, "PYTHONPATH": str(packages), "TMPDIR": str(temporary)}


def one_node_cluster(run_dir: Path, folder: Path) -> Iterator[Verbs]:
    """Runs a local cluster during the fixture's tests. It may have one TPU node and its config one replica, so that
    load adds no second one. tests/on_cluster/test_scaling.py tests scaling."""
    cluster_file, config = folder / "cluster.yaml", folder / "serve_config.yaml"
    cluster_file.write_text(
        (ROOT / "cluster.yaml").read_text().replace("max_workers: 4 # of this type", "max_workers: 1")
    )
    shipped = (ROOT / "serve_config.yaml").read_text().replace("max_replicas: 4", "max_replicas: 1")
    config.write_text(shipped.replace(" .state/", f" {folder}/state/"))
    dashboard_port, serve_port = ports(2)
    verbs = Verbs(run_dir, dashboard_port, serve_port, cluster_file, config)
    with only_user(run_dir):
        verbs.down()  # what a test run that was killed may have left
        succeeds(verbs.up())
        yield verbs
        succeeds(verbs.down())


@contextlib.contextmanager
def only_user(run_dir: Path) -> Iterator[None]:
    """Fails the test where another process of pytest has its cluster in this folder, which `down` would end."""
    run_dir.parent.mkdir(exist_ok=True)
    with run_dir.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pytest.fail(
                f"Another process has a cluster in {run_dir}. Does tests/scheduling.py have them in one process?"
            )
        yield


def in_this_process(
    run: Callable[[], NoReturn], command: list[str], environment: Mapping[str, str] = MappingProxyType({})
) -> subprocess.CompletedProcess[str]:
    """Runs a command as `python -m` does, but without the seconds of its imports. `run` ends as its process would."""
    out, err, argv, handler = io.StringIO(), io.StringIO(), sys.argv, signal.getsignal(signal.SIGTERM)
    sys.argv = command
    try:
        with patch.dict(os.environ, environment), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    finally:
        sys.argv = argv
        signal.signal(signal.SIGTERM, handler)
    return subprocess.CompletedProcess(command, status, out.getvalue(), err.getvalue())


def ports(count: int) -> list[int]:
    """Free ports that `up` does not choose. No other test of this machine gets them before this process ends."""
    claimed: list[int] = []
    for port in range(18000, 19000):
        if processes.free(port) and claim(port):
            claimed.append(port)
            if len(claimed) == count:
                return claimed
    pytest.fail("There are too few free ports between 18000 and 19000.")


def claim(port: int) -> bool:
    """Whether no other call of this machine has it: Linux keeps each abstract name once, and frees it with us."""
    name = socket.socket(socket.AF_UNIX)
    try:
        name.bind(f"\0tpu-diffusion-test-port-{port}")
    except OSError:
        name.close()
        return False
    atexit.register(name.close)  # Python warns of a socket that it has to close itself
    return True


def succeeds(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def put_config(verbs: Verbs, config: dict[str, Any]) -> None:
    """Gives Serve a config as `serve deploy` does, but neither checks it nor waits."""
    dashboard = verbs.cluster.dashboard
    headers = {**dashboard.headers, "Content-Type": "application/json"}
    url = f"{dashboard.address}/api/serve/applications/"
    urlopen(Request(url, json.dumps(config).encode(), headers, method="PUT"), timeout=30).close()


def refuses(done: subprocess.CompletedProcess[str]) -> str:
    """The sentence of a command that failed without a traceback."""
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done.stderr.strip()


def fetch(url: str, body: object = None, timeout_s: float = 120) -> tuple[int, bytes, dict[str, str]]:
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    request = Request(url, data, {"Content-Type": "application/json"} if data is not None else {})
    try:
        with urlopen(request, timeout=timeout_s) as answer:
            return answer.status, answer.read(), dict(answer.headers)
    except HTTPError as error:
        return error.code, error.read(), dict(error.headers)


def soon(true: Callable[[], bool], timeout_s: float = 60) -> bool:
    deadline = time.monotonic() + timeout_s
    while not (seen := true()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return seen
