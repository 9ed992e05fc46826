"""The folder of a soak test, from which a stopped test can continue.

soak.json describes the test. results.jsonl gets a line for each client. events.jsonl gets a line for each sample of the
cluster's processes and for each kill of a replica.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from cluster.cli import UsageError
from loadtest.records import entries


@dataclass(frozen=True)
class Result:
    """The outcome of a client. Times are seconds of the run."""

    id: int
    kind: str
    at: float
    done: float
    outcome: str  # as in loadtest/records.py; clients that want no picture add left, unread and wrong_answer
    status: int | None = None
    code: str | None = None  # of an error in OpenAI's format
    error: str | None = None
    compared: bool = False  # with an earlier answer to the same request


@dataclass(frozen=True)
class Process:
    """A process at the time of a sample."""

    pid: int
    started: float  # in Unix time
    kind: str
    rss: int  # bytes
    shared: int  # bytes of rss in files and shared memory
    fds: int
    threads: int

    @property
    def private(self) -> int:
        return self.rss - self.shared


@dataclass(frozen=True)
class Sample:
    """All processes at a time of the run. `phase` is before, load or after; before and after the cluster is idle."""

    t: float
    phase: str
    processes: tuple[Process, ...]
    position: float = 0.0  # seconds of the load so far
    unfinished: int | None = None  # None: the server did not say
    replicas: int | None = None


@dataclass(frozen=True)
class Kill:
    t: float
    pid: int
    recovered: float | None  # when another replica answered


@dataclass
class Run:
    head: Mapping[str, Any]
    sessions: int
    results: Sequence[Result]
    samples: Sequence[Sample]
    kills: Sequence[Kill]
    ends: Mapping[str, Any] = field(default_factory=dict)  # the last event; empty for a test that was stopped

    @property
    def reached_s(self) -> float:
        """Seconds of the load so far."""
        return max((sample.position for sample in self.samples), default=0.0)

    @property
    def seen_s(self) -> float:
        """The time of the last sample."""
        return max((sample.t for sample in self.samples), default=0.0)


def read(folder: Path) -> Run:
    try:
        head = json.loads((folder / "soak.json").read_text())
    except (OSError, ValueError):
        raise UsageError(f"{folder} is not the folder of a soak test: it has no soak.json that can be read.") from None
    known = {each.name for each in fields(Result)}
    results = [
        Result(**{name: value for name, value in entry.items() if name in known})
        for entry in entries(folder / "results.jsonl")
    ]
    run = Run(head, 0, results, [], [])
    samples: list[Sample] = []
    kills: list[Kill] = []
    for entry in entries(folder / "events.jsonl"):
        match entry.pop("event"):
            case "session":
                run.sessions, run.ends = run.sessions + 1, {}
            case "sample":
                samples.append(Sample(**entry | {"processes": tuple(Process(*each) for each in entry["processes"])}))
            case "kill":
                kills.append(Kill(entry["t"], entry["pid"], None))
            case "recovered":
                kills = [Kill(kill.t, kill.pid, entry["t"]) if kill.t == entry["kill"] else kill for kill in kills]
            case "end":
                run.ends = entry
    run.samples, run.kills = samples, kills
    return run
