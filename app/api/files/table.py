"""The table of files: what each is, whose it is, and when it goes. Every function runs in a transaction of the caller.

A row is written before its file and deleted after it, so whatever dies in between leaves no file without a row.
"""

import secrets
import sqlite3
from collections.abc import Sequence
from typing import NamedTuple

ID_BYTES = 24  # of randomness: nobody guesses the URL of a file

SCHEMA = (
    """CREATE TABLE IF NOT EXISTS files (
        id TEXT PRIMARY KEY,
        owner TEXT NOT NULL,
        format TEXT NOT NULL,
        bytes INTEGER NOT NULL,
        job TEXT,
        created REAL NOT NULL,
        expires REAL NOT NULL
    )""",
    "CREATE INDEX IF NOT EXISTS files_by_expiry ON files (expires)",
    "CREATE INDEX IF NOT EXISTS files_by_job ON files (job) WHERE job IS NOT NULL",
)


class File(NamedTuple):
    """`format` is the ending of its name: png, webp or jpeg of a picture, bin of an upload."""

    id: str
    format: str
    bytes: int
    created: float
    expires: float

    @property
    def name(self) -> str:
        return f"{self.id}.{self.format}"


COLUMNS = ", ".join(File._fields)


def new_files(sizes: Sequence[int], format: str, created: float, expires: float) -> list[File]:
    return [File(secrets.token_urlsafe(ID_BYTES), format, size, created, expires) for size in sizes]


def add_files(connection: sqlite3.Connection, files: Sequence[File], owner: str, job: str | None) -> None:
    rows = [(file.id, owner, file.format, file.bytes, job, file.created, file.expires) for file in files]
    connection.executemany("INSERT INTO files VALUES (?, ?, ?, ?, ?, ?, ?)", rows)


def find_file(connection: sqlite3.Connection, id: str, owner: str, now: float) -> File | None:
    """None for an unknown, an expired and another owner's file alike."""
    query = f"SELECT {COLUMNS} FROM files WHERE id = ? AND owner = ? AND expires > ?"
    row = connection.execute(query, (id, owner, now)).fetchone()
    return None if row is None else File(*row)


def total_bytes(connection: sqlite3.Connection) -> int:
    (total,) = connection.execute("SELECT coalesce(sum(bytes), 0) FROM files").fetchone()
    return int(total)


def keep_until(connection: sqlite3.Connection, ids: Sequence[str], expires: float) -> None:
    connection.executemany("UPDATE files SET expires = ? WHERE id = ?", [(expires, id) for id in ids])


def files_of(connection: sqlite3.Connection, job: str, format: str) -> list[File]:
    """In the order in which they were added."""
    query = f"SELECT {COLUMNS} FROM files WHERE job = ? AND format = ? ORDER BY rowid"
    return [File(*row) for row in connection.execute(query, (job, format))]


def expire_files(connection: sqlite3.Connection, job: str, now: float) -> None:
    connection.execute("UPDATE files SET expires = ? WHERE job = ?", (now, job))


def expired_files(connection: sqlite3.Connection, now: float, most: int) -> list[File]:
    query = f"SELECT {COLUMNS} FROM files WHERE expires <= ? ORDER BY expires LIMIT ?"
    return [File(*row) for row in connection.execute(query, (now, most))]


def forget_files(connection: sqlite3.Connection, ids: Sequence[str]) -> None:
    connection.executemany("DELETE FROM files WHERE id = ?", [(id,) for id in ids])
