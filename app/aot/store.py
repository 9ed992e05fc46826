"""Saved programs as files: where they are, which are trusted, what is in them.

**Loading a saved program runs what its author wrote.** It is native code, in an envelope that JAX pickled. A checksum
finds damage, not malice, so trust rests on the file system alone. Nothing is loaded or saved unless the folder and each
file belong to this user or to root, and nobody else may write to them. Nothing is fetched from other machines. Who can
write as this user or as root can run code on this machine anyway. Access control lists, and how a network file system
maps owners, are not checked.

There is a second defence. The envelope may name only the few classes of jax_internals.ENVELOPE. The structure of
arguments and results is never unpickled: the first comes from the declared program, the second is plain JSON.
"""

import contextlib
import hashlib
import inspect
import json
import os
import re
import stat
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax
from jax.experimental import serialize_executable
from jax.stages import Compiled

from app.aot.jax_internals import UnknownClass, devices_of, load_executable

KEEP = 4  # files of each program's name; the least recently used are removed first
HEADER_BYTES = 1 << 20  # the longest first line of a file
PUBLISHED = "published.json"  # in a folder with this file only jobs/compile_ahead.py adds files; none ever changes


class Place(NamedTuple):
    """Where a program is kept, and the key that its file must have."""

    folder: Path
    key: dict[str, Any]

    @property
    def path(self) -> Path:
        return self.folder / f"{self.stem}-{hashlib.sha256(line_of(self.key)).hexdigest()[:32]}.xla"

    @property
    def stem(self) -> str:
        return re.sub(r"\W+", "-", self.key["program"])

    def others(self) -> list[Path]:
        """The files of this program with any key, the most recently used first."""
        digits = "[0-9a-f]" * 32
        files = self.folder.glob(f"{self.stem}-{digits}.xla")
        used = {file: status.st_mtime for file in files if (status := status_of(file))}
        return sorted(used, key=lambda file: used[file], reverse=True)


def status_of(path: Path) -> os.stat_result | None:
    with contextlib.suppress(OSError):  # another process may have removed it
        return path.stat()
    return None


class Saved(NamedTuple):
    header: dict[str, Any]
    payload: bytes


class Unusable(Exception):
    """Why a file cannot be loaded."""


def prepare(folder: Path) -> str:
    """Makes the folder if there is none. Returns why it cannot be used, or an empty string."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if why := distrust(folder, folder.stat()):
            # Safe even if others have written to it: their files belong to them, and are not loaded.
            remedy = f"chmod go-w {folder}" if "written" in why else "name another folder, or remove this one"
            return f"{why} To mend it: {remedy}."
        return ""
    except OSError as error:
        return f"{first_line(error)}."


def distrust(path: Path, status: os.stat_result) -> str:
    """Why another user may have written this file or folder, or an empty string."""
    if status.st_uid not in (0, os.geteuid()):
        return f"{path} belongs to user {status.st_uid}, not to {os.geteuid()} or root."
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{path} may be written to by others (mode {stat.S_IMODE(status.st_mode):o})."
    return ""


def line_of(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def read(path: Path) -> Saved:
    """A file that is whole and that no other user could have written. Raises FileNotFoundError or Unusable."""
    with opened(path) as file:
        line, payload = file.readline(HEADER_BYTES), file.read()
    try:
        header = json.loads(line)
        checksum = header.pop("sha256")
        length = header["length"]
        whole = line_of(header | {"sha256": checksum}) == line and checksum == checksum_of(header, payload)
    except (ValueError, TypeError, AttributeError, KeyError):
        raise Unusable("it is damaged, or no saved program at all.") from None
    if not whole:
        raise Unusable(f"it is damaged: its checksum does not fit, and it holds {len(payload)} of {length} bytes.")
    return Saved(header, payload)


def key_in(path: Path) -> dict[str, Any]:
    """The key in a file's first line. Only `read` checks whether the rest is whole.

    Raises FileNotFoundError, Unusable or ValueError.
    """
    with opened(path) as file:
        header = json.loads(file.readline(HEADER_BYTES))
    if not (isinstance(header, dict) and isinstance(key := header.get("key"), dict)):
        raise Unusable("it is no saved program.")
    return key


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        if why := distrust(path, os.fstat(file.fileno())):
            raise Unusable(why)
        yield file


def checksum_of(header: Mapping[str, Any], payload: bytes) -> str:
    return hashlib.sha256(line_of(header) + payload).hexdigest()


def save(place: Place, executable: Compiled, seconds: float) -> None:
    content, _, out_tree = serialize_executable.serialize(executable)
    payload = zlib.compress(content, 1)  # 3 MB shrink to a fifth in 15 ms; higher levels save little more
    header = {
        "key": place.key,
        "length": len(payload),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(seconds, 2),
        "devices": [device.id for device in devices_of(executable)],
        "results": results_to_json(jax.tree.unflatten(out_tree, [0] * out_tree.num_leaves)),
    }
    handle, temporary = tempfile.mkstemp(dir=place.folder, prefix=".", suffix=".tmp")  # 0600
    try:
        with open(handle, "wb") as file:
            file.write(line_of(header | {"sha256": checksum_of(header, payload)}) + payload)
        os.replace(temporary, place.path)
    except BaseException:
        os.unlink(temporary)
        raise


def published(folder: Path) -> bool:
    return (folder / PUBLISHED).is_file()


def publish(draft: Path, path: Path) -> None:
    """Copies a saved program to where replicas load it from: whole under its name, or not at all."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        with open(handle, "wb") as file:
            file.write(draft.read_bytes())
        os.chmod(temporary, 0o444)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def prune(place: Place) -> None:
    """Removes all but the most recently used files of this program, and what killed processes left behind."""
    with contextlib.suppress(FileNotFoundError):  # another process removes files too
        left = [path for path in place.folder.glob(".*.tmp") if path.stat().st_mtime < time.time() - 3600]
        for path in place.others()[KEEP:] + left:
            path.unlink()


def revive(arguments: tuple[Any, ...], saved: Saved) -> Compiled:
    """The saved executable on its devices, for `arguments` as they were declared."""
    content = zlib.decompress(saved.payload)
    out_tree = jax.tree.structure(results_from_json(saved.header["results"]))
    try:
        return load_executable(content, saved.header["devices"], arguments, out_tree)
    except UnknownClass as error:
        raise Unusable(str(error)) from None


def results_to_json(results: Any) -> Any:
    """The structure of what a program returns: 0 for an array, and named tuples by their class."""
    match results:
        case None | 0:
            return results
        case dict():
            return {"dict": [[name, results_to_json(x)] for name, x in results.items()]}
        case list():
            return {"list": [results_to_json(x) for x in results]}
        case tuple():
            name = f"{type(results).__module__}:{type(results).__qualname__}" if type(results) is not tuple else "tuple"
            return {name: [results_to_json(x) for x in results]}
    raise ValueError(f"results must be arrays, dicts, lists and (named) tuples, got {type(results).__name__}.")


def results_from_json(node: Any) -> Any:
    if node is None or node == 0:
        return node
    ((name, parts),) = node.items()
    if name == "dict":
        return {name: results_from_json(x) for name, x in parts}
    values = [results_from_json(x) for x in parts]
    if name == "list":
        return values
    return tuple(values) if name == "tuple" else named_tuple(name)(*values)


def named_tuple(name: str) -> Any:
    """A NamedTuple of a module that is already imported. A file can make nothing be imported or called."""
    module, _, attributes = name.partition(":")
    value: Any = sys.modules.get(module)
    for attribute in attributes.split("."):
        value = getattr(value, attribute, None)
    if not (inspect.isclass(value) and issubclass(value, tuple) and hasattr(value, "_fields")):
        raise Unusable(f"{name} is no named tuple here.")
    return value


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:300]
