"""The folder of a run: its plan, and a line for each request, appended when the request ends.

All reports derive from these records. Each line is written in a single call, so a killed run loses no request that has
ended. At most its last line is torn, and readers skip that line.
"""

import json
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, get_args

from cluster.cli import UsageError

Outcome = Literal[
    "ok", "connect", "timeout", "shed", "server_error", "refused", "reset", "bad_image", "client_overload"
]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
MEANING: Mapping[Outcome, str] = {
    "ok": "the requested pictures",
    "connect": "no connection: DNS, TCP or TLS",
    "timeout": "no complete answer in time",
    "shed": "429 or 503: the server sheds load",
    "server_error": "any other 5xx, or an error in a stream",
    "refused": "any other status: the request was wrong",
    "reset": "the connection ended before the answer did",
    "bad_image": "a wrong picture: it does not decode, is blank, has another size, or differs for an equal seed",
    "client_overload": "not sent: this machine had too many requests open",
}
SYNC_S = 1.0  # between two fsyncs


@dataclass(frozen=True)
class Record:
    """The outcome of a request. All times are seconds of the run; `intended` is when it should have been sent."""

    id: int
    kind: str
    endpoint: str
    request: Mapping[str, Any]
    intended: float
    sent: float | None
    first_byte: float | None
    preview: float | None
    done: float
    outcome: Outcome
    status: int | None = None
    error: str | None = None
    pictures: int = 0
    bytes: int = 0
    digest: str | None = None
    retry_after: float | None = None  # seconds, if the server sheds load and says when to retry
    compared: bool = False  # with an earlier answer to the same request
    server: Mapping[str, float] | None = None  # seconds of each part of the work, as the server reports them
    moves: int = 0  # from one replica to another, as the server reports them
    restarts: int = 0  # in another replica, after one was lost

    @property
    def latency(self) -> float:
        return self.done - self.intended


class Journal:
    """An append-only JSONL file, such as requests.jsonl or timeline.jsonl."""

    def __init__(self, path: Path) -> None:
        heal(path)
        self.file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self.closing = threading.Event()
        self.syncing = threading.Thread(target=self.sync, daemon=True)
        self.syncing.start()

    def write(self, entry: Mapping[str, Any]) -> None:
        os.write(self.file, json.dumps(entry, separators=(",", ":")).encode() + b"\n")

    def record(self, record: Record) -> None:
        self.write({name: value for name, value in asdict(record).items() if value is not None})

    def sync(self) -> None:
        while not self.closing.wait(SYNC_S):
            os.fsync(self.file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.closing.set()
        self.syncing.join()
        os.fsync(self.file)
        os.close(self.file)


def heal(path: Path) -> None:
    """Removes a last line that was torn when its writer was killed."""
    if path.exists() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


def entries(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    *lines, torn = path.read_text("utf-8").split("\n")
    for number, line in enumerate([*lines, torn] if torn else lines, 1):
        try:
            yield json.loads(line)
        except ValueError:
            if number <= len(lines):
                raise UsageError(f"{path}:{number} is not JSON: {line[:60]!r}.") from None


@dataclass(frozen=True)
class Session:
    """A process that worked on the run. It started at `epoch` in Unix time, at `offset` seconds of the run."""

    epoch: float
    offset: float


@dataclass(frozen=True)
class Run:
    folder: Path
    head: Mapping[str, Any]  # run.json
    sessions: list[Session]
    records: list[Record]
    ended: str | None  # the reason; None for a killed run
    timeline: list[dict[str, Any]]

    def moment(self, unix: float) -> float:
        """Converts a Unix time to seconds of the run."""
        session = max(
            (session for session in self.sessions if session.epoch <= unix),
            key=lambda session: session.epoch,
            default=None,
        )
        session = session or self.sessions[0]
        return unix - session.epoch + session.offset


def read(folder: Path) -> Run:
    try:
        head = json.loads((folder / "run.json").read_text())
    except (OSError, ValueError):
        raise UsageError(f"{folder} is not the folder of a load test: it has no run.json that can be read.") from None
    known = {each.name for each in fields(Record)}
    absent: dict[str, Any] = {"sent": None, "first_byte": None, "preview": None}
    sessions: list[Session] = []
    records: list[Record] = []
    ended: str | None = None
    for entry in entries(folder / "requests.jsonl"):
        try:
            if "session" in entry:
                sessions.append(Session(entry["epoch"], entry["offset"]))
                ended = None
            elif "ended" in entry:
                ended = entry["ended"]
            else:
                records.append(Record(**absent | {name: value for name, value in entry.items() if name in known}))
        except (KeyError, TypeError, AttributeError):
            raise UsageError(f"{folder} is not the folder of a load test: {str(entry)[:60]} is no record.") from None
    if not sessions:
        raise UsageError(f"{folder} holds no request: the run had not begun.")
    run = Run(folder, head, sessions, records, ended, [*entries(folder / "timeline.jsonl")])
    for sample in run.timeline:
        sample["t"] = run.moment(sample["unix"])
    return run
