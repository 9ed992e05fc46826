"""One SQLite file, in a thread of its own, for what must outlive this process.

A commit is on the disk before it returns (WAL, synchronous=FULL), so a power failure loses nothing that was answered.
Several processes of one machine may share the file; a network file system cannot hold it. Knows no table.
"""

import asyncio
import logging
import os
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from app.api.errors import ApiError

logger = logging.getLogger(f"ray.serve.{__name__}")  # the tree that Serve writes to its files

VERSION = 1  # of the tables, as `user_version` of the file
BUSY_S = 10.0  # how long a transaction waits for one of another process
RETRY_S = 5.0

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Database:
    """Opens the file at the first transaction, so what is never used is never created."""

    def __init__(self, path: Path, schema: Sequence[str]) -> None:
        self.path = path
        self.schema = schema
        self.connection: sqlite3.Connection | None = None
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="database")

    @property
    def exists(self) -> bool:
        return self.connection is not None or self.path.exists()

    async def read(
        self,
        function: Callable[Concatenate[sqlite3.Connection, Arguments], Result],
        *arguments: Arguments.args,
        **named: Arguments.kwargs,
    ) -> Result:
        """Returns function(connection, *arguments), which sees one state of the file."""
        return await self.in_thread(lambda: self.transaction("BEGIN", function, *arguments, **named))

    async def write(
        self,
        function: Callable[Concatenate[sqlite3.Connection, Arguments], Result],
        *arguments: Arguments.args,
        **named: Arguments.kwargs,
    ) -> Result:
        """The same of a function that changes the file. All of its changes are kept, or none if it raises."""
        return await self.in_thread(lambda: self.transaction("BEGIN IMMEDIATE", function, *arguments, **named))

    async def in_thread(self, work: Callable[[], Result]) -> Result:
        try:
            return await asyncio.get_running_loop().run_in_executor(self.thread, work)
        except (sqlite3.Error, OSError):
            logger.exception("The database %s failed.", self.path)
            message = "The database of jobs does not work; the server's log says why."
            raise ApiError(503, message, None, "database_failed", RETRY_S) from None

    def transaction(
        self,
        begin: str,
        function: Callable[Concatenate[sqlite3.Connection, Arguments], Result],
        *arguments: Arguments.args,
        **named: Arguments.kwargs,
    ) -> Result:
        if self.connection is None:
            self.connection = connect(self.path, self.schema)
        self.connection.execute(begin)
        try:
            result = function(self.connection, *arguments, **named)
            self.connection.execute("COMMIT")
        except BaseException:
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK")
            raise
        return result

    async def vacuum(self) -> None:
        """Gives the pages of deleted rows, and the log of old commits, back to the disk."""
        await self.in_thread(self.give_back)

    def give_back(self) -> None:
        if self.connection is not None:
            self.connection.execute("PRAGMA incremental_vacuum").fetchall()
            self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def close(self) -> None:
        self.thread.submit(self.disconnect)
        self.thread.shutdown()

    def disconnect(self) -> None:
        if self.connection is not None:
            self.connection.close()
            self.connection = None


def connect(path: Path, schema: Sequence[str]) -> sqlite3.Connection:
    """Creates a file that only this user can read: it has prompts in it."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    connection = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
    connection.row_factory = sqlite3.Row
    for pragma in ("auto_vacuum=INCREMENTAL", "journal_mode=WAL", "synchronous=FULL"):  # the first before any table
        connection.execute(f"PRAGMA {pragma}").fetchall()
    connection.execute("BEGIN IMMEDIATE")
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version not in (0, VERSION):
        connection.close()
        raise sqlite3.DatabaseError(f"{path} has tables of version {version}, and this program those of {VERSION}.")
    for statement in schema:
        connection.execute(statement)
    connection.execute(f"PRAGMA user_version={VERSION}")
    connection.execute("COMMIT")
    return connection
