"""Whose processes are whose, and ending exactly one's own. Knows nothing of Ray.

A process is ours if it carries our mark in its environment (children inherit it, and it outlives their parents), if
it was recorded by pid *and* start time (a pid alone may since have been given to a stranger), or if it descends from
one of these. Command lines prove nothing: an editor that shows one of our logs has our folder in its own.
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
# What would have a Python find other modules than ours, or run otherwise. The Makefile keeps them away too.
STRAYS = (
    *("PYTHONPATH", "PYTHONHOME", "PYTHONSAFEPATH", "PYTHONPLATLIBDIR", "PYTHONUSERBASE", "PYTHONSTARTUP"),
    *("PYTHONINSPECT", "PYTHONOPTIMIZE", "PYTHONWARNINGS", "PYTHONDONTWRITEBYTECODE"),
)
SAME_START_S = 1.0  # a start time is derived from the wall clock, which may have been corrected since


@dataclass(frozen=True)
class Recorded:
    pid: int
    started: float
    name: str


def record(process: psutil.Process) -> Recorded:
    return Recorded(process.pid, process.create_time(), name_of(process))


def name_of(process: psutil.Process) -> str:
    """A program's name, or for Python the script or module that it runs."""
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
    """The very process that was recorded, if it still runs."""
    try:
        process = psutil.Process(recorded.pid)
        if abs(process.create_time() - recorded.started) <= SAME_START_S and not dead(process):
            return process
    except psutil.Error:
        pass
    return None


def dead(process: psutil.Process) -> bool:
    """Gone, or a zombie: it holds nothing any more, and where nobody reaps orphans it stays for ever."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.Error:
        return True


def mark_of(process: psutil.Process) -> str:
    if not own(process):
        return ""
    try:
        return str(process.environ().get(MARK, ""))
    except (psutil.Error, OSError):  # not ours to read, so not ours
        return ""


def own(process: psutil.Process) -> bool:
    """Whether it runs as the user that we are. Root can read and end everybody's, and must not."""
    try:
        return bool(process.uids().effective == os.geteuid())
    except psutil.Error:
        return False


def marks(beginning: str) -> set[str]:
    return {mark for process in psutil.process_iter() if (mark := mark_of(process)).startswith(beginning)}


def belonging(mark: str, recorded: Iterable[Recorded] = ()) -> list[psutil.Process]:
    """Every living process of the cluster with this mark, without the caller and its ancestors."""
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
    """Asks all that `search` finds to end, kills what is left after `grace_s`, and searches until nothing is left:
    a process may have started another one meanwhile. Returns how many there were."""
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
    """Ports below every system's range for outgoing connections, so that none of those takes one before we do."""
    ports: list[int] = []
    for port in random.sample(range(20000, 32000), 2000):
        if len(ports) == count:
            return ports
        if port != apart_from and free(port):
            ports.append(port)
    raise UserError("There are too few free ports between 20000 and 32000.")


def listener(port: int) -> str:
    """Who listens on a port that is not free, in words."""
    for process in psutil.process_iter():
        try:
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
                    return f"process {process.pid} ({name_of(process)})"
        except psutil.Error:
            continue
    return "another user's process"


def environment(**ours: str) -> dict[str, str]:
    """The user's environment without what would steer Ray or Python elsewhere, such as somebody's RAY_ADDRESS."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k not in STRAYS}
    return kept | past_proxies() | ours


def credentials() -> dict[str, str]:
    """Headers with the key for the API that the user's environment names, if it does."""
    key = os.environ.get(API_KEY)
    return {"Authorization": f"Bearer {key}"} if key else {}


def past_proxies() -> dict[str, str]:
    """What keeps requests to this machine away from a proxy that the user's environment names."""
    listed = (os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "").split(",")
    value = ",".join(filter(None, dict.fromkeys([*listed, "127.0.0.1", "localhost"])))
    return {"no_proxy": value, "NO_PROXY": value}
