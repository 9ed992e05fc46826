"""Compiled programs: declared, compiled once, saved, and loaded at the next start. Knows nothing of what they compute.

A saved program is the executable of `jax.experimental.serialize_executable` in a file of its own: a line of JSON with
all that it depends on, then the bytes. Loading one skips tracing and lowering too, which JAX's persistent cache does
not. Whatever does not fit, be it another version, a changed source file or a damaged byte, is compiled again, and the
log says why.

**Loading one runs what its author wrote.** It is native code, in an envelope that JAX pickled. A checksum finds damage,
not malice, so trust rests on the file system alone: nothing is loaded, or even saved, unless the folder belongs to this
user or to root and nobody else may write to it, and the same holds for each file. Nothing is ever fetched from
elsewhere. Who can write as this user or as root can run code here in any case. Access control lists and what a network
file system makes of owners are not looked at. As a second fence the envelope may name none but the few classes in
`ENVELOPE`, and the structure of arguments and results is never unpickled: the one comes from the declared program, the
other is plain JSON.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import inspect
import io
import json
import logging
import os
import platform
import re
import stat
import sys
import tempfile
import threading
import time
import types
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import serialize_executable
from jax.stages import Compiled, Lowered

logger = logging.getLogger(f"ray.serve.{__name__}")  # the tree that Serve writes to its files

FORMAT = 1
KEEP = 4  # files of a program's name; the longest unused go first
APP = Path(__file__).parent
SOURCES = (*sorted((APP / "models").glob("*.py")), APP / "pipeline.py", APP / "samplers.py")
PACKAGES = ("jax", "jaxlib", "flax", "libtpu")
OPTIONS = (  # of JAX; they change what a function lowers or compiles to
    "jax_default_device",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_disable_most_optimizations",
    "jax_enable_x64",
    "jax_numpy_dtype_promotion",
    "jax_threefry_partitionable",
    "jax_use_shardy_partitioner",
)
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
BACKEND_COMPILE = "/jax/core/compile/backend_compile_duration"
CACHE_HIT = "/jax/compilation_cache/cache_hits"

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


@dataclasses.dataclass(frozen=True)
class Program:
    """A function with the shapes that it is compiled for.

    Once compiled it takes arrays of exactly these shapes and types, from JAX or numpy, on the devices declared (numpy's
    go there by themselves); of Python's scalars only an int for a declared int32, and a float for a float32. Anything
    else is a TypeError or a ValueError and never a compile. Donated arguments are consumed.
    """

    name: str  # unique among the programs of a pipeline
    function: Callable[..., Any]  # pure; a function, or a partial of one
    arguments: tuple[Any, ...]  # pytrees of jax.ShapeDtypeStruct
    donate: tuple[int, ...] = ()
    out_shardings: Any = None

    def __post_init__(self) -> None:
        inner = self.function
        while isinstance(inner, partial):
            inner = inner.func
        if not isinstance(inner, types.FunctionType):  # what else could change without changing a saved program's key?
            raise ValueError(f"{self.name}: function must be a function or a partial of one, got {inner!r}.")

    def lower(self) -> Lowered:
        options = {} if self.out_shardings is None else {"out_shardings": self.out_shardings}
        return jax.jit(self.function, donate_argnums=self.donate, **options).lower(*self.arguments)


def compiled(
    programs: Sequence[Program],
    *,
    folder: Path | None,
    fingerprint: Mapping[str, str],
    workers: int | None = None,
) -> dict[str, Compiled]:
    """Every program by its name, loaded from `folder` or compiled and saved there; one log line each.

    `fingerprint` is what programs depend on beside themselves. No trouble with the folder is more than a warning.
    """
    if len({program.name for program in programs}) < len(programs):
        raise ValueError(f"programs must have names of their own, got {[program.name for program in programs]}.")
    if folder is not None and (refusal := prepare(folder)):
        logger.warning("compiled programs are neither loaded nor saved: %s", refusal)
        folder = None
    seen: dict[int, str] = {}
    places = [Place(folder, key_of(program, fingerprint, seen)) if folder else None for program in programs]
    found: dict[str, Compiled] = {}
    compiling: dict[str, Future[Compiled]] = {}
    with cache_hits() as hits, ThreadPoolExecutor(workers or min(4, os.cpu_count() or 1), "programs") as pool:
        try:
            loading = [pool.submit(load, program, place) for program, place in zip(programs, places, strict=True)]
            for program, place, future in zip(programs, places, loading, strict=True):
                loaded = future.result()
                if not isinstance(loaded, str):
                    found[program.name] = loaded
                    continue
                began = time.perf_counter()
                lowered = program.lower()  # in this thread, whose settings and mesh a pool does not share
                spent = time.perf_counter() - began
                compiling[program.name] = pool.submit(compile_and_save, program, lowered, place, loaded, spent, hits)
            found |= {name: future.result() for name, future in compiling.items()}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {program.name: found[program.name] for program in programs}


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
        """The files of this program, of whatever key."""
        digits = "[0-9a-f]" * 32
        return list(self.folder.glob(f"{self.stem}-{digits}.xla"))


class Saved(NamedTuple):
    header: dict[str, Any]
    payload: bytes


class Unusable(Exception):
    """Why a file cannot be loaded."""


def load(program: Program, place: Place | None) -> Compiled | str:
    """The saved program, or why there is none."""
    if place is None:
        return ""
    began = time.perf_counter()
    try:
        saved = read(place.path)
        if saved.header["key"] != place.key:
            raise Unusable("it is another program.")
        executable = revive(program, saved)
    except FileNotFoundError:
        return explain(place)
    except Unusable as unusable:
        return f"{place.path} was not loaded: {unusable}"
    except Exception as error:  # whatever XLA finds wrong with a file, compiling mends it
        return f"{place.path} was not loaded: {type(error).__name__}: {first_line(error)}"
    with contextlib.suppress(OSError):
        os.utime(place.path)  # used just now, as `prune` sees it
    spent, saving = time.perf_counter() - began, saved.header["seconds"]
    logger.info("loaded %s in %.2f s (compiling took %.1f s)", program.name, spent, saving)
    return executable


def compile_and_save(
    program: Program, lowered: Lowered, place: Place | None, why: str, spent: float, hits: list[int]
) -> Compiled:
    began, thread = time.perf_counter(), threading.get_ident()
    before = hits.count(thread)
    executable = lowered.compile()
    seconds = spent + time.perf_counter() - began
    logger.info("compiled %s in %.1f s%s", program.name, seconds, f": {why}" if why else "")
    if place is None:
        return executable
    try:
        if hits.count(thread) > before:  # it would load, and miss functions when called: seen in JAX 0.10.2 on CPU
            raise ValueError("it came from JAX's own cache, and JAX cannot serialize what was loaded.")
        save(place, executable, seconds)
        prune(place)
    except Exception as error:  # a full disk, a read-only folder, a program that JAX cannot serialize
        reason = f"{type(error).__name__}: {first_line(error)}"
        logger.warning("%s was not saved in %s: %s", program.name, place.folder, reason)
    return executable


@contextlib.contextmanager
def cache_hits() -> Iterator[list[int]]:
    """The threads that find something in JAX's persistent cache, where one is configured, once for each find."""
    hits: list[int] = []

    def listen(event: str, **kwargs: str | int) -> None:
        if event == CACHE_HIT:
            hits.append(threading.get_ident())

    jax.monitoring.register_event_listener(listen)
    try:
        yield hits
    finally:
        jax.monitoring.unregister_event_listener(listen)


# What a program depends on


def fingerprint(devices: Iterable[jax.Device] | None = None) -> dict[str, str]:
    """All but the program itself: versions, devices, flags and sources, each under the name that the log gives it."""
    first, *others = jax.devices() if devices is None else devices
    facts = {package: version(package) for package in PACKAGES}
    facts |= {
        "platform": f"{first.platform} {first.client.platform_version}",
        "device": first.device_kind,
        "devices": f"{1 + len(others)} of {jax.device_count()} in {jax.process_count()} processes",
    }
    if first.platform == "cpu":
        facts["host"] = host()
    facts |= {option: str(getattr(jax.config, option, None)) for option in OPTIONS}
    facts |= {flag: os.environ.get(flag, "") for flag in FLAGS}
    return facts | {f"source {path.relative_to(APP.parent)}": digest(path.read_bytes()) for path in SOURCES}


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def host() -> str:
    """A program for a CPU is compiled for its instructions, and divides its loops among the cores."""
    features = platform.processor()
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
        features = digest(" ".join(sorted(set(re.findall(r"^(?:flags|Features)\s*:.*", text, re.M)))).encode())
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{platform.machine()} {features}, {cores} cores"


def key_of(program: Program, fingerprint: Mapping[str, str], seen: dict[int, str]) -> dict[str, Any]:
    """What a saved program must have been made of; `seen` keeps long descriptions that programs share."""
    return {
        "format": FORMAT,
        "program": program.name,
        "function": describe_function(program.function, seen),
        "arguments": [describe_argument(argument) for argument in program.arguments],
        "donate": list(program.donate),
        "out_shardings": [describe_sharding(x) for x in jax.tree.leaves(program.out_shardings)],
        "fingerprint": dict(fingerprint),
    }


def describe_function(value: Any, seen: dict[int, str]) -> str:
    """A function with the values that it holds on to, which are part of the program as its source is."""
    if isinstance(value, partial):
        held = [*value.args, *(item for pair in sorted(value.keywords.items()) for item in pair)]
        return f"{describe_function(value.func, seen)}({', '.join(describe_function(x, seen) for x in held)})"
    if isinstance(value, types.FunctionType):
        held = [cell.cell_contents for cell in value.__closure__ or ()]
        return f"{value.__module__}.{value.__qualname__}" + "".join(f"[{describe_function(x, seen)}]" for x in held)
    if isinstance(value, jax.sharding.Sharding):
        return describe_sharding(value)
    if id(value) not in seen:
        arrays = [x for x in jax.tree.leaves(value) if isinstance(x, (np.ndarray, jax.Array))]
        # The repr of a Flax graph holds functions with their addresses, which differ from run to run.
        text = re.sub(r" at 0x[0-9a-f]+", "", repr(value)) + "".join(digest(np.asarray(x).tobytes()) for x in arrays)
        seen[id(value)] = shorten(text, type(value).__name__)
    return seen[id(value)]


def describe_argument(argument: Any) -> str:
    leaves = jax.tree_util.tree_flatten_with_path(argument)[0]
    lines = [
        f"{jax.tree_util.keystr(path)} {leaf.dtype}{list(leaf.shape)} {describe_sharding(leaf.sharding)}".strip()
        for path, leaf in leaves
    ]
    return shorten("; ".join(lines), f"{len(leaves)} arrays")


def describe_sharding(sharding: Any) -> str:
    if sharding is None:
        return ""
    mesh = getattr(sharding, "mesh", None)
    return f"{sharding}" + (f" on {[device.id for device in mesh.devices.flat]}" if mesh is not None else "")


def shorten(text: str, what: str) -> str:
    return text if len(text) <= 300 else f"{what} {digest(text.encode())}"


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def explain(place: Place) -> str:
    """Why no file has this key: how it differs from the most similar one of the same program."""
    others = []
    for path in place.others():
        try:
            others.append(differences(read(path).header["key"], place.key))
        except Exception:  # damaged, or of an older format
            continue
    return f"the saved one differs in {min(others, key=len)}" if others else "none was saved"


def differences(saved: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """The facts that differ, with both values where those tell more than a checksum."""
    names = [name for name in here if name != "fingerprint" and saved.get(name) != here[name]]
    theirs, ours = saved["fingerprint"], here["fingerprint"]
    for name in sorted(theirs | ours):
        was, now = theirs.get(name), ours.get(name)
        if was != now:
            names.append(name if name.startswith("source ") else f"{name} ({was!s:.80}, here {now!s:.80})")
    return ", ".join(names)


# Files


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
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        if why := distrust(path, os.fstat(file.fileno())):
            raise Unusable(why)
        line, payload = file.readline(1 << 20), file.read()
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


def checksum_of(header: Mapping[str, Any], payload: bytes) -> str:
    return hashlib.sha256(line_of(header) + payload).hexdigest()


def save(place: Place, executable: Compiled, seconds: float) -> None:
    content, _, out_tree = serialize_executable.serialize(executable)
    runtime: Any = executable.runtime_executable()
    payload = zlib.compress(content, 1)  # a fifth of the size in 15 ms for 3 MB; higher levels save little more
    header = {
        "key": place.key,
        "length": len(payload),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(seconds, 2),
        "devices": [device.id for device in runtime.local_devices()],
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


def prune(place: Place) -> None:
    """Removes what is beyond the last used files of this program, and what a killed process left behind."""
    with contextlib.suppress(FileNotFoundError):  # another process is at it too
        used = sorted(place.others(), key=lambda path: path.stat().st_mtime, reverse=True)
        left = [path for path in place.folder.glob(".*.tmp") if path.stat().st_mtime < time.time() - 3600]
        for path in used[KEEP:] + left:
            path.unlink()


# Executables


class Unpickler(serialize_executable._JaxPjrtUnpickler):
    """JAX's own, for the classes in `ENVELOPE` alone."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ENVELOPE:
            raise Unusable(f"it asks for {module}.{name}, which no saved program needs.")
        return super().find_class(module, name)


def revive(program: Program, saved: Saved) -> Compiled:
    """`serialize_executable.deserialize_and_load` with our unpickler."""
    client = jax.devices()[0].client
    devices = {device.id: device for device in client.devices()}
    content = io.BytesIO(zlib.decompress(saved.payload))
    unpickler: Any = Unpickler
    chosen = tuple(devices[i] for i in saved.header["devices"])
    unloaded, arguments, no_kwargs = unpickler(content, client, chosen).load()
    in_tree: Any = jax.tree.structure((program.arguments, {}))
    out_tree = jax.tree.structure(results_from_json(saved.header["results"]))
    return Compiled(unloaded.load(), [], in_tree.unflatten(arguments), out_tree, no_kwargs=no_kwargs)


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


# After readiness


class CompileWatch:
    """Counts compiles from `ready` to `close`, of anyone in this process; each is logged as an error.

    A program that JAX finds in a persistent cache of its own counts too: whoever asked for it waited for that.
    """

    def __init__(self) -> None:
        self.count = 0
        self._watching = False

    def ready(self) -> None:
        if not self._watching:
            self._watching = True
            jax.monitoring.register_event_duration_secs_listener(self._compiled)

    def close(self) -> None:
        if self._watching:
            self._watching = False
            jax.monitoring.unregister_event_duration_listener(self._compiled)

    def _compiled(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == BACKEND_COMPILE and self._watching:
            self.count += 1
            logger.error(
                "%s was compiled while serving, in %.2f s: its shape is not declared.",
                kwargs.get("fun_name", "a program"),
                duration_secs,
            )
