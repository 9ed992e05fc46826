"""Compiles many programs in worker processes and keeps their costs in files, so that each is compiled once."""

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from app.types import PipelineSpec
from capacity.chips import Host
from capacity.program_cost import ProgramCost
from cluster import ROOT

ATTEMPTS = 2  # a crash may not happen again
WORKERS = 2  # each compiles with more than one thread, and needs 2 to 6 GB for a full-size model, 14 for SDXL on a v4
SPARE_BYTES = 3 << 29  # with less left of the machine's memory, one worker fewer compiles


@dataclass(frozen=True)
class CompileTask:
    spec: PipelineSpec
    host: Host
    program: str
    key: str  # names the file that keeps its cost

    @property
    def label(self) -> str:
        return f"{self.host.accelerator_type}: {self.program}"


@dataclass(frozen=True)
class CompileOutcome:
    """A cost, or why there is none: libtpu's sentence that it does not fit, or another refusal of the compiler."""

    cost: ProgramCost | None = None
    too_large: str = ""
    refused: str = ""
    cached: bool = False


POSTPONED = CompileOutcome()  # it was stopped for want of memory, and will start again
Report = Callable[[CompileTask, CompileOutcome | None], None]  # None: it has started


def compile_all(
    tasks: Sequence[CompileTask], cache: Path, report: Report, alive: Callable[[], None] = lambda: None
) -> dict[CompileTask, CompileOutcome]:
    """Returns an outcome for each task. A worker that crashes counts as a refusal.

    Where memory is short, what began last is stopped, and compiled when what else is compiled has ended. Calls `report`
    from other threads, and `alive` every second while it waits.
    """
    outcomes: dict[CompileTask, CompileOutcome] = {}
    waiting: queue.SimpleQueue[CompileTask] = queue.SimpleQueue()
    for task in tasks:
        if known := load(cache, task):
            outcomes[task] = known
            report(task, known)
        else:
            waiting.put(task)
    failures: list[BaseException] = []

    def work(worker: Worker) -> None:
        try:
            while not failures and not worker.stopped:
                task = waiting.get_nowait()
                report(task, None)
                try:
                    outcomes[task] = worker.compile(task)
                except Stopped:
                    report(task, POSTPONED)
                    waiting.put(task)
                    return
                save(cache, task, outcomes[task])
                report(task, outcomes[task])
        except queue.Empty:
            pass
        except BaseException as error:
            failures.append(error)
        finally:
            worker.end()

    def work_together(count: int) -> None:
        workers = [Worker() for _ in range(min(count, waiting.qsize()))]
        threads = [threading.Thread(target=work, args=(worker,)) for worker in workers]
        try:
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                alive()
                compiling = [worker for worker in workers if worker.began and not worker.stopped]
                if len(compiling) > 1 and psutil.virtual_memory().available < SPARE_BYTES:
                    max(compiling, key=lambda worker: worker.began).stop()
                threads[-1 if threads[-1].is_alive() else 0].join(1.0)
        except BaseException:  # such as Ctrl-C
            for worker in workers:
                worker.stop()
            raise

    work_together(WORKERS)
    while not failures and not waiting.empty():  # stopped when the others had just ended
        work_together(1)
    if failures:
        raise failures[0]
    return {task: outcomes[task] for task in tasks}


class Worker:
    """A process of capacity/compile_worker.py. It is started when it is first needed, and again after a crash."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.stopped = False
        self.starting = threading.Lock()  # so that `stop` never misses a process
        self.began = 0.0  # when it began with what it compiles now; 0 between programs

    def compile(self, task: CompileTask) -> CompileOutcome:
        request = {"spec": asdict(task.spec), "tpu": task.host.accelerator_type, "program": task.program}
        status: int | None = None
        self.began = time.monotonic()
        for _ in range(ATTEMPTS):
            with self.starting:
                if self.stopped:
                    break
                process = self.process = self.process or start()
            assert process.stdin is not None and process.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                print(json.dumps(request), file=process.stdin, flush=True)
            if line := process.stdout.readline():
                self.began = 0.0
                return outcome_of(json.loads(line))  # raises for a bug, with the worker's traceback
            status = self.end()
        self.began = 0.0
        if self.stopped:
            raise Stopped
        return CompileOutcome(refused=f"libtpu ended the process that compiled it, with status {status}.")

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
        """Ends the process at once. May be called from another thread."""
        with self.starting:
            self.stopped = True
            if process := self.process:
                process.kill()


class Stopped(Exception):
    """The worker was stopped while it compiled."""


def start() -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "capacity.compile_worker"]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
    )


def outcome_of(answer: Mapping[str, Any], *, cached: bool = False) -> CompileOutcome:
    if "failed" in answer:
        raise RuntimeError(answer["failed"])
    cost = answer.get("cost")
    if cost:
        cost = ProgramCost(**{**cost, "notes": tuple(cost["notes"])})
    return CompileOutcome(cost, answer.get("too_large", ""), answer.get("refused", ""), cached)


def load(cache: Path, task: CompileTask) -> CompileOutcome | None:
    try:
        return outcome_of(json.loads((cache / f"{task.key}.json").read_text("utf-8")), cached=True)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # missing, cut short, or in an older format
        return None


def save(cache: Path, task: CompileTask, outcome: CompileOutcome) -> None:
    """Keeps an outcome, except a refusal, which is tried again the next time. Errors of the disk are ignored."""
    if outcome.refused:
        return
    content = {"cost": asdict(outcome.cost)} if outcome.cost else {"too_large": outcome.too_large}
    with contextlib.suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=cache, delete=False) as file:  # written whole or not at all
            json.dump(content, file)
        os.replace(file.name, cache / f"{task.key}.json")
