"""Tells a job's owner that it has ended, by the Standard Webhooks scheme (https://www.standardwebhooks.com).

A delivery that fails is repeated with back-off; what is still to deliver stands in the database. Connects only to
public addresses of hosts that the config allows: the address that was checked is the one that is connected to.
"""

import asyncio
import base64
import binascii
import hashlib
import hmac
import json
import logging
import random
import sqlite3
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp

from app.api.database import Database
from app.api.errors import ApiError
from app.api.jobs.table import COLUMNS, Job
from app.api.public_addresses import PublicAddresses

logger = logging.getLogger(f"ray.serve.{__name__}")  # the tree that Serve writes to its files

SECRET_PREFIX = "whsec_"
SECRET_BYTES = (24, 64)  # as the scheme has it
# Seconds before each further try, each with up to a fifth more: the scheme's own example.
BACK_OFF_S = (5.0, 300.0, 1800.0, 7200.0, 18000.0, 36000.0)
TIMEOUT_S = 15.0
DUE_AGAIN_S = 60.0  # after the start of a delivery that neither succeeds nor fails: its process has died
POLL_S = 1.0

Post = Callable[[str, bytes, dict[str, str]], Awaitable[int]]  # URL, body, headers -> status


def claim_delivery(connection: sqlite3.Connection, now: float) -> Job | None:
    """The next that is due. Runs in a transaction of the caller."""
    query = "SELECT number FROM jobs WHERE webhook_at <= ? ORDER BY webhook_at LIMIT 1"
    statement = f"UPDATE jobs SET webhook_at = ? WHERE number = ({query}) RETURNING {COLUMNS}"
    row = connection.execute(statement, (now + DUE_AGAIN_S, now)).fetchone()
    return Job(*row) if row else None


def record_delivery(connection: sqlite3.Connection, id: str, next_at: float | None) -> None:
    statement = "UPDATE jobs SET webhook_at = ?, webhook_attempts = webhook_attempts + 1 WHERE id = ?"
    connection.execute(statement, (next_at, id))


class Webhooks:
    def __init__(
        self,
        database: Database,
        secret: bytes,
        post: Post,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.database = database
        self.secret = secret
        self.post = post
        self.clock = clock

    async def deliver_on(self) -> None:
        """Until it is cancelled."""
        while True:
            try:
                if self.database.exists and await self.deliver_next():
                    continue
            except ApiError as error:  # the database does not work now, and its log says why
                logger.warning("No webhook is delivered: %s", error.message)
            except Exception:
                logger.exception("A webhook could not be delivered.")
            await asyncio.sleep(POLL_S)

    async def deliver_next(self) -> bool:
        """False where nothing is due."""
        job = await self.database.write(claim_delivery, self.clock())
        if job is None:
            return False
        assert job.webhook_url
        body = json.dumps(event(job)).encode()
        headers = {"Content-Type": "application/json", **signed(self.secret, job.id, int(self.clock()), body)}
        try:
            async with asyncio.timeout(TIMEOUT_S):
                status = await self.post(job.webhook_url, body, headers)
            problem = "" if 200 <= status < 300 else f"it answered {status}"
        except (aiohttp.ClientError, OSError, ValueError) as error:  # TimeoutError is an OSError
            problem = f"{type(error).__name__}: {error}"
        next_at = None
        if problem and status_may_change(problem) and job.webhook_attempts < len(BACK_OFF_S):
            next_at = self.clock() + BACK_OFF_S[job.webhook_attempts] * random.uniform(1.0, 1.2)
        await self.database.write(record_delivery, job.id, next_at)
        if problem:
            goes_on = "" if next_at is None else "; another try follows"
            logger.warning("The webhook of job %s was not delivered: %s%s.", job.id, problem, goes_on)
        return True


def status_may_change(problem: str) -> bool:
    """410 says that the receiver wants no more of them."""
    return problem != "it answered 410"


def event(job: Job) -> dict[str, object]:
    """Says which job has ended and how; its pictures are behind GET /v1/jobs/{id}, which needs the owner's key."""
    ended = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(job.ended or 0))
    return {
        "type": f"job.{job.status}",
        "timestamp": ended,
        "data": {"id": job.id, "object": "job", "status": job.status},
    }


def signed(secret: bytes, id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The scheme's headers. `id` stays the same when a delivery is repeated."""
    content = f"{id}.{timestamp}.".encode() + body
    signature = base64.b64encode(hmac.new(secret, content, hashlib.sha256).digest()).decode()
    return {"webhook-id": id, "webhook-timestamp": str(timestamp), "webhook-signature": f"v1,{signature}"}


def read_secret(path: Path) -> bytes:
    """Raises ValueError, which never quotes the file."""
    try:
        text = path.read_text("ascii").strip()
        secret = base64.b64decode(text.removeprefix(SECRET_PREFIX), validate=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from None
    except (UnicodeDecodeError, binascii.Error):
        secret, text = b"", ""
    low, high = SECRET_BYTES
    if not text.startswith(SECRET_PREFIX) or not low <= len(secret) <= high:
        raise ValueError(
            f"{path} must hold {SECRET_PREFIX} and {low} to {high} random bytes in base64, and nothing else."
        )
    if path.stat().st_mode & 0o077:
        raise ValueError(f"{path} must be readable by its owner alone: chmod 600 {path}")
    return secret


async def post_to_public(url: str, body: bytes, headers: dict[str, str]) -> int:
    """Follows no redirect, and reads no answer but its status. Config allows no address in place of a host's name."""
    connector = aiohttp.TCPConnector(resolver=PublicAddresses(), use_dns_cache=False, force_close=True)
    async with (
        aiohttp.ClientSession(connector=connector, trust_env=False) as session,
        session.post(url, data=body, headers=headers, allow_redirects=False) as answer,
    ):
        return answer.status
