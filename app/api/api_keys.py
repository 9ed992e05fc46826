"""API keys: a file of their hashes, read again whenever it changes, and how much each key may ask for.

The file says itself where it ends, so that one that was cut is told from one with fewer keys: a list of lines ends with
a line `...`, YAML's end of a document, and a list in brackets with its bracket. Without keys it says `[]`.

Knows nothing of Ray or HTTP, and never writes a key down: no message here quotes what the file holds beside names,
because a key itself may have been put where its hash belongs.
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

PREFIX = "imagine-"  # so that scanners for secrets, and people, see what it is
KEY_BYTES = 32
BUSY_RETRY_S = 1.0  # when another of the key's requests ends is not known
REFRESH_S = 1.0  # how often the file is looked at, so that a key is revoked within about that time
MOST_BYTES = 256 << 10  # of the file, some 2,000 keys
END = "..."

Signature = tuple[int, int, int, int]


class Entry(BaseModel):
    """One key of the file. The descriptions end the sentence `sha256 must be ...`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
        description="1 to 64 letters, digits, dots, dashes and underscores, a letter or digit first",
    )
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="64 hexadecimal digits in lower case")
    requests_per_minute: int | None = Field(default=None, ge=1, description="an integer of at least 1")
    concurrent_requests: int | None = Field(default=None, ge=1, description="an integer of at least 1")


class LimitReached(Exception):
    """Of a key, with when to try again."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Holder:
    """Whoever has one of the keys: what its entry allows, and what of that is used.

    A minute's requests are a bucket that refills evenly, so a full one may be spent at once. A request for several
    pictures counts as so many. It is let in while one is left and may leave less than none, so that every request
    that the API allows can be made, and the mean is kept all the same.
    """

    def __init__(self, entry: Entry, clock: Callable[[], float]) -> None:
        self.entry = entry
        self.clock = clock
        self.running = 0
        self.left = math.inf
        self.counted_at = clock()

    def begin(self) -> None:
        """Counts one request, for which end() must follow, or raises LimitReached."""
        most, per_minute = self.entry.concurrent_requests, self.entry.requests_per_minute
        if most is not None and self.running >= most:
            raise LimitReached(f"This key allows {most} at a time.", BUSY_RETRY_S)
        self.refill()
        if per_minute is not None and self.left < 1:
            message = f"This key allows {per_minute} a minute, and a request for n pictures counts as n."
            raise LimitReached(message, (1 - self.left) * 60 / per_minute)
        self.running += 1
        self.spend(1)

    def spend(self, requests: int) -> None:
        self.left -= requests

    def end(self) -> None:
        self.running -= 1

    def refill(self) -> None:
        now, per_minute = self.clock(), self.entry.requests_per_minute
        passed, self.counted_at = now - self.counted_at, now
        self.left = math.inf if per_minute is None else min(per_minute, self.left + passed * per_minute / 60)


class Keys:
    """Those of a file. At the start a file that cannot be used is a ValueError; later, the keys read last stay.

    Only `read` and `refresh` touch the disk, which may be slow. The event loop looks keys up in memory.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.path = path
        self.clock = clock
        self.holders: tuple[Holder, ...] = ()
        self.seen: Signature | None = None
        self.problem = self.read()
        if self.problem:
            raise ValueError(self.problem)

    def watch(self) -> None:
        """Refreshes in a thread from now on, for as long as anybody has these keys."""
        threading.Thread(target=refresh_for_life, args=(weakref.ref(self),), name="api keys", daemon=True).start()

    def holder(self, key: bytes) -> Holder | None:
        """Whose key this is. Takes as long whichever it is, and if it is none."""
        digest, found = digest_of(key), None
        for holder in self.holders:
            if hmac.compare_digest(holder.entry.sha256, digest):
                found = holder
        return found

    def refresh(self) -> None:
        before, problem = self.seen, self.read()
        if problem and problem != self.problem:  # told once, and not each time
            logger.error("%s The keys that were read before stay in force.", problem)
        elif not problem and self.seen != before:
            logger.info("read api_keys_file=%s keys=%d", self.path, len(self.holders))
        self.problem = problem

    def read(self) -> str | None:
        """Takes the file as it is now, if it has changed; returns what is wrong with it, if anything is."""
        try:
            signature = signature_of(self.path.stat())
            if signature == self.seen:
                return self.problem
            entries = parse(content_of(self.path), str(self.path))
        except OSError as error:  # which may pass by itself, so the next refresh tries again
            self.seen = None
            return f"{self.path} cannot be read: {error.strerror}."
        except ValueError as error:
            self.seen = signature
            return str(error)
        self.seen = signature
        before = {holder.entry.sha256: holder for holder in self.holders}
        self.holders = tuple(before.get(entry.sha256) or Holder(entry, self.clock) for entry in entries)
        for holder, entry in zip(self.holders, entries, strict=True):
            holder.entry = entry
        return None


def new_key() -> str:
    return f"{PREFIX}{secrets.token_urlsafe(KEY_BYTES)}"


def digest_of(key: bytes) -> str:
    """Plain SHA-256: a slow hash is for what can be guessed, and nobody guesses 256 random bits."""
    return hashlib.sha256(key).hexdigest()


def signature_of(status: os.stat_result) -> Signature:
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino


def refresh_for_life(keys: "weakref.ref[Keys]") -> None:
    while held := keys():
        held.refresh()
        del held  # or they would live as long as this thread
        time.sleep(REFRESH_S)


def content_of(path: Path) -> bytes:
    """Whoever may write the file can let himself in. Reading it helps nobody: it has hashes."""
    refuse_unusable(path, path.stat())  # before it is opened, which a device may act on
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe that is put there would block
    with open(descriptor, "rb") as file:
        refuse_unusable(path, os.fstat(descriptor))
        return file.read(MOST_BYTES + 1)


def refuse_unusable(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} must be a regular file, and is none.")
    if status.st_mode & stat.S_IWOTH:
        raise ValueError(f"{path} must not be writable by everyone: chmod o-w {path}")
    if status.st_size > MOST_BYTES:
        raise ValueError(f"{path} must be at most {MOST_BYTES} bytes, and has {status.st_size}.")


def parse(content: bytes, file: str) -> tuple[Entry, ...]:
    """The entries, or a ValueError whose sentence names the file and the entry."""
    if not content.strip():
        raise ValueError(f"{file} is empty. A file without keys must say [], so that one that was cut is told from it.")
    try:
        text = content.decode()
        found, in_brackets = loaded(text)
    except Exception as error:  # YAMLError, but a wrong date or number raises others, and so do endless brackets
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        if mark and END in [line.rstrip() for line in text.splitlines()[: mark.line]]:
            raise ValueError(f"{file}{line}: nothing may stand below a line {END}; keys stand above it.") from None
        raise ValueError(f"{file} is not YAML{line}.") from None
    if not isinstance(found, list):
        raise ValueError(f"{file} must be a list of keys, each with a name and a sha256; without keys, [].")
    entries: list[Entry] = []
    for i, one in enumerate(found):
        entry = entry_of(one, f"{file}, entry {i + 1}")
        for name in ("name", "sha256"):
            if getattr(entry, name) in [getattr(other, name) for other in entries]:
                raise ValueError(f"{file}, entry {i + 1} ({entry.name}): another entry has the same {name}.")
        entries.append(entry)
    if not in_brackets and not ends(text):
        raise ValueError(f"{file} must end with a line {END} below the last key: without it, it may have been cut.")
    return tuple(entries)


def loaded(text: str) -> tuple[Any, bool]:
    """What stands in it, and whether that is a list in brackets."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        return (None if node is None else loader.construct_document(node)), getattr(node, "flow_style", None) is True
    finally:
        loader.dispose()


def ends(text: str) -> bool:
    """Whether the last line that says anything is the end of the document."""
    lines = [line.partition("#")[0].rstrip() for line in text.splitlines()]
    return [line for line in lines if line][-1:] == [END]


def entry_of(value: object, place: str) -> Entry:
    fields = Entry.model_fields
    if not isinstance(value, dict):
        raise ValueError(f"{place} must be a mapping of {listed([*fields])}.")
    try:
        return Entry.model_validate({str(name): setting for name, setting in value.items()})
    except ValidationError as error:
        problems = {str(problem["loc"][0]): problem["type"] for problem in error.errors()}
    if "name" not in problems:
        place += f" ({value['name']})"
    name, kind = next(iter(problems.items()))
    if kind == "extra_forbidden":
        raise ValueError(f"{place}: {name[:20]} is not known here; an entry has {listed([*fields])}.")
    lead = "is missing; it must" if kind == "missing" else "must"
    raise ValueError(f"{place}: {name} {lead} be {fields[name].description}.")


def listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"
