"""The executor of one daemon thread."""

import logging
import subprocess
import sys
import threading
from concurrent.futures import Future

import pytest

from app.engine.worker import Worker

WAIT_S = 60.0


def test_jobs_run_in_order_in_one_daemon_thread() -> None:
    worker, seen = Worker("first"), list[tuple[int, str, bool]]()

    def job(number: int) -> int:
        thread = threading.current_thread()
        seen.append((number, thread.name, thread.daemon))
        return 2 * number

    futures = [worker.submit(job, number) for number in range(5)]
    assert [future.result(WAIT_S) for future in futures] == [0, 2, 4, 6, 8]
    assert seen == [(number, "first", True) for number in range(5)]
    worker.shutdown()


@pytest.mark.parametrize("kind", [ValueError, SystemExit])
def test_what_a_job_raises_is_logged_and_the_next_one_runs(
    kind: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    worker = Worker("first")

    def fail() -> None:
        raise kind("no")

    future: Future[None] = worker.submit(fail)
    assert isinstance(future.exception(WAIT_S), kind)
    assert worker.submit(int, "7").result(WAIT_S) == 7
    (record,) = caplog.records
    assert record.name.startswith("ray.serve.") and record.levelno == logging.ERROR
    assert record.exc_info and record.exc_info[0] is kind
    worker.shutdown()


def test_after_its_end_it_takes_nothing_and_what_it_had_is_done_or_cancelled() -> None:
    worker, gate, begun = Worker("first"), threading.Event(), threading.Event()

    def job() -> bool:
        begun.set()
        return gate.wait(WAIT_S)

    running, waiting = worker.submit(job), worker.submit(int, "7")
    assert begun.wait(WAIT_S)
    worker.shutdown(wait=False)
    with pytest.raises(RuntimeError, match="the thread first has been shut down"):
        worker.submit(int, "8")
    gate.set()
    assert running.result(WAIT_S) and waiting.result(WAIT_S) == 7
    cancelled = Worker("second")
    gate.clear()
    begun.clear()
    running, waiting = cancelled.submit(job), cancelled.submit(int, "7")
    assert begun.wait(WAIT_S)
    cancelled.shutdown(wait=False, cancel_futures=True)
    gate.set()
    assert running.result(WAIT_S) and waiting.cancelled()


def test_a_process_exits_although_a_job_hangs() -> None:
    script = "import threading\nfrom app.engine.worker import Worker\n"
    script += "Worker('x').submit(threading.Event().wait); print('end')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=WAIT_S)
    assert (done.returncode, done.stdout) == (0, "end\n"), done.stderr
