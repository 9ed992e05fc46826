"""Takes a request as a job: it stands on the disk, with its images, before the client is told so."""

import asyncio
import hashlib
import re
import sqlite3
from dataclasses import replace

from starlette.requests import Request

from app.api.database import Database
from app.api.errors import ApiError
from app.api.files.files import Files
from app.api.files.table import expire_files
from app.api.jobs.stored_request import dump
from app.api.jobs.table import UPLOADS, Job, NewJob, add_job, find_repeated, new_id, unended
from app.api.messages import ImageRequest
from app.api.retry_after import work
from app.api.settings import Jobs

FULL_RETRY_S = 60.0
LONGEST_KEY = 255
RESPOND_ASYNC = re.compile(r'\s*respond-async\s*(=\s*("")?\s*)?(;.*)?', re.IGNORECASE)


def prefers_async(http_request: Request) -> bool:
    """RFC 7240: a preference, which a server may also pass over."""
    preferences = ",".join(http_request.headers.getlist("prefer")).split(",")
    return any(RESPOND_ASYNC.fullmatch(preference) for preference in preferences)


def idempotency_key(http_request: Request) -> str | None:
    """The header of draft-ietf-httpapi-idempotency-key-header, with or without the quotes of a structured field."""
    keys = http_request.headers.getlist("idempotency-key")
    if not keys:
        return None
    match = re.fullmatch(rf'"([!#-\[\]-~ ]{{1,{LONGEST_KEY}}})"|([!#-~]{{1,{LONGEST_KEY}}})', keys[0])
    if len(keys) > 1 or match is None:
        message = f"Idempotency-Key must be one value of 1 to {LONGEST_KEY} printable ASCII characters."
        raise ApiError(400, message, None, "invalid_idempotency_key")
    return match[1] or match[2]


async def accept(
    database: Database,
    files: Files,
    settings: Jobs,
    request: ImageRequest,
    *,
    model: str,
    owner: str,
    key: str | None,
    now: float,
) -> Job:
    """The new job, or the one that this key made before. Raises ApiError where there is no place for it."""
    text, uploads, fingerprint = await asyncio.to_thread(stored, request)
    if key is not None and (job := await database.read(find_repeated, owner, key)):
        return same(job, fingerprint)
    await files.check_room()
    await database.read(check_place, settings, owner)  # before anything is written
    id = new_id()
    if uploads:
        await files.save(uploads, UPLOADS, owner, settings.keep_s, id)
    new = NewJob(
        owner,
        model,
        text,
        images=request.generation.n,
        work=work(request.generation),
        created=now,
        expires=now + settings.keep_s,
        idempotency_key=key,
        fingerprint=fingerprint,
        webhook_url=request.webhook_url,
    )
    job = await database.write(add_or_find, id, new, settings)
    if job.id != id:
        await database.write(expire_files, id, now)
        return same(job, fingerprint)
    return job


def add_or_find(connection: sqlite3.Connection, id: str, job: NewJob, settings: Jobs) -> Job:
    """Two requests with the same key that come together make one job."""
    if job.idempotency_key is not None and (other := find_repeated(connection, job.owner, job.idempotency_key)):
        return other
    check_place(connection, settings, job.owner)
    return add_job(connection, id, job)


def check_place(connection: sqlite3.Connection, settings: Jobs, owner: str) -> None:
    every, own = unended(connection, owner)
    if every >= settings.max_jobs:
        raise ApiError(503, f"{every} jobs wait already; try again later.", None, "queue_full", FULL_RETRY_S)
    if own >= settings.max_jobs_per_key:
        message = f"At most {settings.max_jobs_per_key} of your jobs may wait; try again later."
        raise ApiError(429, message, None, "too_many_jobs", FULL_RETRY_S)


def stored(request: ImageRequest) -> tuple[str, list[bytes], str]:
    """The request, its images, and a fingerprint of what the client asked for, so without a seed that was drawn."""
    text, uploads = dump(replace(request, webhook_url=None))
    generation = request.generation if request.seeded else replace(request.generation, seed=0)
    digest = hashlib.sha256(dump(replace(request, generation=generation))[0].encode())
    for upload in uploads:
        digest.update(hashlib.sha256(upload).digest())
    return text, uploads, digest.hexdigest()


def same(job: Job, fingerprint: str) -> Job:
    if job.fingerprint != fingerprint:
        message = "This Idempotency-Key was used for another request."
        raise ApiError(422, message, None, "idempotency_key_reused")
    return job
