"""Whose a file is, on a machine that others use too. What another user could have put there is not believed.

Root can read, end and remove everything, so root above all must not act on what somebody else wrote. Knows nothing of
clusters.
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
    """What is made in this block is for its owner alone."""
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
    """Whether it is a folder of ours, and no link to one."""
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()


def make_folder(path: Path, option: str) -> None:
    """For us alone. One that is there must be ours; `option` is how the user names another one."""
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
    if status.st_mode & 0o022:  # others could put files there for us to believe
        path.chmod(stat.S_IMODE(status.st_mode) & ~0o022)


def owner_of(path: Path) -> str:
    """In words, of the nearest folder above that can be looked at."""
    for folder in path.parents:
        try:
            return f"{folder} belongs to {name_of(folder.stat().st_uid)}"
        except OSError:
            continue
    return "its owner is not known"


def read(path: Path) -> str:
    """A file of ours. Raises FileNotFoundError, and UserError where it is another user's, a link or no file at all."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except NotADirectoryError as error:  # a folder on the way is a file, so nothing is there
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
        wrong = f"belongs to {name_of(status.st_uid)}, and you are {name_of(os.geteuid())}: it is not believed."
    if wrong:
        os.close(descriptor)
        raise UserError(f"{path} {wrong}")
    with open(descriptor) as file:
        return file.read()


def write(path: Path, text: str) -> None:
    """For us alone, and at one go, as it may be read at any moment."""
    draft = path.with_name(f"{path.name}.draft")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(descriptor, "w") as file:
        file.write(text)
    draft.replace(path)
