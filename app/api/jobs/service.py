"""What the routes do with jobs and files, and the tasks that run for them while the ingress runs. Knows no HTTP."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from app.api.database import Database
from app.api.files import table as file_table
from app.api.files.files import Files
from app.api.files.storage import storage_at
from app.api.files.table import File, expire_files, total_bytes
from app.api.jobs import table
from app.api.jobs.accept import accept
from app.api.jobs.share import Share
from app.api.jobs.sweeper import sweep_on
from app.api.jobs.table import Job, Line, cancel_job, count_unended, find_job, forget_job, line_before, list_jobs
from app.api.jobs.webhooks import Webhooks, post_to_public, read_secret
from app.api.jobs.worker import Journey, Serving, Worker
from app.api.messages import ImageRequest, Images
from app.api.settings import Jobs


class JobService:
    def __init__(
        self,
        settings: Jobs,
        *,
        send: Callable[[ImageRequest], Journey],
        serving: Callable[[], Awaitable[Serving]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Raises ValueError for a URL or a secret that cannot be used. Paths in `settings` are absolute."""
        assert settings.database is not None
        self.settings = settings
        self.clock = clock
        self.database = Database(Path(settings.database), (*table.SCHEMA, *file_table.SCHEMA))
        self.files = Files(
            self.database,
            storage_at(settings.files),
            max_bytes=settings.max_bytes,
            base_url=settings.base_url,
            clock=clock,
        )
        self.share = Share(settings.share)
        self.serving = serving
        self.worker = Worker(self.database, self.files, settings, self.share, send=send, serving=serving, clock=clock)
        self.webhooks: Webhooks | None = None
        if settings.webhook_secret_file is not None:
            secret = read_secret(Path(settings.webhook_secret_file))
            self.webhooks = Webhooks(self.database, secret, post_to_public, clock)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        tasks = [
            asyncio.create_task(self.worker.work()),
            asyncio.create_task(sweep_on(self.database, self.files, self.settings.keep_s)),
        ]
        if self.webhooks:
            tasks.append(asyncio.create_task(self.webhooks.deliver_on()))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.database.close()

    async def accept(self, request: ImageRequest, model: str, owner: str, key: str | None) -> Job:
        job = await accept(
            self.database,
            self.files,
            self.settings,
            request,
            model=model,
            owner=owner,
            key=key,
            now=self.clock(),
        )
        self.worker.awake.set()
        return job

    async def find(self, id: str, owner: str) -> Job | None:
        return await self.database.read(find_job, id, owner)

    async def jobs_of(self, owner: str, after: str | None, most: int) -> list[Job]:
        return await self.database.read(list_jobs, owner, after, most)

    async def cancel(self, id: str, owner: str) -> bool:
        """Whether there was something to cancel. A run stops at its next step."""
        now = self.clock()
        cancelled = await self.database.write(cancel_job, id, owner, now, now + self.settings.keep_s)
        if cancelled:
            self.worker.cancel(id)
        return cancelled

    async def forget(self, id: str, owner: str) -> None:
        """A job that has ended, with its pictures."""
        if await self.database.write(forget_job, id, owner):
            await self.database.write(expire_files, id, self.clock())

    async def line(self, job: Job) -> tuple[Line | None, float | None]:
        """What is before a job, and the seconds until it has ended, as far as anybody can tell."""
        if job.status == "in_progress":
            return None, None if job.ready_at is None else max(0.0, job.ready_at - self.clock())
        if job.status != "queued":
            return None, None
        line = await self.database.read(line_before, job.id)
        return line, self.share.seconds(line.work + job.work, self.worker.replicas)

    async def stats(self) -> dict[str, int]:
        """Jobs that have not ended, of all owners, and the bytes of all files. Creates no database."""
        if not self.database.exists:
            return {"queued": 0, "in_progress": 0, "file_bytes": 0}
        counts = await self.database.read(count_unended)
        return counts | {"file_bytes": await self.database.read(total_bytes)}

    async def save(self, request: ImageRequest, images: Images, owner: str) -> list[File]:
        """The pictures of a connected request, to answer with their URLs."""
        format = request.encoding.output_format
        return await self.files.save(images.encoded, format, owner, self.settings.url_keep_s)
