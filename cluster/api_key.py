"""Makes an API key, prints it once on stdout, and adds its hash to a file for args.api_keys_file.

The file is replaced atomically, so a reader sees the old or the new one. An invalid file is left as it is: if it was
truncated, a rewrite would lose the other keys for good.
"""

import fcntl
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from app.api.api_keys import END, Entry, content_of, digest_of, new_key, parse
from cluster.cli import Parser, UserError, run_command
from cluster.terminal import say

MODE = 0o600  # of a new file; an existing one keeps its mode
VARIABLES = {"name": "NAME", "requests_per_minute": "RPM", "concurrent_requests": "CONCURRENT"}  # of make


def entry_for(key: str, name: str, requests_per_minute: str, concurrent_requests: str) -> Entry:
    limits = {"requests_per_minute": requests_per_minute, "concurrent_requests": concurrent_requests}
    limits_given = {field: int(text) if text.isdecimal() else text for field, text in limits.items() if text}
    try:
        return Entry.model_validate({"name": name, "sha256": digest_of(key.encode()), **limits_given})
    except ValidationError as error:
        problem = error.errors()[0]
        field = str(problem["loc"][0])
        rule = Entry.model_fields[field].description
        raise UserError(f"{VARIABLES[field]} must be {rule}, got {problem['input']!r}.") from None


def add(entry: Entry, file: Path) -> None:
    file = file.resolve()  # a link stays one
    try:
        with locked(file.parent):
            before = content_of(file) if file.exists() else b"[]\n"
            known = parse(before, str(file))
            if entry.name in [other.name for other in known]:
                raise UserError(f"{file} has a key named {entry.name}. Take another name, or delete that entry first.")
            after = extended(before.decode(), entry).encode()
            if not holds(after, (*known, entry)):
                raise UserError(
                    f"{file} must be a list with one `- name:` below the other, or nothing can be added to it."
                )
            replace(file, after)
    except ValueError as error:
        raise UserError(str(error)) from None
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}.") from None


def extended(before: str, entry: Entry) -> str:
    """Adds an entry below the last one, or in place of `[]`. Leaves all else unchanged."""
    events: list[Any] = [*yaml.parse(before, Loader=yaml.SafeLoader)]
    first, last, end = events[2], events[-3], events[-2]  # of the list, and of the document
    empty = first.flow_style and events[3] is last
    if empty:
        kept, rest = before[: first.start_mark.index], before[last.end_mark.index :].removeprefix("\n")
    else:
        kept, rest = before[: end.start_mark.index], before[end.start_mark.index :]
    rest = rest if end.explicit else f"{rest}{END}\n"
    return kept + yaml.safe_dump([entry.model_dump(exclude_none=True)], sort_keys=False) + rest


def holds(content: bytes, entries: tuple[Entry, ...]) -> bool:
    try:
        return parse(content, "") == entries
    except ValueError:
        return False


def replace(file: Path, content: bytes) -> None:
    """Replaces a file atomically, and keeps its owner and mode."""
    descriptor, draft = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            before = file.stat() if file.exists() else None
            made = os.fstat(descriptor)
            if before and (before.st_uid, before.st_gid) != (made.st_uid, made.st_gid):
                os.fchown(descriptor, before.st_uid, before.st_gid)
            os.fchmod(descriptor, before.st_mode & 0o777 if before else MODE)
            os.fsync(descriptor)
        os.replace(draft, file)
    except BaseException:
        os.unlink(draft)
        raise
    sync(file.parent)


def sync(folder: Path) -> None:
    """Makes the new name survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Allows only one writer, as two at once would lose a key."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--name", default="", help="whose key it is")
    parser.add_argument("--file", type=Path, default=Path("api_keys.yaml"))
    parser.add_argument("--rpm", default="", help="most requests a minute, n pictures counting as n")
    parser.add_argument("--concurrent", default="", help="most requests at a time")
    arguments = parser.parse_args()
    key = new_key()
    add(entry_for(key, arguments.name, arguments.rpm, arguments.concurrent), arguments.file)
    say(key)
    hint = f"That is the key of {arguments.name}. It is stored nowhere; {arguments.file} has its hash."
    print(hint, file=sys.stderr, flush=True)  # stdout has only the key


if __name__ == "__main__":
    run_command(main)
