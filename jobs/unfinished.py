"""Where a run keeps files until they are whole, so that whoever reads a folder of results meets whole files only.

Several runs may write to one folder at once, so each has its own place for drafts in it and removes nobody else's. The
place is locked while its run lives: what a killed run has left goes with the next that ends on the same machine. Other
machines' locks cannot be told on every kind of shared disk, so their places stay for a day.
"""

import contextlib
import fcntl
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PREFIX = ".drafts-"
LOCK = ".lock"
STALE_S = 86_400


@contextlib.contextmanager
def drafts(out: Path) -> Iterator[Path]:
    """A folder in `out` that is this run's alone, while the block runs."""
    made = Path(tempfile.mkdtemp(prefix=".", dir=out))
    made.chmod(0o755)  # mkdtemp's is its maker's alone, and TPU hosts may be another user
    with (made / LOCK).open("w") as lock:
        with contextlib.suppress(OSError):  # a disk without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        # Only now under a name that others look for, so that none finds it unlocked.
        place = made.rename(out / f"{PREFIX}{socket.gethostname()}{made.name}")
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)
            clear_abandoned(out)


def clear_abandoned(out: Path) -> None:
    for place in out.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # it may go meanwhile
            here = place.name.startswith(f"{PREFIX}{socket.gethostname()}.")
            if not here and place.stat().st_mtime > time.time() - STALE_S:
                continue
            with (place / LOCK).open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where its run lives
                shutil.rmtree(place, ignore_errors=True)


def write(file: Path, content: bytes, place: Path | None = None) -> None:
    """Whole or not at all. Its draft is in `place`, or beside it."""
    handle, draft = tempfile.mkstemp(prefix=".", dir=place or file.parent)
    try:
        with open(handle, "wb") as opened:
            opened.write(content)
        os.chmod(draft, 0o644)
        os.replace(draft, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(draft)
        raise
