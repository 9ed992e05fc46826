"""Counts failures of the device's verbs and logs each failure once. Knows nothing of requests."""

import logging
import threading

logger = logging.getLogger(f"ray.serve.{__name__}")  # the tree that Serve writes to its files

MOST_FAILURES = 3  # of one verb in a row before the engine gives up, so that Serve replaces the replica
LOGGED = "logged_by_engine"  # attribute of an exception


class GivenUp(RuntimeError):
    """A verb has failed too often in a row; ends the engine's thread."""


class Failures:
    """Failures in a row of each verb. Both the engine's thread and the fetching thread report to it."""

    def __init__(self) -> None:
        self._in_a_row = dict.fromkeys(("encode", "step", "decode"), 0)
        self._stepped = True  # since pixels could not be read
        self._lock = threading.Lock()

    def succeeded(self, verb: str) -> None:
        self._in_a_row[verb] = 0
        if verb == "step":
            self.stepped()
        self.check()

    def stepped(self) -> None:
        """Steps have ended well. Both threads call it."""
        self._stepped = True

    def failed(self, verb: str) -> None:
        with self._lock:
            self._in_a_row[verb] += 1
        self.check()

    def check(self) -> None:
        """Raises in the engine's thread. A new replica may fare better where a verb always fails."""
        for verb, count in self._in_a_row.items():
            if count >= MOST_FAILURES:
                raise GivenUp(f"{verb} failed {count} times in a row")

    def read(self) -> None:
        """In the fetching thread: decoded pixels have arrived."""
        self._in_a_row["decode"] = 0

    def read_failed(self) -> None:
        """In the fetching thread. A failed step fails all later reads, so only the first read since a step counts."""
        with self._lock:
            if self._stepped:
                self._in_a_row["decode"] += 1
            self._stepped = False


def log_failure(what: str, error: BaseException) -> None:
    """Logs an exception with its traceback, once: a failed step also fails what depends on it, in both threads."""
    if getattr(error, LOGGED, False):
        return
    setattr(error, LOGGED, True)  # a set of logged exceptions would keep alive what their frames hold
    logger.error("%s: %s", what, error, exc_info=error)
