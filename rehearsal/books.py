"""What the simulated Google Cloud remembers: a project, its machines, addresses, disks and operations.

It also holds the faults that a rehearsal sets. Time is the caller's: a test moves it by hand.
"""

import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from itertools import count
from typing import Any

from rehearsal.catalogue import QUOTAS
from rehearsal.refusal import Refusal

Json = dict[str, Any]
OWNER = "user:you@example.com"
SERVICES = ("compute", "tpu", "iam", "cloudresourcemanager")


@dataclass
class Fault:
    """What goes wrong with the next `times` calls of a method whose id fits the pattern.

    `answer` is an HTTP status instead of the call. `error` is the error with which the operation ends.
    `takes_s` is how long the operation takes; it may be infinite.
    """

    method: str
    times: float = math.inf
    answer: int = 0
    error: Json | None = None
    takes_s: float = 0.0


@dataclass
class Operation:
    name: str
    method: str
    target: str
    done_at: float
    finish: Callable[[], Json]  # what the end of the operation does; returns the resource
    error: Json | None = None
    undo: Callable[[], None] | None = None  # what an error does
    done: bool = False
    result: Json = field(default_factory=dict)


@dataclass(frozen=True)
class Machine:
    """What a host has to know of the instance or TPU node that it is."""

    name: str
    account: str  # of the service that it acts as
    addresses: tuple[str, ...]  # inside, then outside
    accelerator: str = ""
    worker: int = 0
    chips: int = 0


class Keeper:
    """Has hosts for machines. This one has none."""

    def start(self, machine: Machine) -> None:
        pass

    def stop(self, name: str) -> None:
        pass

    def tell(self, name: str, key: str, value: str) -> None:
        """Changes a value of a machine's metadata server."""


@dataclass
class Project:
    """A project as a new user has it: an owner, the APIs enabled, a default network."""

    id: str
    number: int = 123456789012
    services: set[str] = field(default_factory=lambda: set(SERVICES))
    policy: Json = field(default_factory=lambda: {"version": 1, "bindings": [binding("roles/owner", OWNER)]})
    metadata: Json = field(default_factory=lambda: {"kind": "compute#metadata", "fingerprint": "AAAA0000"})
    accounts: dict[str, Json] = field(default_factory=dict)
    quotas: dict[str, int] = field(default_factory=lambda: dict(QUOTAS))

    @property
    def compute_account(self) -> str:
        """The service account of machines that name none."""
        return f"{self.number}-compute@developer.gserviceaccount.com"


class Books:
    def __init__(self, project: Project, now: Callable[[], float]) -> None:
        self.project, self.now = project, now
        self.instances: dict[str, Json] = {}
        self.nodes: dict[str, Json] = {}  # of Cloud TPU
        self.addresses: dict[str, str] = {}  # address -> the machine that has it
        self.disks: dict[str, str] = {}  # boot disk -> the machine that has it
        self.operations: dict[str, Operation] = {}
        self.faults: list[Fault] = []
        self.calls: list[tuple[str, int]] = []  # ids of methods with the status of the answer
        self.tokens: dict[str, str] = {}  # access token -> member of the policy
        self.lock = threading.RLock()
        self.keeper = Keeper()
        self._numbers = count(1)

    def begin(
        self, method: str, target: str, finish: Callable[[], Json], undo: Callable[[], None] | None = None
    ) -> Operation:
        """Starts an operation, as slow or wrong as the faults say."""
        name = f"operation-{next(self._numbers):013d}"
        fault = self.fault(method, answers=False) or Fault(method)
        self.operations[name] = Operation(name, method, target, self.now() + fault.takes_s, finish, fault.error, undo)
        self.settle()
        return self.operations[name]

    def settle(self) -> None:
        """Ends the operations whose time has come."""
        for operation in self.operations.values():
            if not operation.done and operation.done_at <= self.now():
                operation.done = True
                if operation.error is None:
                    operation.result = operation.finish()
                elif operation.undo:
                    operation.undo()

    def fault(self, method: str, answers: bool) -> Fault | None:
        """The first fault for a call, of those that answer it or of those that befall its operation."""
        for fault in self.faults:
            if fault.times > 0 and bool(fault.answer) is answers and fnmatch(method, fault.method):
                fault.times -= 1
                return fault
        return None

    def number(self) -> int:
        return next(self._numbers)

    def address(self, network: str, machine: str) -> str:
        """A free address of 10.128.0 or 203.0.113, which is set aside for examples (RFC 5737)."""
        address = next(f"{network}.{host}" for host in range(2, 255) if f"{network}.{host}" not in self.addresses)
        self.addresses[address] = machine
        return address

    def release(self, machine: str) -> None:
        """Frees the addresses of a machine and its disk, and cancels what else was to happen to it."""
        self.addresses = {address: owner for address, owner in self.addresses.items() if owner != machine}
        self.disks = {disk: owner for disk, owner in self.disks.items() if owner != machine}
        for operation in self.operations.values():
            if operation.target.rpartition("/")[2] == machine.rpartition("/")[2] and not operation.done:
                operation.done, operation.error = True, CANCELLED[operation.method.partition(".")[0]]

    def announce_preemption(self, node: str) -> None:
        """The notice that Google gives half a minute before."""
        self.keeper.tell(host(node), "instance/preempted", "TRUE")

    def announce_maintenance(self, node: str) -> None:
        self.keeper.tell(host(node), "instance/maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")

    def preempt(self, node: str) -> None:
        """Takes a TPU of one host away. It stays listed, as at Google."""
        with self.lock:
            self.keeper.stop(host(node))
            if node in self.nodes:  # Ray's autoscaler deletes a node that has drained
                self.nodes[node]["state"] = "PREEMPTED"

    def open_entries(self) -> Iterator[str]:
        """What costs money or holds quota: empty after a rehearsal."""
        yield from (f"instance {name} ({instance['status']})" for name, instance in self.instances.items())
        yield from (f"TPU node {name} ({node['state']})" for name, node in self.nodes.items())
        yield from (f"address {address} of {machine}" for address, machine in self.addresses.items())
        yield from (f"disk {disk} of {machine}" for disk, machine in self.disks.items())
        yield from (f"operation {name} on {op.target}" for name, op in self.operations.items() if not op.done)


def host(node: str, worker: int = 0) -> str:
    """The name of a host of a TPU node."""
    return f"{node.rpartition('/')[2]}-w-{worker}"


def binding(role: str, member: str) -> Json:
    return {"role": role, "members": [member]}


def lookup(table: dict[str, Json], name: str, path: str) -> Json:
    if name not in table:
        raise Refusal(404, f"The resource '{path}' was not found", "notFound")
    return table[name]


CANCELLED: dict[str, Json] = {  # by the service whose operation it was
    "compute": {"errors": [{"code": "RESOURCE_NOT_FOUND", "message": "The resource has been deleted."}]},
    "tpu": {"code": 1, "message": "The operation was cancelled, as its resource has been deleted."},
}
STOCK_OUT: dict[str, Json] = {
    "compute.instances.insert": {
        "errors": [
            {
                "code": "ZONE_RESOURCE_POOL_EXHAUSTED",
                "message": "The zone does not have enough resources available to fulfill the request. "
                "Try a different zone, or try again later.",
            }
        ]
    },
    "tpu.projects.locations.nodes.create": {
        "code": 8,
        "message": "There is no more capacity in the zone; you can try in another zone where Cloud TPU Nodes are "
        "offered (see https://cloud.google.com/tpu/docs/regions).",
    },
}


def stock_out(method: str, times: float = math.inf) -> Fault:
    return Fault(method, times, error=STOCK_OUT[method])
