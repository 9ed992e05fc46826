"""A local cluster for a benchmark, with a folder and ports of its own.

It ends with the block. A cluster that `make up` started in this checkout is neither used nor disturbed.
"""

import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import yaml

from cluster import ROOT, processes

PORTS = range(19000, 20000)  # `make up` and the tests choose from other ranges
TIMEOUT_S = 1800.0


@contextmanager
def local_cluster(run_dir: Path, config: Mapping[str, Any]) -> Iterator[str]:
    """Starts a cluster, deploys `config` and gives the URL of the API."""
    dashboard_port, serve_port = [port for port in PORTS if processes.free(port)][:2]
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / "serve_config.yaml"
    path.write_text(yaml.safe_dump(dict(config), sort_keys=False))
    verb(run_dir, "local", "down")  # ends what a killed run may have left
    try:
        verb(run_dir, "local", "up", "--dashboard-port", str(dashboard_port))
        verb(run_dir, "deploy", "deploy", "--config", str(path), "--serve-port", str(serve_port))
        yield f"http://127.0.0.1:{serve_port}"
    finally:
        verb(run_dir, "local", "down")


def verb(run_dir: Path, module: str, *arguments: str) -> None:
    command = [sys.executable, "-m", f"cluster.{module}", *arguments, "--run-dir", str(run_dir)]
    if code := subprocess.run(command, cwd=ROOT, timeout=TIMEOUT_S, stdout=sys.stderr).returncode:
        sys.exit(code)  # the command has printed the reason


def leave(signum: int, frame: Any) -> NoReturn:
    """A signal handler that raises SystemExit, so that `finally` blocks run when the process is terminated."""
    raise SystemExit(128 + signum)
