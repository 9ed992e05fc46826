"""Who draws which job. Every function runs in a transaction of the caller, and takes the time as an argument.

A worker holds its jobs by its own name and the number of the run. Once another has claimed a job, what an earlier run
brings is refused.
"""

import sqlite3
from collections.abc import Sequence

from app.api.files.table import File, expire_files, keep_until
from app.api.jobs.table import COLUMNS, Job, end_jobs

HELD = "id = ? AND lease = ? AND attempts = ? AND status = 'in_progress'"


def claim(connection: sqlite3.Connection, worker: str, models: Sequence[str], now: float, until: float) -> Job | None:
    """The next job of one of these models that waits, or whose worker is gone. Its `attempts` counts this run."""
    marks = ", ".join("?" * len(models))
    statement = f"""UPDATE jobs SET status = 'in_progress', lease = ?, lease_until = ?, attempts = attempts + 1,
        started = coalesce(started, ?), progress = 0, ready_at = NULL
        WHERE number = (SELECT number FROM jobs WHERE model IN ({marks}) AND expires > ? AND (
            (status = 'queued' AND not_before <= ?) OR (status = 'in_progress' AND lease_until <= ? AND lease != ?))
            ORDER BY turn, number LIMIT 1)
        RETURNING {COLUMNS}"""
    row = connection.execute(statement, (worker, until, now, *models, now, now, now, worker)).fetchone()
    return Job(*row) if row else None


def renew(connection: sqlite3.Connection, worker: str, until: float) -> dict[str, int]:
    """The number of the run of each job that the worker still holds."""
    statement = "UPDATE jobs SET lease_until = ? WHERE lease = ? AND status = 'in_progress' RETURNING id, attempts"
    return {id: attempts for id, attempts in connection.execute(statement, (until, worker)).fetchall()}


def report_progress(connection: sqlite3.Connection, job: Job, worker: str, percent: int, ready_at: float) -> None:
    values = (percent, ready_at, job.id, worker, job.attempts)
    connection.execute(f"UPDATE jobs SET progress = ?, ready_at = ? WHERE {HELD}", values)


def release(connection: sqlite3.Connection, job: Job, worker: str, not_before: float, counted: bool) -> None:
    """Puts a job back in its place of the line. A run that is not `counted` does not use up an attempt."""
    statement = f"""UPDATE jobs SET status = 'queued', lease = NULL, lease_until = NULL, progress = 0,
        not_before = ?, ready_at = NULL, attempts = attempts - ? WHERE {HELD}"""
    connection.execute(statement, (not_before, 0 if counted else 1, job.id, worker, job.attempts))


def complete(
    connection: sqlite3.Connection,
    job: Job,
    worker: str,
    result: str,
    pictures: Sequence[File],
    now: float,
    expires: float,
) -> bool:
    """Keeps the pictures as long as the job, and its uploads no longer. False where the job is not this run's any more:
    cancelled, overdue or claimed by another. Then its pictures go."""
    held = end_jobs(connection, HELD, (job.id, worker, job.attempts), "completed", now, expires, result=result)
    if held:
        expire_files(connection, job.id, now)
    keep_until(connection, [picture.id for picture in pictures], expires if held else now)
    return bool(held)


def fail(connection: sqlite3.Connection, job: Job, worker: str, error: str, now: float, expires: float) -> bool:
    held = end_jobs(connection, HELD, (job.id, worker, job.attempts), "failed", now, expires, error=error)
    if held:
        expire_files(connection, job.id, now)
    return bool(held)
