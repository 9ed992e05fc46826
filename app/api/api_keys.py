"""API keys: reads a file of their hashes again whenever it changes, and counts what each key uses of its limits.

The file marks its end, so that a truncated file differs from one with fewer keys. A list of lines ends with a line
`...`, YAML's end of a document; a list in brackets ends with its bracket. A file without keys says `[]`.

Knows nothing of Ray or HTTP. No message quotes anything of the file but names, because a user may have put a key where
its hash belongs.
"""

import hashlib
import hmac
import logging
import math
import os
import secrets
import stat
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

logger = logging.getLogger(f"ray.serve.{__name__}")  # the tree that Serve writes to its files

PREFIX = "imagine-"  # for people and for scanners that look for secrets
KEY_BYTES = 32
BUSY_RETRY_S = 1.0  # nobody knows when the key's running requests end
REFRESH_S = 1.0  # between two checks of the file: about as long as it takes to revoke a key
MOST_BYTES = 256 << 10  # of the file: some 2,000 keys
END = "..."

Signature = tuple[int, int, int, int]


class Entry(BaseModel):
    """One key of the file. A description completes the sentence `sha256 must be ...`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
        description="1 to 64 letters, digits, dots, dashes and underscores, a letter or digit first",
    )
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="64 hexadecimal digits in lower case")
    requests_per_minute: int | None = Field(default=None, ge=1, description="an integer of at least 1")
    concurrent_requests: int | None = Field(default=None, ge=1, description="an integer of at least 1")


class LimitReached(Exception):
    """A key has no request left; says when to try again."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ApiKey:
    """A key's entry in the file, and what is used of its limits.

    requests_per_minute is a token bucket that holds one minute's requests. A request for n images takes n tokens. It
    needs only one and may leave a debt, so that every request that the API allows can be made.
    """

    def __init__(self, entry: Entry, clock: Callable[[], float]) -> None:
        self.entry = entry
        self.clock = clock
        self.running = 0
        self.tokens = math.inf
        self.refilled_at = clock()

    def begin(self) -> None:
        """Counts one request, after which end() must follow, or raises LimitReached."""
        concurrent, per_minute = self.entry.concurrent_requests, self.entry.requests_per_minute
        if concurrent is not None and self.running >= concurrent:
            raise LimitReached(f"This key allows {concurrent} at a time.", BUSY_RETRY_S)
        self.refill()
        if per_minute is not None and self.tokens < 1:
            message = f"This key allows {per_minute} a minute, and a request for n pictures counts as n."
            raise LimitReached(message, (1 - self.tokens) * 60 / per_minute)
        self.running += 1
        self.spend(1)

    def spend(self, requests: int) -> None:
        self.tokens -= requests

    def end(self) -> None:
        self.running -= 1

    def refill(self) -> None:
        now, per_minute = self.clock(), self.entry.requests_per_minute
        passed, self.refilled_at = now - self.refilled_at, now
        self.tokens = math.inf if per_minute is None else min(per_minute, self.tokens + passed * per_minute / 60)


class ApiKeys:
    """The keys of a file. The constructor raises ValueError for an unusable file; later, the last good keys stay.

    Only `read` and `refresh` touch the disk, which may be slow. `find` looks in memory, so the event loop may call it.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.path = path
        self.clock = clock
        self.keys: tuple[ApiKey, ...] = ()
        self.signature: Signature | None = None
        self.problem = self.read()
        if self.problem:
            raise ValueError(self.problem)

    def start_refreshing(self) -> None:
        """In a thread that ends when nobody refers to these keys any more."""
        threading.Thread(target=keep_refreshing, args=(weakref.ref(self),), name="api keys", daemon=True).start()

    def find(self, secret: bytes) -> ApiKey | None:
        """Compares with every key, so that the time it takes reveals nothing."""
        digest, match = digest_of(secret), None
        for key in self.keys:
            if hmac.compare_digest(key.entry.sha256, digest):
                match = key
        return match

    def refresh(self) -> None:
        before, problem = self.signature, self.read()
        if problem and problem != self.problem:  # log a problem once, not every second
            logger.error("%s The keys that were read before stay in force.", problem)
        elif not problem and self.signature != before:
            logger.info("read api_keys_file=%s keys=%d", self.path, len(self.keys))
        self.problem = problem

    def read(self) -> str | None:
        """Reads the file if it has changed. Returns the problem with it, if there is one."""
        try:
            signature = signature_of(self.path.stat())
            if signature == self.signature:
                return self.problem
            entries = parse(content_of(self.path), str(self.path))
        except OSError as error:  # it may pass by itself, so the next refresh tries again
            self.signature = None
            return f"{self.path} cannot be read: {error.strerror}."
        except ValueError as error:
            self.signature = signature
            return str(error)
        self.signature = signature
        before = {key.entry.sha256: key for key in self.keys}
        self.keys = tuple(before.get(entry.sha256) or ApiKey(entry, self.clock) for entry in entries)
        for key, entry in zip(self.keys, entries, strict=True):
            key.entry = entry
        return None


def new_key() -> str:
    return f"{PREFIX}{secrets.token_urlsafe(KEY_BYTES)}"


def digest_of(key: bytes) -> str:
    """Plain SHA-256: slow hashes protect secrets that can be guessed, and nobody guesses 256 random bits."""
    return hashlib.sha256(key).hexdigest()


def signature_of(status: os.stat_result) -> Signature:
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino


def keep_refreshing(reference: "weakref.ref[ApiKeys]") -> None:
    while keys := reference():
        keys.refresh()
        del keys  # a reference would keep them alive as long as this thread
        time.sleep(REFRESH_S)


def content_of(path: Path) -> bytes:
    """Write access to the file must be limited, as it gives access to the API. Read access shows hashes only."""
    check_file(path, path.stat())  # before opening it, which has effects on a device
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would block
    with open(descriptor, "rb") as file:
        check_file(path, os.fstat(descriptor))
        return file.read(MOST_BYTES + 1)


def check_file(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} must be a regular file.")
    if status.st_mode & stat.S_IWOTH:
        raise ValueError(f"{path} must not be writable by everyone: chmod o-w {path}")
    if status.st_size > MOST_BYTES:
        raise ValueError(f"{path} must be at most {MOST_BYTES} bytes, and has {status.st_size}.")


def parse(content: bytes, file: str) -> tuple[Entry, ...]:
    """Returns the entries, or raises ValueError that names the file and the entry."""
    if not content.strip():
        raise ValueError(f"{file} is empty. A file without keys must say [], to differ from one that was cut.")
    try:
        text = content.decode()
        value, in_brackets = load_yaml(text)
    except Exception as error:  # YAMLError; a wrong date or number and endless brackets raise others
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        if mark and END in [line.rstrip() for line in text.splitlines()[: mark.line]]:
            raise ValueError(f"{file}{line}: nothing may stand below a line {END}; keys stand above it.") from None
        raise ValueError(f"{file} is not YAML{line}.") from None
    if not isinstance(value, list):
        raise ValueError(f"{file} must be a list of keys, each with a name and a sha256; without keys, [].")
    entries: list[Entry] = []
    for i, item in enumerate(value):
        entry = entry_of(item, f"{file}, entry {i + 1}")
        for name in ("name", "sha256"):
            if getattr(entry, name) in [getattr(other, name) for other in entries]:
                raise ValueError(f"{file}, entry {i + 1} ({entry.name}): another entry has the same {name}.")
        entries.append(entry)
    if not in_brackets and not has_end_line(text):
        raise ValueError(f"{file} must end with a line {END} below the last key: without it, it may have been cut.")
    return tuple(entries)


def load_yaml(text: str) -> tuple[Any, bool]:
    """The document, and whether it is a list in brackets."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        return (None if node is None else loader.construct_document(node)), getattr(node, "flow_style", None) is True
    finally:
        loader.dispose()


def has_end_line(text: str) -> bool:
    """Whether the last line that is neither empty nor a comment marks the end of the document."""
    lines = [line.partition("#")[0].rstrip() for line in text.splitlines()]
    return [line for line in lines if line][-1:] == [END]


def entry_of(value: object, place: str) -> Entry:
    fields = Entry.model_fields
    if not isinstance(value, dict):
        raise ValueError(f"{place} must be a mapping of {comma_separated([*fields])}.")
    try:
        return Entry.model_validate({str(name): setting for name, setting in value.items()})
    except ValidationError as error:
        problems = {str(problem["loc"][0]): problem["type"] for problem in error.errors()}
    if "name" not in problems:
        place += f" ({value['name']})"
    name, kind = next(iter(problems.items()))
    if kind == "extra_forbidden":
        raise ValueError(f"{place}: {name[:20]} is not known here; an entry has {comma_separated([*fields])}.")
    lead = "is missing; it must" if kind == "missing" else "must"
    raise ValueError(f"{place}: {name} {lead} be {fields[name].description}.")


def comma_separated(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"
