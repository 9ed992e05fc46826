"""Prices many programs: those that were priced before from files, the others by processes side by side."""

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from app.types import PipelineSpec
from capacity.chips import Host
from capacity.price import Price
from cluster import ROOT

ATTEMPTS = 2  # what ends a process once may not do so again
WORKERS = 2  # each compiles with more than one thread, and needs up to 3 GB for a full-size UNet


@dataclass(frozen=True)
class Task:
    served: PipelineSpec
    host: Host
    program: str
    key: str  # of the file that keeps its price

    @property
    def label(self) -> str:
        return f"{self.host.accelerator_type}: {self.program}"


@dataclass(frozen=True)
class Outcome:
    """A price, or why there is none: that it does not fit, with what libtpu says it needs, or another refusal."""

    price: Price | None = None
    too_large: str = ""
    refused: str = ""
    cached: bool = False


Tell = Callable[[Task, Outcome | None], None]  # None: it has begun


def price_all(
    tasks: Sequence[Task], cache: Path, tell: Tell, alive: Callable[[], None] = lambda: None
) -> dict[Task, Outcome]:
    """Calls `tell` from other threads, and `alive` every second while it waits. Crashes of a worker are told as
    refusals."""
    outcomes: dict[Task, Outcome] = {}
    waiting: queue.SimpleQueue[Task] = queue.SimpleQueue()
    for task in tasks:
        if found := load(cache, task):
            outcomes[task] = found
            tell(task, found)
        else:
            waiting.put(task)
    failures: list[BaseException] = []

    def work(worker: Worker) -> None:
        try:
            while not failures and not worker.stopped:
                task = waiting.get_nowait()
                tell(task, None)
                outcomes[task] = worker.price(task)
                save(cache, task, outcomes[task])
                tell(task, outcomes[task])
        except queue.Empty:
            pass
        except BaseException as error:
            failures.append(error)
        finally:
            worker.end()

    workers = [Worker() for _ in range(min(WORKERS, waiting.qsize()))]
    threads = [threading.Thread(target=work, args=(worker,)) for worker in workers]
    try:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            alive()
            threads[-1 if threads[-1].is_alive() else 0].join(1.0)
    except BaseException:  # Ctrl-C, for one
        for worker in workers:
            worker.stop()
        raise
    if failures:
        raise failures[0]
    return {task: outcomes[task] for task in tasks}


class Worker:
    """A process of capacity/worker.py, started when it is first needed, and again after a crash."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.stopped = False

    def price(self, task: Task) -> Outcome:
        asked = {"served": asdict(task.served), "tpu": task.host.accelerator_type, "program": task.program}
        status: int | None = None
        for _ in range(ATTEMPTS):
            if self.stopped:
                raise Stopped
            process = self.process = self.process or start()
            assert process.stdin is not None and process.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                print(json.dumps(asked), file=process.stdin, flush=True)
            if line := process.stdout.readline():
                return outcome(json.loads(line))  # a mistake of ours is raised here, with the worker's traceback
            status = self.end()
        return Outcome(refused=f"libtpu ended the process that compiled it, with status {status}.")

    def end(self) -> int | None:
        process, self.process = self.process, None
        if process is None:
            return None
        for pipe in (process.stdin, process.stdout):
            if pipe:
                with contextlib.suppress(OSError):
                    pipe.close()
        return process.wait()

    def stop(self) -> None:
        """From another thread, whatever it does."""
        self.stopped = True
        if process := self.process:
            process.kill()


class Stopped(Exception):
    """Somebody has stopped the worker."""


def start() -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "capacity.worker"]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
    )


def outcome(said: Mapping[str, Any], *, cached: bool = False) -> Outcome:
    if "failed" in said:
        raise RuntimeError(said["failed"])
    priced = said.get("price")
    if priced:
        priced = Price(**{**priced, "notes": tuple(priced["notes"])})
    return Outcome(priced, said.get("too_large", ""), said.get("refused", ""), cached)


def load(cache: Path, task: Task) -> Outcome | None:
    try:
        return outcome(json.loads((cache / f"{task.key}.json").read_text("utf-8")), cached=True)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # none, cut short, or of an older form
        return None


def save(cache: Path, task: Task, found: Outcome) -> None:
    """What is refused is tried again the next time; a full disk costs only that."""
    if found.refused:
        return
    said = {"price": asdict(found.price)} if found.price else {"too_large": found.too_large}
    with contextlib.suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=cache, delete=False) as file:  # complete, or not there
            json.dump(said, file)
        os.replace(file.name, cache / f"{task.key}.json")
