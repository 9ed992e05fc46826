"""An executor of one daemon thread. Every failure of a job is logged, and no process waits for the thread at its exit.

Python joins the threads of its own executors when the interpreter exits, so one that hangs on a device would keep the
process alive. Knows nothing of its jobs.
"""

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

logger = logging.getLogger(f"ray.serve.{__name__}")  # the tree that Serve writes to its files

Job = tuple[Future[Any], Callable[..., Any], tuple[Any, ...], dict[str, Any]]


class Worker(Executor):
    """Runs jobs in the order of their submission. An exception reaches the future, and the log."""

    def __init__(self, name: str):
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._closed = False
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> "Future[Any]":
        if self._closed:
            raise RuntimeError(f"the thread {self.thread.name} has been shut down")
        future: Future[Any] = Future()
        self._jobs.put((future, function, arguments, named))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Jobs that were submitted before still run, unless they are cancelled by this call."""
        self._closed = True
        if cancel_futures:
            while not self._jobs.empty():
                if job := self._jobs.get():
                    job[0].cancel()
        self._jobs.put(None)
        if wait:
            self.thread.join()

    def _run(self) -> None:
        while job := self._jobs.get():
            future, function, arguments, named = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = function(*arguments, **named)
            except BaseException as error:  # the next job must still run
                logger.exception("%s failed in the thread %s.", function, self.thread.name)
                future.set_exception(error)
            else:
                future.set_result(result)
            del job, future, function, arguments, named  # they may hold arrays on the device
