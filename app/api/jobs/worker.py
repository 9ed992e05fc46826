"""Draws jobs: claims them from the database, sends them to replicas like any request, and keeps their pictures.

Several workers, in processes that start and die at any time, may share a database. Knows nothing of HTTP.
"""

import asyncio
import json
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple, Protocol

from app.api.database import Database
from app.api.errors import ApiError, api_error
from app.api.files.files import Files
from app.api.files.table import files_of
from app.api.jobs.leases import claim, complete, fail, release, renew, report_progress
from app.api.jobs.share import Share
from app.api.jobs.stored_request import load
from app.api.jobs.table import UPLOADS, Job, any_unended
from app.api.messages import Accepted, ImageRequest, Images, Preview, Progress
from app.api.settings import Jobs
from app.types import InvalidField

logger = logging.getLogger(f"ray.serve.{__name__}")  # the tree that Serve writes to its files

POLL_S = 1.0  # between looks at what other processes have changed, and renewals of leases
LEASE_S = 15.0  # without a renewal: longer than any pause of this process but its end
UNFINISHED_S = 600.0  # for which pictures are kept that no job has yet
PROGRESS_S = 1.0  # between two writes of a job's progress
LONGEST_WAIT_S = 60.0  # before a job is tried again
COUNTED = ("replica_lost", "timeout", "internal_error")  # errors after which a run has used up an attempt


class Journey(Protocol):
    """The part of app.api.journey.StreamedJourney that a worker uses."""

    async def next_item(self) -> Accepted | Progress | Preview | Images: ...
    def cancel(self) -> None: ...


class Serving(NamedTuple):
    models: Collection[str]  # that run
    replicas: int


class Run(NamedTuple):
    job: Job
    task: "asyncio.Task[None]"


class Worker:
    """Runs on one event loop. Only `turn` claims jobs."""

    def __init__(
        self,
        database: Database,
        files: Files,
        settings: Jobs,
        share: Share,
        *,
        send: Callable[[ImageRequest], Journey],
        serving: Callable[[], Awaitable[Serving]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.database = database
        self.files = files
        self.settings = settings
        self.share = share
        self.send = send
        self.serving = serving
        self.clock = clock
        self.name = secrets.token_hex(8)
        self.runs: dict[str, Run] = {}
        self.awake = asyncio.Event()
        self.replicas = 1  # that ran at the last look

    async def work(self) -> None:
        """Until it is cancelled."""
        try:
            while True:
                try:
                    await self.turn()
                except ApiError as error:  # the database does not work now, and its log says why
                    logger.warning("Jobs wait: %s", error.message)
                except Exception:
                    logger.exception("A turn of the worker of jobs failed.")
                with suppress(TimeoutError):
                    async with asyncio.timeout(POLL_S):
                        await self.awake.wait()
                self.awake.clear()
        finally:
            await self.let_go()

    async def turn(self) -> None:
        if not self.database.exists:
            return
        await self.keep_leases()
        if await self.database.read(any_unended) and not await self.files.full():
            await self.claim_jobs(await self.serving())

    async def claim_jobs(self, serving: Serving) -> None:
        self.replicas = serving.replicas
        places = self.settings.at_once * serving.replicas
        while sum(run.job.images for run in self.runs.values()) < places and self.share.allows(len(self.runs)):
            now = self.clock()
            job = await self.database.write(claim, self.name, tuple(serving.models), now, now + LEASE_S)
            if job is None:
                return
            task = asyncio.create_task(self.run(job), name=job.id)
            self.runs[job.id] = Run(job, task)
            task.add_done_callback(self.ended)

    def ended(self, task: "asyncio.Task[None]") -> None:
        del self.runs[task.get_name()]
        self.awake.set()
        if not task.cancelled() and (error := task.exception()):  # the database does not work: the lease will end
            logger.error("Job %s is left to its lease: %s", task.get_name(), error)

    async def keep_leases(self) -> None:
        """Stops what was cancelled, or claimed by another since this process was slow."""
        if not self.runs:
            return
        held = await self.database.write(renew, self.name, self.clock() + LEASE_S)
        for run in list(self.runs.values()):
            if held.get(run.job.id) != run.job.attempts:
                run.task.cancel()

    def cancel(self, id: str) -> None:
        """Stops a job's run at once, if it is this worker's."""
        if run := self.runs.get(id):
            run.task.cancel()

    async def let_go(self) -> None:
        """Puts the jobs of a worker that ends back into the line."""
        runs = list(self.runs.values())
        for run in runs:
            run.task.cancel()
        await asyncio.gather(*(run.task for run in runs), return_exceptions=True)
        for run in runs:
            await self.database.write(release, run.job, self.name, 0.0, counted=False)

    async def run(self, job: Job) -> None:
        if job.attempts > self.settings.attempts:  # those who had it died without a word
            await self.fail(job, ApiError(500, "Each run of the job was lost.", None, "attempts_exhausted"))
            return
        try:
            request = await self.request_of(job)
            images = await self.draw(job, request)
            if images.model in ("", job.model):
                await self.keep(job, request, images)
            else:  # a rollout goes on, and the call met the other model
                await self.try_again(job, POLL_S, counted=False)
        except (ApiError, InvalidField) as error:
            await self.failed(job, api_error(error))
        except Exception:
            logger.exception("Job %s failed.", job.id)
            await self.failed(job, ApiError(500, "The server failed on this job.", None, "internal_error"))

    async def request_of(self, job: Job) -> ImageRequest:
        uploads = await self.database.read(files_of, job.id, UPLOADS)
        contents = [await self.files.read(file, range(file.bytes)) for file in uploads]
        request = load(job.request, contents)
        return replace(request, stream=True, progress=True)

    async def draw(self, job: Job, request: ImageRequest) -> Images:
        journey = self.send(request)
        written_at = 0.0
        try:
            while not isinstance(item := await journey.next_item(), Images):
                now = self.clock()
                if isinstance(item, Progress) and now - written_at >= PROGRESS_S:
                    written_at = now
                    percent = min(99, 100 * item.steps // max(1, item.total_steps))
                    await self.database.write(report_progress, job, self.name, percent, now + item.left_s)
        except asyncio.CancelledError:
            journey.cancel()
            raise
        self.share.spent(job.work, item.timings.get("device_s", 0.0), job=True)
        return item

    async def keep(self, job: Job, request: ImageRequest, images: Images) -> None:
        """The files first: a job is completed only once its pictures are on the disk."""
        format = request.encoding.output_format
        pictures = await self.files.save(images.encoded, format, job.owner, UNFINISHED_S, job.id)
        result = {
            "data": [{"file": file.name, "seed": seed} for file, seed in zip(pictures, images.seeds, strict=True)],
            "model": job.model,
            "output_format": format,
            **images.facts,
            "timings": images.timings,
        }
        now = self.clock()
        expires = now + self.settings.keep_s
        if await self.database.write(complete, job, self.name, json.dumps(result), pictures, now, expires):
            logger.info("job %s completed n=%d attempts=%d", job.id, job.images, job.attempts)

    async def failed(self, job: Job, error: ApiError) -> None:
        """Tries again what may go well another time."""
        if error.status < 500:
            await self.fail(job, error)
        elif error.code not in COUNTED:
            await self.try_again(job, error.retry_after_s or POLL_S, counted=False)
        elif job.attempts < self.settings.attempts:
            await self.try_again(job, 2.0 ** min(job.attempts - 1, 6) / 2, counted=True)
        else:
            await self.fail(job, error)

    async def try_again(self, job: Job, wait_s: float, *, counted: bool) -> None:
        not_before = self.clock() + min(wait_s, LONGEST_WAIT_S)
        await self.database.write(release, job, self.name, not_before, counted)

    async def fail(self, job: Job, error: ApiError) -> None:
        now = self.clock()
        content = json.dumps(error.body()["error"])
        if await self.database.write(fail, job, self.name, content, now, now + self.settings.keep_s):
            logger.warning("job %s failed attempts=%d: %s", job.id, job.attempts, error.message)
