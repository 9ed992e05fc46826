"""Reads and writes state files on a machine with several users. Refuses files that another user could have made.

This protects root most, who can end any process and remove any file that such a file names. Knows nothing of clusters.
"""

import errno
import os
import pwd
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.cli import UserError


@contextmanager
def private() -> Iterator[None]:
    """Files made in this block are readable by their owner only."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def name_of(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:  # in a container, a user may have a number and no name
        return f"user {uid}"


def is_own_folder(path: Path) -> bool:
    """Whether it is a folder that we own, and not a link."""
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()


def make_folder(path: Path, option: str) -> None:
    """Makes a private folder. An existing one must be ours. `option` is the user's way to name another one."""
    another = f"Name a folder of your own: {option}"
    try:
        with private():
            path.mkdir(parents=True, exist_ok=True)
        status = path.stat()
    except OSError as error:
        raise UserError(
            f"{path} cannot be made: {error.strerror}. You are {name_of(os.geteuid())}, and {owner_of(path)}. {another}"
        ) from None
    if status.st_uid != os.geteuid():
        raise UserError(
            f"{path} belongs to {name_of(status.st_uid)}, and you are {name_of(os.geteuid())}: what is kept there is "
            f"not yours to use or end. {another}"
        )
    if status.st_mode & 0o022:  # others could put files there
        path.chmod(stat.S_IMODE(status.st_mode) & ~0o022)


def owner_of(path: Path) -> str:
    """Names the owner of the nearest parent folder that we may look at."""
    for folder in path.parents:
        try:
            return f"{folder} belongs to {name_of(folder.stat().st_uid)}"
        except OSError:
            continue
    return "its owner is not known"


def read(path: Path) -> str:
    """Reads a file that we own. Raises FileNotFoundError; UserError if it is another user's, or no regular file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except NotADirectoryError as error:  # a parent is a file, so the path does not exist
        raise FileNotFoundError(*error.args, error.filename) from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(f"{path} is a link, which is not followed. Remove it.") from None
        raise UserError(f"{path} cannot be read: {error.strerror}. You are {name_of(os.geteuid())}.") from None
    status = os.fstat(descriptor)
    wrong = ""
    if not stat.S_ISREG(status.st_mode):
        wrong = "is no file. Remove it."
    elif status.st_uid != os.geteuid():
        wrong = f"belongs to {name_of(status.st_uid)}, and you are {name_of(os.geteuid())}: it is not trusted."
    if wrong:
        os.close(descriptor)
        raise UserError(f"{path} {wrong}")
    with open(descriptor) as file:
        return file.read()


def write(path: Path, text: str) -> None:
    """Replaces a file atomically, readable by its owner only.

    The other two atomic writers differ in what they promise. jobs/unfinished.py writes results for all users, with
    drafts of several hosts in one folder. cluster/api_key.py keeps a file's owner and mode, and survives a power cut.
    """
    draft = path.with_name(f"{path.name}.draft")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(descriptor, "w") as file:
        file.write(text)
    draft.replace(path)
