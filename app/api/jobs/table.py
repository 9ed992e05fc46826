"""The table of jobs. Every function runs in a transaction of the caller, and takes the time as an argument.

A job is `queued`, `in_progress`, and at its end `completed`, `failed` or `cancelled`. Who draws it holds a lease
(leases.py), so a job survives whoever drew it.

Jobs wait in the order of start-time fair queueing (Goyal et al. 1996): a job's `turn` is where its owner's one before
it ends, or where the line has got to. So one owner's thousand jobs delay another's one by one job.
"""

import secrets
import sqlite3
from dataclasses import dataclass, fields

ID_BYTES = 18  # of randomness in a job's id
UPLOADS = "npy"  # the format of a job's uploads among its files
UNENDED = "status IN ('queued', 'in_progress')"

SCHEMA = (
    """CREATE TABLE IF NOT EXISTS jobs (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        owner TEXT NOT NULL,
        status TEXT NOT NULL DEFAULT 'queued',
        model TEXT NOT NULL,
        request TEXT NOT NULL,
        images INTEGER NOT NULL,
        work REAL NOT NULL,
        turn REAL NOT NULL,
        idempotency_key TEXT,
        fingerprint TEXT,
        created REAL NOT NULL,
        started REAL,
        ended REAL,
        expires REAL NOT NULL,
        not_before REAL NOT NULL DEFAULT 0,
        lease TEXT,
        lease_until REAL,
        attempts INTEGER NOT NULL DEFAULT 0,
        progress INTEGER NOT NULL DEFAULT 0,
        ready_at REAL,
        result TEXT,
        error TEXT,
        webhook_url TEXT,
        webhook_at REAL,
        webhook_attempts INTEGER NOT NULL DEFAULT 0
    )""",
    "CREATE INDEX IF NOT EXISTS jobs_by_turn ON jobs (status, turn, number)",
    "CREATE INDEX IF NOT EXISTS jobs_that_began ON jobs (turn) WHERE started IS NOT NULL",
    "CREATE INDEX IF NOT EXISTS jobs_by_owner ON jobs (owner, number)",
    "CREATE INDEX IF NOT EXISTS jobs_by_expiry ON jobs (expires)",
    "CREATE INDEX IF NOT EXISTS jobs_by_webhook ON jobs (webhook_at) WHERE webhook_at IS NOT NULL",
    """CREATE UNIQUE INDEX IF NOT EXISTS jobs_by_idempotency_key ON jobs (owner, idempotency_key)
        WHERE idempotency_key IS NOT NULL""",
    f"CREATE INDEX IF NOT EXISTS jobs_to_do ON jobs (owner, number) WHERE {UNENDED}",
)


@dataclass(frozen=True)
class Job:
    """A row. Times are Unix times; `request`, `result` and `error` are JSON."""

    id: str
    owner: str
    status: str
    model: str
    request: str
    images: int
    work: float
    fingerprint: str | None  # of the request's bytes, to compare with another under the same idempotency key
    created: float
    started: float | None
    ended: float | None
    expires: float
    attempts: int
    progress: int  # percent
    ready_at: float | None  # of one in progress: an estimate
    result: str | None
    error: str | None
    webhook_url: str | None
    webhook_attempts: int

    @property
    def has_ended(self) -> bool:
        return self.status not in ("queued", "in_progress")


@dataclass(frozen=True)
class NewJob:
    owner: str
    model: str
    request: str
    images: int
    work: float
    created: float
    expires: float
    idempotency_key: str | None = None
    fingerprint: str | None = None
    webhook_url: str | None = None


@dataclass(frozen=True)
class Line:
    """What is before a job that waits: jobs, and the work that is left of these and of the running ones."""

    position: int
    work: float


COLUMNS = ", ".join(field.name for field in fields(Job))


def new_id() -> str:
    return f"job_{secrets.token_urlsafe(ID_BYTES)}"


def add_job(connection: sqlite3.Connection, id: str, job: NewJob) -> Job:
    last = f"SELECT turn + work FROM jobs WHERE owner = ? AND {UNENDED} ORDER BY number DESC LIMIT 1"
    own = connection.execute(last, (job.owner,)).fetchone()
    (reached,) = connection.execute("SELECT max(turn) FROM jobs WHERE started IS NOT NULL").fetchone()
    if reached is None:
        (reached,) = connection.execute("SELECT min(turn) FROM jobs WHERE status = 'queued'").fetchone()
    turn = max(reached or 0.0, own[0] if own else 0.0)
    values = {"id": id, "turn": turn} | {field.name: getattr(job, field.name) for field in fields(NewJob)}
    statement = f"INSERT INTO jobs ({', '.join(values)}) VALUES ({', '.join('?' * len(values))}) RETURNING {COLUMNS}"
    return Job(*connection.execute(statement, (*values.values(),)).fetchone())


def find_job(connection: sqlite3.Connection, id: str, owner: str) -> Job | None:
    """None for an unknown job and for another owner's alike."""
    row = connection.execute(f"SELECT {COLUMNS} FROM jobs WHERE id = ? AND owner = ?", (id, owner)).fetchone()
    return Job(*row) if row else None


def find_repeated(connection: sqlite3.Connection, owner: str, idempotency_key: str) -> Job | None:
    query = f"SELECT {COLUMNS} FROM jobs WHERE owner = ? AND idempotency_key = ?"
    row = connection.execute(query, (owner, idempotency_key)).fetchone()
    return Job(*row) if row else None


def list_jobs(connection: sqlite3.Connection, owner: str, after: str | None, most: int) -> list[Job]:
    """The newest first, from the one below `after`."""
    query = f"""SELECT {COLUMNS} FROM jobs WHERE owner = ?1
        AND (?2 IS NULL OR number < (SELECT number FROM jobs WHERE id = ?2 AND owner = ?1))
        ORDER BY number DESC LIMIT ?3"""
    return [Job(*row) for row in connection.execute(query, (owner, after, most))]


def any_unended(connection: sqlite3.Connection) -> bool:
    return connection.execute(f"SELECT 1 FROM jobs WHERE {UNENDED} LIMIT 1").fetchone() is not None


def unended(connection: sqlite3.Connection, owner: str) -> tuple[int, int]:
    """How many jobs have not ended: all, and those of an owner."""
    (every,) = connection.execute(f"SELECT count(*) FROM jobs WHERE {UNENDED}").fetchone()
    (own,) = connection.execute(f"SELECT count(*) FROM jobs WHERE {UNENDED} AND owner = ?", (owner,)).fetchone()
    return every, own


def count_unended(connection: sqlite3.Connection) -> dict[str, int]:
    """By status."""
    counts = connection.execute(f"SELECT status, count(*) FROM jobs WHERE {UNENDED} GROUP BY status")
    return {"queued": 0, "in_progress": 0, **{status: count for status, count in counts}}


def line_before(connection: sqlite3.Connection, id: str) -> Line:
    """Of a queued job."""
    query = """SELECT count(*), coalesce(sum(work), 0) FROM jobs
        WHERE status = 'queued' AND (turn, number) < (SELECT turn, number FROM jobs WHERE id = ?)"""
    position, waiting = connection.execute(query, (id,)).fetchone()
    query = "SELECT coalesce(sum(work * (100 - progress)), 0) / 100 FROM jobs WHERE status = 'in_progress'"
    (running,) = connection.execute(query).fetchone()
    return Line(position, waiting + running)


def cancel_job(connection: sqlite3.Connection, id: str, owner: str, now: float, expires: float) -> bool:
    where = f"id = ? AND owner = ? AND {UNENDED}"
    return bool(end_jobs(connection, where, (id, owner), "cancelled", now, expires))


def forget_job(connection: sqlite3.Connection, id: str, owner: str) -> bool:
    """Deletes a job that has ended. Its files are the caller's to expire."""
    where = f"id = ? AND owner = ? AND NOT {UNENDED}"
    return connection.execute(f"DELETE FROM jobs WHERE {where}", (id, owner)).rowcount == 1


def fail_overdue(connection: sqlite3.Connection, error: str, now: float, expires: float) -> list[str]:
    """Ends jobs that nobody could draw in their time. Returns their ids."""
    return end_jobs(connection, f"{UNENDED} AND expires <= ?", (now,), "failed", now, expires, error=error)


def forget_expired(connection: sqlite3.Connection, now: float, most: int) -> int:
    """Deletes jobs whose time after their end is over."""
    query = f"SELECT number FROM jobs WHERE expires <= ? AND NOT {UNENDED} LIMIT ?"
    return connection.execute(f"DELETE FROM jobs WHERE number IN ({query})", (now, most)).rowcount


def end_jobs(
    connection: sqlite3.Connection,
    where: str,
    values: tuple[object, ...],
    status: str,
    now: float,
    expires: float,
    *,
    result: str | None = None,
    error: str | None = None,
) -> list[str]:
    """Ends the jobs of a condition, and has their webhooks delivered. Returns their ids."""
    statement = f"""UPDATE jobs SET status = ?, ended = ?, expires = ?, result = ?, error = ?,
        lease = NULL, lease_until = NULL, webhook_at = CASE WHEN webhook_url IS NULL THEN NULL ELSE ? END
        WHERE {where} RETURNING id"""
    parameters = (status, now, expires, result, error, now, *values)
    return [id for (id,) in connection.execute(statement, parameters).fetchall()]
