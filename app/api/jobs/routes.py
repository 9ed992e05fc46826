"""The routes of jobs and files. Where no database is configured, they say so."""

import re
from collections.abc import Awaitable, Callable, Sequence

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from app.api.auth import owner_of
from app.api.errors import ApiError
from app.api.fields import invalid
from app.api.jobs.accept import idempotency_key, prefers_async
from app.api.jobs.job_object import job_object
from app.api.jobs.service import JobService
from app.api.jobs.states import LISTED, MOST_LISTED
from app.api.jobs.table import Job
from app.api.messages import ImageRequest, Images
from app.api.responses import json_response
from app.types import InvalidField

ROUTES = {
    "GET /v1/jobs": "your jobs, the newest first",
    "GET /v1/jobs/{id}": "a job: its state, its place in the line, its progress and its result",
    "DELETE /v1/jobs/{id}": "cancels a job, or deletes one that has ended, with its pictures",
    "GET /v1/files/{id}": "a picture, until it expires",
}
POLL_S = 1.0  # what Retry-After tells clients that wait for a job


class JobRoutes:
    """`service` is None where the config keeps no jobs."""

    def __init__(self, service: JobService | None) -> None:
        self.service = service

    def routes(self) -> Sequence[Route]:
        return [
            Route("/v1/jobs", self.kept(self.list_jobs)),
            Route("/v1/jobs/{id}", self.kept(self.get_or_delete), methods=["GET", "DELETE"]),
            Route("/v1/files/{id}", self.kept(self.file)),
        ]

    def takes(self, http_request: Request, request: ImageRequest) -> bool:
        """Whether a job answers this request. A preference is passed over where the body rules it out."""
        if request.asynchronous:
            return True
        possible = self.service is not None and not request.stream and request.response_format != "b64_json"
        return possible and prefers_async(http_request)

    async def accept(self, http_request: Request, request: ImageRequest, model: str) -> Response:
        """202 once the job stands on the disk."""
        assert self.service
        owner, key = owner_of(http_request.scope), idempotency_key(http_request)
        job = await self.service.accept(request, model, owner, key)
        root = http_request.scope.get("root_path", "")
        headers = {"Location": f"{root}/v1/jobs/{job.id}", "Retry-After": f"{POLL_S:g}", "Cache-Control": "no-store"}
        if prefers_async(http_request):
            headers["Preference-Applied"] = "respond-async"
        return json_response(await self.shown(http_request, self.service, job), 202, headers)

    async def check_room(self) -> None:
        """Before pictures are drawn that have to be kept."""
        assert self.service
        await self.service.files.check_room()

    async def stats(self) -> dict[str, int] | dict[str, str] | None:
        """A database that does not work hides no other statistics."""
        try:
            return await self.service.stats() if self.service else None
        except ApiError as error:
            return {"error": error.message}

    async def urls(self, http_request: Request, request: ImageRequest, images: Images) -> list[str]:
        """Keeps the pictures, and returns where they are."""
        assert self.service
        files = await self.service.save(request, images, owner_of(http_request.scope))
        return [self.service.files.url(http_request, file.name) for file in files]

    def kept(
        self, route: Callable[[Request, JobService], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        async def checked(http_request: Request) -> Response:
            if self.service is None:
                message = "This service keeps neither jobs nor files: args.jobs.database is null."
                raise ApiError(404, message, None, "not_found")
            return await route(http_request, self.service)

        return checked

    async def list_jobs(self, http_request: Request, service: JobService) -> Response:
        query = http_request.query_params
        for name in query:
            if name not in ("limit", "after"):
                raise InvalidField(name[:60], "The fields are limit and after.", "unknown_parameter")
        limit = query.get("limit", str(LISTED))
        if not re.fullmatch("[0-9]{1,3}", limit) or not 1 <= int(limit) <= MOST_LISTED:
            raise invalid("limit", f"an integer between 1 and {MOST_LISTED}", limit)
        jobs = await service.jobs_of(owner_of(http_request.scope), query.get("after"), int(limit) + 1)
        shown = [await self.shown(http_request, service, job) for job in jobs[: int(limit)]]
        body = {"object": "list", "data": shown, "has_more": len(jobs) > int(limit)}
        return json_response(body, headers={"Cache-Control": "no-store"})

    async def get_or_delete(self, http_request: Request, service: JobService) -> Response:
        return await (self.delete if http_request.method == "DELETE" else self.get)(http_request, service)

    async def get(self, http_request: Request, service: JobService) -> Response:
        job = await self.job(http_request, service)
        headers = {"Cache-Control": "no-store"} | ({} if job.has_ended else {"Retry-After": f"{POLL_S:g}"})
        return json_response(await self.shown(http_request, service, job), headers=headers)

    async def delete(self, http_request: Request, service: JobService) -> Response:
        """A job that has not ended is cancelled, and answered as it is then; one that has ended is deleted."""
        job, owner = await self.job(http_request, service), owner_of(http_request.scope)
        if await service.cancel(job.id, owner):
            return json_response(await self.shown(http_request, service, await self.job(http_request, service)))
        await service.forget(job.id, owner)
        return json_response({"id": job.id, "object": "job", "deleted": True})

    async def file(self, http_request: Request, service: JobService) -> Response:
        return await service.files.respond(http_request)

    async def job(self, http_request: Request, service: JobService) -> Job:
        """The same answer for an unknown job and for another key's."""
        job = await service.find(http_request.path_params["id"], owner_of(http_request.scope))
        if job is None:
            raise ApiError(404, "There is no such job, or it has expired.", None, "not_found")
        return job

    async def shown(self, http_request: Request, service: JobService, job: Job) -> dict[str, object]:
        line, remaining_s = await service.line(job)
        return job_object(job, lambda name: service.files.url(http_request, name), line, remaining_s)
