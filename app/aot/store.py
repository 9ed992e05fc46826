"""Saved programs as files: where they are, which are trusted, what is in them.

**Loading one runs what its author wrote.** It is native code, in an envelope that JAX pickled. A checksum finds damage,
not malice, so trust rests on the file system alone: nothing is loaded, or even saved, unless the folder belongs to this
user or to root and nobody else may write to it, and the same holds for each file. Nothing is ever fetched from
elsewhere. Who can write as this user or as root can run code here in any case. Access control lists and what a network
file system makes of owners are not looked at. As a second fence the envelope may name none but the few classes in
`ENVELOPE`, and the structure of arguments and results is never unpickled: the one comes from the declared program, the
other is plain JSON.
"""

import contextlib
import hashlib
import inspect
import io
import json
import os
import re
import stat
import sys
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax
from jax.experimental import serialize_executable
from jax.stages import Compiled

KEEP = 4  # files of a program's name; the longest unused go first
HEADER_BYTES = 1 << 20  # longest first line of a file
PUBLISHED = "published.json"  # where it lies, jobs/compile_ahead.py alone adds files, and none is changed or removed

# All that JAX 0.10 pickles around an executable whose arguments and results are arrays of numbers.
ENVELOPE = {
    ("jax", "P"),
    ("jax._src.core", "ManualAxisType"),
    ("jax._src.core", "MemorySpace"),
    ("jax._src.core", "ShapedArray"),
    ("jax._src.interpreters.pxla", "AllArgsInfo"),
    ("jax._src.interpreters.pxla", "UnloadedMeshExecutable"),
    ("jax._src.layout", "Layout"),
    ("jax._src.linear_util", "DebugInfo"),
    ("jax._src.mesh", "AbstractDevice"),
    ("jax._src.mesh", "AbstractMesh"),
    ("jax._src.mesh", "AxisType"),
    ("jax._src.mesh", "Mesh"),
    ("jax._src.named_sharding", "_unpickle_named_sharding"),
    ("jax._src.sharding_impls", "_unpickle_single_device_sharding"),
    ("jax._src.stages", "ArgInfo"),
    ("jaxlib._jax", "DeviceList"),
    ("ml_dtypes", "bfloat16"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy._core.multiarray", "_reconstruct"),
}


class Place(NamedTuple):
    """Where a program is kept, and what it must have been made of."""

    folder: Path
    key: dict[str, Any]

    @property
    def path(self) -> Path:
        return self.folder / f"{self.stem}-{hashlib.sha256(line_of(self.key)).hexdigest()[:32]}.xla"

    @property
    def stem(self) -> str:
        return re.sub(r"\W+", "-", self.key["program"])

    def others(self) -> list[Path]:
        """The files of this program, of whatever key, the last used first."""
        digits = "[0-9a-f]" * 32
        used = {
            path: status.st_mtime for path in self.folder.glob(f"{self.stem}-{digits}.xla") if (status := seen(path))
        }
        return sorted(used, key=lambda path: used[path], reverse=True)


def seen(path: Path) -> os.stat_result | None:
    with contextlib.suppress(OSError):  # another process may have removed it
        return path.stat()
    return None


class Saved(NamedTuple):
    header: dict[str, Any]
    payload: bytes


class Unusable(Exception):
    """Why a file cannot be loaded."""


def prepare(folder: Path) -> str:
    """Makes the folder if need be; returns why it cannot be used, if so."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if why := distrust(folder, folder.stat()):
            # Safe even if others did write to it: what they wrote is theirs, and is not loaded.
            mend = f"chmod go-w {folder}" if "written" in why else "name another folder, or remove this one"
            return f"{why} To mend it: {mend}."
        return ""
    except OSError as error:
        return f"{first_line(error)}."


def distrust(path: Path, status: os.stat_result) -> str:
    """Why this file or folder might hold what somebody else wrote; empty where it cannot."""
    if status.st_uid not in (0, os.geteuid()):
        return f"{path} belongs to user {status.st_uid}, not to {os.geteuid()} or root."
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{path} may be written to by others (mode {stat.S_IMODE(status.st_mode):o})."
    return ""


def line_of(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def read(path: Path) -> Saved:
    """A file that is whole and that nobody else could have written. Raises FileNotFoundError, or Unusable."""
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
    """Of what a file says that it was made, by its first line alone: whether the rest is whole, only `read` knows.
    Raises FileNotFoundError, Unusable or ValueError."""
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
    payload = zlib.compress(content, 1)  # a fifth of the size in 15 ms for 3 MB; higher levels save little more
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


def devices_of(executable: Compiled) -> Iterable[jax.Device]:
    runtime: Any = executable.runtime_executable()
    if hasattr(runtime, "local_devices"):
        devices: Iterable[jax.Device] = runtime.local_devices()
        return devices
    result: Any = jax.tree.leaves(executable.output_shardings)[0]  # compiled for devices that are elsewhere
    return list(result.mesh.devices.flat)


def published(folder: Path) -> bool:
    return (folder / PUBLISHED).is_file()


def publish(draft: Path, path: Path) -> None:
    """Puts a saved program where others load it from: whole under its name or not at all."""
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
    """Removes what is beyond the last used files of this program, and what a killed process left behind."""
    with contextlib.suppress(FileNotFoundError):  # another process is at it too
        left = [path for path in place.folder.glob(".*.tmp") if path.stat().st_mtime < time.time() - 3600]
        for path in place.others()[KEEP:] + left:
            path.unlink()


class Unpickler(serialize_executable._JaxPjrtUnpickler):
    """JAX's own, for the classes in `ENVELOPE` alone."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ENVELOPE:
            raise Unusable(f"it asks for {module}.{name}, which no saved program needs.")
        return super().find_class(module, name)


def revive(arguments: tuple[Any, ...], saved: Saved) -> Compiled:
    """`serialize_executable.deserialize_and_load` with our unpickler; `arguments` as they were declared."""
    client = jax.devices()[0].client
    devices = {device.id: device for device in client.devices()}
    content = io.BytesIO(zlib.decompress(saved.payload))
    unpickler: Any = Unpickler
    chosen = tuple(devices[i] for i in saved.header["devices"])
    unloaded, infos, no_kwargs = unpickler(content, client, chosen).load()
    in_tree: Any = jax.tree.structure((arguments, {}))
    out_tree = jax.tree.structure(results_from_json(saved.header["results"]))
    return Compiled(unloaded.load(), [], in_tree.unflatten(infos), out_tree, no_kwargs=no_kwargs)


def results_to_json(results: Any) -> Any:
    """The structure of what a program returns: 0 for an array, named tuples by their class."""
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
    """A NamedTuple that is imported already: nothing is imported, or called, because a file says so."""
    module, _, attributes = name.partition(":")
    found: Any = sys.modules.get(module)
    for attribute in attributes.split("."):
        found = getattr(found, attribute, None)
    if not (inspect.isclass(found) and issubclass(found, tuple) and hasattr(found, "_fields")):
        raise Unusable(f"{name} is no named tuple here.")
    return found


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:300]
