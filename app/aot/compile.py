"""Compiles programs once, saves them, and loads them at the next start.

A saved program is the executable of `jax.experimental.serialize_executable` in a file of its own: a line of JSON with
its cache key, then the bytes. Loading one skips tracing and lowering too, which JAX's persistent cache does not.
Whatever does not fit is compiled again, and the log says why: another version, a changed source file, a damaged byte.
app/aot/cache_key.py knows what a program depends on, and app/aot/store.py which files are trusted.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
from jax.stages import Compiled, Lowered

from app.aot.cache_key import differences, key_of
from app.aot.jax_internals import BACKEND_COMPILE, CACHE_HIT
from app.aot.program import Program
from app.aot.store import Place, Unusable, first_line, key_in, prepare, prune, published, read, revive, save

logger = logging.getLogger(f"ray.serve.{__name__}")  # the tree that Serve writes to its files

EXPLAINED = 8  # how many files are compared to say why none of them fits


def compiled(
    programs: Sequence[Program],
    *,
    folder: Path | None,
    fingerprint: Mapping[str, str],
    workers: int | None = None,
) -> dict[str, Compiled]:
    """Every program by its name, loaded from `folder` or compiled and saved there, with a log line for each.

    `fingerprint` is what programs depend on beside themselves. A problem with the folder is one warning at most.
    """
    if len({program.name for program in programs}) < len(programs):
        raise ValueError(f"programs must have names of their own, got {[program.name for program in programs]}.")
    if folder is not None and (refusal := prepare(folder)):
        logger.warning("compiled programs are neither loaded nor saved: %s", refusal)
        folder = None
    seen: dict[int, str] = {}
    places = [Place(folder, key_of(program, fingerprint, seen)) if folder else None for program in programs]
    executables: dict[str, Compiled] = {}
    compiling: dict[str, Future[Compiled]] = {}
    unsaved: dict[str, str] = {}  # programs, and why
    with cache_hits() as hits, ThreadPoolExecutor(workers or min(4, os.cpu_count() or 1), "programs") as pool:
        try:
            loading = [pool.submit(load, program, place) for program, place in zip(programs, places, strict=True)]
            for program, place, future in zip(programs, places, loading, strict=True):
                loaded = future.result()
                if not isinstance(loaded, str):
                    executables[program.name] = loaded
                    continue
                began = time.perf_counter()
                lowered = program.lower()  # in this thread, whose settings and mesh a pool does not share
                spent = time.perf_counter() - began
                compiling[program.name] = pool.submit(
                    compile_and_save, program, lowered, place, loaded, spent, hits, unsaved
                )
            executables |= {name: future.result() for name, future in compiling.items()}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if unsaved:
        (name, why), *others = sorted(unsaved.items())
        names = f"{name} was" if not others else f"{name} and {len(others)} other compiled programs were"
        logger.warning("%s not saved in %s, so the next start compiles again: %s", names, folder, why)
    return {program.name: executables[program.name] for program in programs}


def load(program: Program, place: Place | None) -> Compiled | str:
    """The saved program, or the reason why there is none."""
    if place is None:
        return ""
    began = time.perf_counter()
    try:
        saved = read(place.path)
        if saved.header["key"] != place.key:
            raise Unusable("it is another program.")
        executable = revive(program.arguments, saved)
    except FileNotFoundError:
        return explain(place)
    except Unusable as unusable:
        return f"{place.path} was not loaded: {unusable}"
    except Exception as error:  # whatever is wrong with a file, compiling helps
        return f"{place.path} was not loaded: {type(error).__name__}: {first_line(error)}"
    with contextlib.suppress(OSError):
        os.utime(place.path)  # `prune` keeps the most recently used
    spent, saving = time.perf_counter() - began, saved.header["seconds"]
    logger.info("loaded %s in %.2f s (compiling took %.1f s)", program.name, spent, saving)
    return executable


def compile_and_save(
    program: Program,
    lowered: Lowered,
    place: Place | None,
    why: str,
    spent: float,
    hits: list[int],
    unsaved: dict[str, str],
) -> Compiled:
    began, thread = time.perf_counter(), threading.get_ident()
    before = hits.count(thread)
    executable = program.compile(lowered)
    seconds = spent + time.perf_counter() - began
    logger.info("compiled %s in %.1f s%s", program.name, seconds, f": {why}" if why else "")
    if place is None:
        return executable
    if published(place.folder):
        logger.info("%s was not saved: jobs/compile_ahead.py alone adds to %s.", program.name, place.folder)
        return executable
    try:
        if hits.count(thread) > before:  # it would load, but lack functions when called: seen in JAX 0.10.2 on CPU
            raise ValueError("it came from JAX's own cache, and JAX cannot serialize what was loaded.")
        save(place, executable, seconds)
        prune(place)
    except Exception as error:  # a full disk, a read-only folder, a program that JAX cannot serialize
        unsaved[program.name] = f"{type(error).__name__}: {first_line(error)}"
    return executable


@contextlib.contextmanager
def cache_hits() -> Iterator[list[int]]:
    """The thread of each hit in JAX's persistent cache, where one is configured."""
    hits: list[int] = []

    def listen(event: str, **kwargs: str | int) -> None:
        if event == CACHE_HIT:
            hits.append(threading.get_ident())

    jax.monitoring.register_event_listener(listen)
    try:
        yield hits
    finally:
        jax.monitoring.unregister_event_listener(listen)


def explain(place: Place) -> str:
    """Why no file has this key: how the most similar of the latest files of the same program differs."""
    others = []
    for path in place.others()[:EXPLAINED]:  # a folder that compile_ahead fills is never pruned
        try:
            others.append(differences(key_in(path), place.key))
        except Exception:  # damaged, or of an older format
            continue
    return f"the saved one differs in {min(others, key=len)}" if others else "none was saved"


class CompileWatch:
    """Counts all compiles in this process from `ready` to `close`, and logs each as an error.

    A hit in JAX's persistent cache counts too, because the caller waited for it.
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
