"""Finds and ends the processes that a cluster started, and no others. Also free ports and environments for them.

A process belongs to a cluster in three cases:

- Its environment has the cluster's mark, which children inherit and keep when their parents end.
- It was recorded with its pid *and* its start time. A pid alone may have been given to another process since.
- It is a descendant of such a process.

Command lines prove nothing: an editor that shows a cluster's log has the cluster's folder in its own. Knows nothing of
Ray.
"""

import os
import random
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.cli import UserError

MARK = "IMAGINE_CLUSTER"
PROXY_CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"  # in the environment of `ray start`
PROXY_GUARDS = "app.api.proxy:guards"
API_KEY = "IMAGINE_API_KEY"  # in the environment: the key that `make demo` and `make loadtest` send
# Variables with which Python finds other modules or behaves differently. The Makefile removes them too.
PYTHON_VARIABLES = (
    *("PYTHONPATH", "PYTHONHOME", "PYTHONSAFEPATH", "PYTHONPLATLIBDIR", "PYTHONUSERBASE", "PYTHONSTARTUP"),
    *("PYTHONINSPECT", "PYTHONOPTIMIZE", "PYTHONWARNINGS", "PYTHONDONTWRITEBYTECODE"),
)
SAME_START_S = 1.0  # start times depend on the wall clock, which may have been corrected since


@dataclass(frozen=True)
class Recorded:
    pid: int
    started: float
    name: str


def record(process: psutil.Process) -> Recorded:
    return Recorded(process.pid, process.create_time(), name_of(process))


def name_of(process: psutil.Process) -> str:
    """The program's name; for Python, the script or module that it runs."""
    try:
        arguments = process.cmdline()
        for before, argument in zip(["", *arguments], arguments, strict=False):
            if argument.endswith(".py"):
                return Path(argument).stem
            if before == "-m":
                return argument
        return process.name()
    except psutil.Error:
        return "?"


def find(recorded: Recorded) -> psutil.Process | None:
    """The recorded process, if it still runs."""
    try:
        process = psutil.Process(recorded.pid)
        if abs(process.create_time() - recorded.started) <= SAME_START_S and not dead(process):
            return process
    except psutil.Error:
        pass
    return None


def dead(process: psutil.Process) -> bool:
    """Whether it has ended. A zombie holds no resources, and in some containers nobody reaps it."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.Error:
        return True


def mark_of(process: psutil.Process) -> str:
    if not own(process):
        return ""
    try:
        return str(process.environ().get(MARK, ""))
    except (psutil.Error, OSError):  # we may not read it, so it is not ours
        return ""


def own(process: psutil.Process) -> bool:
    """Whether it runs as our user. Root could read and end everybody's processes, and must not."""
    try:
        return bool(process.uids().effective == os.geteuid())
    except psutil.Error:
        return False


def marks(beginning: str) -> set[str]:
    return {mark for process in psutil.process_iter() if (mark := mark_of(process)).startswith(beginning)}


def belonging(mark: str, recorded: Iterable[Recorded] = ()) -> list[psutil.Process]:
    """All living processes of the cluster with this mark, except the caller and its ancestors."""
    ours = {process for process in psutil.process_iter() if mark_of(process) == mark}
    ours |= {process for entry in recorded if (process := find(entry))}
    for process in list(ours):
        try:
            ours.update(process.children(recursive=True))
        except psutil.Error:
            continue
    me = psutil.Process()
    return [process for process in ours.difference([me, *me.parents()]) if own(process) and not dead(process)]


def end(search: Callable[[], list[psutil.Process]], grace_s: float) -> int:
    """Terminates all processes that `search` returns, and kills those left after `grace_s`. Returns their number.

    It searches until none is left, because a process may have started another one meanwhile.
    """
    terminated: set[psutil.Process] = set()
    began = time.monotonic()
    while living := search():
        waited = time.monotonic() - began
        if waited > grace_s + 10:
            stubborn = ", ".join(f"{process.pid} ({name_of(process)})" for process in living)
            raise UserError(f"These processes do not end: {stubborn}.")
        for process in living:
            try:
                if waited > grace_s:
                    process.kill()
                elif process not in terminated:
                    process.terminate()
            except psutil.NoSuchProcess:
                pass
        terminated.update(living)
        psutil.wait_procs(living, timeout=0.25)
    return len(terminated)


def free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free
        try:
            probe.bind(("127.0.0.1", port))
            return True
        except OSError:
            return False


def free_ports(count: int, apart_from: int = 0) -> list[int]:
    """Free ports below the range for outgoing connections, so that no connection takes one before we use it.

    They are neighbours: two commands that search at once meet in 1 of 750 cases, not in 1 of 80 for a dozen ports.
    """
    ports: list[int] = []
    first = 16 * random.randrange(750)
    for port in (20000 + (first + number) % 12000 for number in range(12000)):
        if len(ports) == count:
            return ports
        if port != apart_from and free(port):
            ports.append(port)
    raise UserError("There are too few free ports between 20000 and 32000.")


def listener(port: int) -> str:
    """Names the process that listens on a port."""
    for process in psutil.process_iter():
        try:
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
                    return f"process {process.pid} ({name_of(process)})"
        except psutil.Error:
            continue
    return "another user's process"


def environment(**ours: str) -> dict[str, str]:
    """The user's environment without variables that redirect Ray or Python, such as RAY_ADDRESS."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k not in PYTHON_VARIABLES}
    return kept | past_proxies() | ours


def credentials() -> dict[str, str]:
    """The header with the API key in the user's environment, if there is one."""
    key = os.environ.get(API_KEY)
    return {"Authorization": f"Bearer {key}"} if key else {}


def past_proxies() -> dict[str, str]:
    """Variables with which requests to this machine bypass the user's HTTP proxy."""
    listed = (os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "").split(",")
    value = ",".join(filter(None, dict.fromkeys([*listed, "127.0.0.1", "localhost"])))
    return {"no_proxy": value, "NO_PROXY": value}
