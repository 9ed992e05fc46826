"""Writes files whole: an unfinished file is renamed into the output folder once it is complete.

Several runs may write to one output folder, so each run has its own folder of unfinished files in it. The folder is
locked while its run lives. What a killed run left is removed by the next run that ends on the same machine. Not every
shared disk shows the locks of other machines, so their folders are kept for a day.
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

PREFIX = ".unfinished-"
LOCK = ".lock"
STALE_S = 86_400


@contextlib.contextmanager
def unfinished_folder(out: Path) -> Iterator[Path]:
    """A folder in `out` for this run alone, while the block runs."""
    made = Path(tempfile.mkdtemp(prefix=".", dir=out))
    made.chmod(0o755)  # mkdtemp allows its user alone, and TPU hosts may have another
    with (made / LOCK).open("w") as lock:
        with contextlib.suppress(OSError):  # a disk without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        # It gets the name that other runs look for only now, so they never see it unlocked.
        folder = made.rename(out / f"{PREFIX}{socket.gethostname()}{made.name}")
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            clear_abandoned(out)


def clear_abandoned(out: Path) -> None:
    for folder in out.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # another run may remove it meanwhile
            same_machine = folder.name.startswith(f"{PREFIX}{socket.gethostname()}.")
            if not same_machine and folder.stat().st_mtime > time.time() - STALE_S:
                continue
            with (folder / LOCK).open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if its run lives
                shutil.rmtree(folder, ignore_errors=True)


def write(file: Path, content: bytes, folder: Path | None = None) -> None:
    """Writes the file whole or not at all. Until it is whole it is in `folder`, or beside the file."""
    handle, unfinished = tempfile.mkstemp(prefix=".", dir=folder or file.parent)
    try:
        with open(handle, "wb") as opened:
            opened.write(content)
        os.chmod(unfinished, 0o644)
        os.replace(unfinished, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(unfinished)
        raise
