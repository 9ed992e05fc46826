"""Ends jobs that are overdue, and deletes what has expired: rows, files, and the space that they took on the disk."""

import asyncio
import json
import logging
import time
from collections.abc import Callable

from app.api.database import Database
from app.api.errors import ApiError
from app.api.files.files import Files
from app.api.jobs.table import fail_overdue, forget_expired

logger = logging.getLogger(f"ray.serve.{__name__}")  # the tree that Serve writes to its files

SWEEP_S = 30.0
FORGOTTEN = 1000  # jobs that are deleted in one transaction


async def sweep_on(database: Database, files: Files, keep_s: float) -> None:
    """Until it is cancelled."""
    while True:
        try:
            if database.exists:
                await sweep(database, files, keep_s)
        except ApiError as error:  # the database does not work now, and its log says why
            logger.warning("Nothing is swept: %s", error.message)
        except Exception:
            logger.exception("Expired files could not be deleted.")
        await asyncio.sleep(SWEEP_S)


async def sweep(database: Database, files: Files, keep_s: float, clock: Callable[[], float] = time.time) -> None:
    now = clock()
    error = ApiError(504, f"The job did not end within {keep_s:g} s.", None, "job_expired").body()["error"]
    await database.write(fail_overdue, json.dumps(error), now, now + keep_s)
    while await database.write(forget_expired, now, FORGOTTEN) == FORGOTTEN:
        pass
    await files.sweep()
    await database.vacuum()
