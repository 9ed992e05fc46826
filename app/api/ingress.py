"""The routes: parses a request, sends it to a replica, and answers. Knows nothing of models, engines or devices."""

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from app.api.api_keys import ApiKey, ApiKeys
from app.api.auth import AuthMiddleware, count_images
from app.api.cors import CorsMiddleware
from app.api.edits import parse_edit
from app.api.error_responses import HANDLERS
from app.api.errors import ApiError
from app.api.fields import model as check_model
from app.api.followed import FollowedJourney
from app.api.jobs.routes import ROUTES as JOB_ROUTES
from app.api.jobs.routes import JobRoutes
from app.api.jobs.service import JobService
from app.api.jobs.share import ConnectedMiddleware
from app.api.journey import StreamedJourney
from app.api.messages import ImageRequest, Images, Preview, Progress
from app.api.openapi import document
from app.api.page_files import PREFIX, page_file, prefers_html
from app.api.parts import answer_of_parts
from app.api.protocol import parse_body, parse_query
from app.api.replicas import BROADCAST_TIMEOUT_S, Replicas
from app.api.request_body import check_json, read_body
from app.api.responses import image_response, images_response, json_response, model_object
from app.api.retry_after import RetryAfter, work
from app.api.running_models import RunningModels, parse_for
from app.api.settings import Service
from app.api.sse import EventStream
from app.api.stats import nodes, stats_of_all, total, with_queue
from app.api.uploads import Uploads
from app.ray_internals.key_value import AUTOSCALING, read
from app.ray_internals.serve import RAY_SERVE_ENABLE_HA_PROXY

JOBS_KEY = ":jobs"  # jobs share the replicas with API keys like one of them; no key has such a name
CROWDED = ("queue_full", "deadline_unmeetable", "replica_lost")  # errors that many clients get at the same time
ROUTES = {
    "GET /": "the model and these routes; to a browser, a page to draw on",
    "GET /imagine?prompt=...": "one image, as image/png, image/webp or image/jpeg",
    "POST /v1/images/generations": "images as OpenAI's images API returns them",
    "POST /v1/images/edits": "the same, of images in the request",
    **JOB_ROUTES,
    "GET /v1/models": "the model, its sizes, samplers, fields, limits and defaults",
    "GET /v1/models/{id}": "the same of the model with this id",
    "GET /v1/stats": "statistics of each replica, and their total",
    "GET /healthz": "200 once a replica answers",
    "GET /openapi.json": "this API in OpenAPI 3.1",
}


class APIIngress:
    """The ingress deployment. `replicas` is the DeploymentHandle of StableDiffusion."""

    def __init__(
        self,
        replicas: Any,
        service: Service,
        api_keys_file: Path | None = None,
        cors_origins: Sequence[str] = (),
        max_waiting: int = 32,
    ) -> None:
        if RAY_SERVE_ENABLE_HA_PROXY and api_keys_file is None:  # HAProxy listens everywhere and connects over loopback
            raise ValueError("api_keys_file must be set where RAY_SERVE_ENABLE_HA_PROXY is: it hides who connects.")
        self.replicas = replicas
        self.service = service
        self.cors_origins = tuple(cors_origins)
        self.api_keys = None if api_keys_file is None else ApiKeys(api_keys_file)
        if self.api_keys:
            self.api_keys.start_refreshing()
        self.routed = Replicas(replicas, max_waiting)
        self.running_models = RunningModels(service, self.routed)
        self.retry_after = RetryAfter()
        self.uploads = Uploads(service.limits, service.image_hosts)
        self.job_service = None
        if service.jobs.database is not None:
            self.job_service = JobService(service.jobs, send=self.journey, serving=self.running_models.serving)
        self.jobs = JobRoutes(self.job_service)
        self.started = int(time.time())

    def __serve_build_asgi_app__(self) -> Starlette:
        """Serve calls this after the constructor."""
        imagine = Route("/imagine", self.imagine)
        imagine.methods = {"GET"}  # without Starlette's HEAD, which would make an image and discard it
        routes = [
            Route("/", self.index),
            imagine,
            Route("/v1/images/generations", self.generations, methods=["POST"]),
            Route("/v1/images/edits", self.edits, methods=["POST"]),
            *self.jobs.routes(),
            Route("/v1/models", self.models),
            Route("/v1/models/{id:path}", self.model),  # an id may have slashes, and they come decoded
            Route("/v1/stats", self.stats),
            Route("/healthz", self.healthz),
            Route("/openapi.json", self.openapi),
            Route(f"{PREFIX}{{name}}", self.page),
        ]
        middleware = [
            Middleware(CorsMiddleware, origins=self.cors_origins),
            Middleware(AuthMiddleware, keys=self.api_keys, cors_origins=self.cors_origins),
        ]
        service = self.job_service
        if service:
            middleware.append(Middleware(ConnectedMiddleware, share=service.share))
        lifespan = (lambda app: service.running()) if service else None
        app = Starlette(routes=routes, exception_handlers=HANDLERS, middleware=middleware, lifespan=lifespan)
        app.router.redirect_slashes = False
        return app

    async def check_health(self) -> None:
        """Serve calls this on the event loop of the routes. A blocked loop does not answer within
        health_check_timeout_s; after three of those in a row Serve replaces this ingress."""

    async def index(self, http_request: Request) -> Response:
        if prefers_html(http_request.headers.get("accept", "")):
            return page_file("index.html", http_request)
        return json_response(
            {"model": self.running_models.services()[0].model, "routes": ROUTES}, headers={"Vary": "Accept"}
        )

    async def page(self, http_request: Request) -> Response:
        return page_file(http_request.path_params["name"], http_request)

    async def imagine(self, http_request: Request) -> Response:
        request, _ = parse_for(await self.running_models.candidates(), parse_query, http_request.scope["query_string"])
        return image_response(await self.generate(request, key_of(http_request)), request)

    async def generations(self, http_request: Request) -> Response:
        limits = self.service.limits
        check_json(http_request)
        body = await read_body(http_request, limits.body_bytes, limits.timeout_s)
        return await self.answer(http_request, *parse_for(await self.running_models.candidates(), parse_body, body))

    async def edits(self, http_request: Request) -> Response:
        async with self.uploads.read(http_request) as body:
            parsed = await self.uploads.in_thread(
                parse_for, await self.running_models.candidates(edits=True), parse_edit, body
            )
        return await self.answer(http_request, *parsed)

    async def answer(self, http_request: Request, request: ImageRequest, service: Service) -> Response:
        """A job, a stream, or the pictures in JSON or behind URLs."""
        count_images(http_request.scope, request.generation.n)
        key = key_of(http_request)
        if self.jobs.takes(http_request, request):
            return await self.jobs.accept(http_request, request, service.model)
        if request.stream:
            return await self.stream(request, key, service.model)
        if request.response_format != "url":
            return images_response(await self.generate(request, key), request, service.model)
        await self.jobs.check_room()
        images = await self.generate(request, key)
        return images_response(images, request, service.model, await self.jobs.urls(http_request, request, images))

    async def models(self, http_request: Request) -> Response:
        """All models that run: two while a rollout replaces one by another."""
        objects = {
            service.model: model_object(service, description, self.started)
            for service, description in await self.running_models.latest()
        }
        return json_response({"object": "list", "data": [*objects.values()]})

    async def model(self, http_request: Request) -> Response:
        name = http_request.path_params["id"]
        running = await self.running_models.latest()
        for service, description in running:
            if name in service.names:
                return json_response(model_object(service, description, self.started))
        check_model("model", name, running[0][0])
        raise AssertionError("check_model refuses a model that does not run")

    async def stats(self, http_request: Request) -> Response:
        replicas = await stats_of_all(self.replicas, BROADCAST_TIMEOUT_S)
        queue = self.routed.dispatch.stats()
        body: dict[str, Any] = {"model": self.running_models.services()[0].model, "replicas": replicas}
        body["total"] = with_queue(total(replicas.values()), queue)
        body |= {"queue": queue, "autoscaling": await asyncio.to_thread(read, AUTOSCALING)}
        return json_response(body | {"jobs": await self.jobs.stats(), "nodes": await nodes()})

    async def healthz(self, http_request: Request) -> Response:
        """200 if a replica answers now, or is busy and has answered within the last seconds."""
        (service, _), *_ = await self.running_models.latest()
        return json_response({"status": "ok", "model": service.model})

    async def openapi(self, http_request: Request) -> Response:
        return json_response(document(self.running_models.services()[0], ROUTES, keys=self.api_keys is not None))

    async def generate(self, request: ImageRequest, key: str | None) -> Images:
        with self.spread_retries(request):
            images = await answer_of_parts(self.routed.parts(request, key), partial(self.routed.send, key=key))
        self.record(request, images)
        return images

    def journey(self, request: ImageRequest) -> StreamedJourney:
        """Of a job, which is not counted as a client that waits."""
        return StreamedJourney(request, partial(self.routed.send_stream, key=JOBS_KEY))

    async def stream(self, request: ImageRequest, key: str | None, model: str) -> Response:
        """Begins the answer once a replica's engine has accepted the request, or where its client wants to know its
        place, once it waits for that. Until then an error can set the status."""
        sent = StreamedJourney(request, partial(self.routed.send_stream, key=key))
        place = partial(self.routed.dispatch.progress, request.generation) if request.progress else lambda: None
        journey = FollowedJourney(sent, place)
        with self.spread_retries(request):
            await journey.admitted()

        async def next_image() -> Progress | Preview | Images:
            item = await journey.next_item()
            if isinstance(item, Images):
                self.record(request, item)
            return item

        return EventStream(next_image, journey.cancel, request, model)

    @contextmanager
    def spread_retries(self, request: ImageRequest) -> Iterator[None]:
        """Gives clients that are refused at the same time different values of Retry-After."""
        try:
            yield
        except ApiError as error:
            if error.code not in CROWDED or error.retry_after_s is None:
                raise
            replicas = len(self.routed.watch.current)
            retry_after_s = self.retry_after.seconds(request.generation, error.retry_after_s, replicas)
            raise ApiError(error.status, error.message, error.param, error.code, retry_after_s) from None

    def record(self, request: ImageRequest, images: Images) -> None:
        if "device_s" in images.timings:
            self.retry_after.finished(request.generation, images.timings["device_s"])
            if self.job_service:
                self.job_service.share.spent(work(request.generation), images.timings["device_s"], job=False)


def key_of(http_request: Request) -> str | None:
    """Whose request it is: keys share the replicas fairly."""
    key: ApiKey | None = http_request.scope["state"]["api_key"]
    return key.entry.name if key else None
