"""Network namespaces joined by a bridge that lies in one of them. The machine itself has none of their addresses.

Needs root. A namespace is named after the process that made it, so that a later one can remove what a killed one left.
"""

import ctypes
import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
FOLDER = Path("/var/run/netns")
PREFIX = "rehearsal"
CLONE_NEWNET = 0x40000000
GATEWAYS = ("10.128.0.1", "203.0.113.1")  # of the cloud's inner and outer network


class Network:
    def __init__(self) -> None:
        sweep()
        self.cloud = self.namespace("cloud")
        ip("netns", "add", self.cloud)
        inside(self.cloud, "link", "add", "bridge", "type", "bridge")
        for address in GATEWAYS:
            inside(self.cloud, "addr", "add", f"{address}/24", "dev", "bridge")
        for device in ("lo", "bridge"):
            inside(self.cloud, "link", "set", device, "up")
        self._numbers = count(1)
        self._ports: dict[str, str] = {}  # of the bridge, by the names of those that have joined

    def namespace(self, name: str) -> str:
        return f"{PREFIX}-{os.getpid()}-{name}"

    def join(self, name: str, *addresses: str) -> str:
        """A namespace with these addresses; the first is the one that it sends from."""
        namespace = self.namespace(name)
        port = self._ports[name] = f"port{next(self._numbers)}"
        ip("netns", "add", namespace)
        ip("link", "add", "eth0", "netns", namespace, "type", "veth", "peer", "name", port, "netns", self.cloud)
        inside(self.cloud, "link", "set", port, "master", "bridge", "up")
        # The link's address follows from the first: others remember that of whoever had it before, for half a minute.
        hardware = ":".join(f"{int(part):02x}" for part in ("2", "0", *addresses[0].split(".")))
        inside(namespace, "link", "set", "eth0", "address", hardware)
        for address in addresses:
            inside(namespace, "addr", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            inside(namespace, "link", "set", device, "up")
        inside(namespace, "route", "add", "default", "via", GATEWAYS[addresses[0].startswith("203")])
        return namespace

    def leave(self, name: str) -> None:
        """Ends a namespace. Its link goes first and at once, as a busy kernel leaves the rest for later."""
        inside(self.cloud, "link", "del", self._ports.pop(name))
        remove(self.namespace(name))

    def close(self) -> None:
        for namespace in list_of(os.getpid()):
            remove(namespace)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def inside(namespace: str, *arguments: str) -> None:
    ip("-netns", namespace, *arguments)


def list_of(pid: int) -> list[str]:
    return [file.name for file in FOLDER.glob(f"{PREFIX}-{pid}-*")]


def remove(namespace: str) -> None:
    """Ends the processes that still run in a namespace, and removes it."""
    pids = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True).stdout.split()
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    ip("netns", "del", namespace)


def sweep() -> None:
    """Removes what a rehearsal left that was killed."""
    for file in FOLDER.glob(f"{PREFIX}-*-*"):
        if (owner := re.fullmatch(rf"{PREFIX}-(\d+)-.*", file.name)) and not Path(f"/proc/{owner[1]}").exists():
            remove(file.name)


def call_inside(namespace: str, call: Callable[[], T]) -> T:
    """Calls a function on a thread that is in the namespace. Sockets that it makes stay there."""
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        with (FOLDER / namespace).open() as file:
            if libc.setns(file.fileno(), CLONE_NEWNET):
                errors.append(OSError(ctypes.get_errno(), f"setns {namespace}"))
                return
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
