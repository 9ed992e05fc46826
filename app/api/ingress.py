"""Routes: HTTP to the protocol, replicas' answers and failures to HTTP. Knows nothing of models, engines or devices."""

import asyncio
import base64
import json
import math
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from app.api.api_keys import Keys
from app.api.auth import Door, count_images
from app.api.errors import ApiError, api_error
from app.api.fields import model as check_model
from app.api.messages import Accepted, Description, ImageRequest, Images, Preview, written
from app.api.protocol import parse_body, parse_query
from app.api.replica_watch import ReplicaWatch
from app.api.retry import RetryTimes
from app.api.settings import Service
from app.api.sse import EventStream
from app.api.stats import broadcast, stats_of_all, total
from app.ray_internals.serve import RAY_SERVE_ENABLE_HA_PROXY
from app.types import InvalidField

# Read and thrown away of a body that is refused: a client that is still sending when the connection closes sees a
# broken pipe and not the answer.
DRAINED_BYTES = 4 << 20
READY_TIMEOUT_S = 5.0  # how long /v1/models and /healthz wait for a replica that may still be warming up
FAILED_RETRY_S = 30.0  # somebody has to deploy again
PATIENCE_S = 0.3  # for a new answer of replicas that are known from an older one
BROADCAST_TIMEOUT_S = 2.0  # for replicas to say what they are or do
CROWDED = ("queue_full", "deadline_unmeetable", "replica_lost")  # refusals that many get at once
ROUTES = {
    "GET /imagine?prompt=...": "one picture, as image/png, image/webp or image/jpeg",
    "POST /v1/images/generations": "pictures as OpenAI's images API returns them",
    "GET /v1/models": "the model, its sizes, samplers, limits and defaults",
    "GET /v1/models/{id}": "the same of the model with this id",
    "GET /v1/stats": "what each replica is doing, and all together",
    "GET /healthz": "200 once a replica answers",
}

Answer = TypeVar("Answer", covariant=True)


class Cancellable(Protocol):
    def cancel(self) -> None: ...


class Pending(Cancellable, Protocol[Answer]):
    """What is used here of Serve's DeploymentResponse."""

    def __await__(self) -> Generator[Any, None, Answer]: ...


class Items(Cancellable, Protocol):
    """What is used here of Serve's DeploymentResponseGenerator."""

    def __aiter__(self) -> AsyncIterator[Accepted | Preview | Images | ApiError]: ...
    async def __anext__(self) -> Accepted | Preview | Images | ApiError: ...


class APIIngress:
    """`replicas` is the DeploymentHandle of StableDiffusion. Keeps what the replicas say of themselves, and when those
    who were refused should come back."""

    def __init__(self, replicas: Any, service: Service, api_keys_file: Path | None = None) -> None:
        if RAY_SERVE_ENABLE_HA_PROXY and api_keys_file is None:  # it listens everywhere, and speaks to us over loopback
            raise ValueError("api_keys_file must be set where RAY_SERVE_ENABLE_HA_PROXY is: it hides who connects.")
        self.replicas = replicas
        self.service = service
        self.keys = None if api_keys_file is None else Keys(api_keys_file)
        if self.keys:
            self.keys.watch()
        self.watch = ReplicaWatch(partial(broadcast, replicas, "describe", BROADCAST_TIMEOUT_S))
        self.retry_times = RetryTimes()
        self.started = int(time.time())

    def __serve_build_asgi_app__(self) -> Starlette:
        """Serve calls this once the replica's constructor has run."""
        imagine = Route("/imagine", self.imagine)
        imagine.methods = {"GET"}  # without Starlette's HEAD, which would make a picture and throw it away
        routes = [
            Route("/", self.index),
            imagine,
            Route("/v1/images/generations", self.generations, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{id:path}", self.model),  # an id may have slashes, and they come decoded
            Route("/v1/stats", self.stats),
            Route("/healthz", self.healthz),
        ]
        handlers = {ApiError: on_refusal, InvalidField: on_refusal, HTTPException: on_http_error, Exception: on_bug}
        door = Middleware(Door, keys=self.keys, refused=refused)
        app = Starlette(routes=routes, exception_handlers=handlers, middleware=[door])
        app.router.redirect_slashes = False
        return app

    async def check_health(self) -> None:
        """Serve calls this on the event loop of the routes: if that is blocked, no answer comes within
        health_check_timeout_s, and three of those in a row make Serve replace this ingress."""

    async def index(self, request: Request) -> Response:
        return json_response({"model": self.services()[0].model, "routes": ROUTES})

    async def imagine(self, request: Request) -> Response:
        asked, _ = await self.parsed(parse_query, request.scope["query_string"])
        images = await self.generate(asked)
        headers = {f"X-{name.replace('_', '-').title()}": written(fact) for name, fact in images.facts.items()}
        spans = [f"{name.removesuffix('_s')};dur={1000 * seconds:.1f}" for name, seconds in images.timings.items()]
        headers |= {"Server-Timing": ", ".join(spans), "Cache-Control": "no-store"}
        return Response(images.encoded[0], media_type=f"image/{asked.encoding.output_format}", headers=headers)

    async def generations(self, request: Request) -> Response:
        body = await read_body(request, self.service.limits.body_bytes, self.service.limits.timeout_s)
        asked, service = await self.parsed(parse_body, body)
        count_images(request.scope, asked.generation.n)
        if asked.stream:
            return await self.stream(asked, service.model)
        images = await self.generate(asked)
        data = [
            {"b64_json": base64.b64encode(encoded).decode(), "seed": seed}
            for encoded, seed in zip(images.encoded, images.seeds, strict=True)
        ]
        answer = {
            "created": int(time.time()),
            "data": data,
            "model": images.model or service.model,
            "output_format": asked.encoding.output_format,
            **images.facts,
            "timings": images.timings,
        }
        return json_response(answer)

    async def models(self, request: Request) -> Response:
        """All that run: two while a rollout replaces one by another."""
        objects = {service.model: self.model_object(service, description) for service, description in await self.run()}
        return json_response({"object": "list", "data": [*objects.values()]})

    async def model(self, request: Request) -> Response:
        asked = request.path_params["id"]
        served = await self.run()
        for service, description in served:
            if service.model == asked:
                return json_response(self.model_object(service, description))
        check_model("model", asked, served[0][0])
        raise AssertionError("check_model refuses what no replica is")

    def model_object(self, service: Service, description: Description) -> dict[str, object]:
        """OpenAI's, with what a request may say beside it."""
        return {
            "id": service.model,
            "object": "model",
            "created": self.started,
            "owned_by": "imagine-tpu",
            "sizes": service.sizes,
            "samplers": description.samplers,
            "limits": service.limits.model_dump(),
            "defaults": service.defaults.model_dump()
            | service.encoding.model_dump()
            | {"sampler": service.defaults.sampler or description.default_sampler, "size": service.sizes[0]},
        }

    async def stats(self, request: Request) -> Response:
        replicas = await stats_of_all(self.replicas, BROADCAST_TIMEOUT_S)
        model = self.services()[0].model
        return json_response({"model": model, "replicas": replicas, "total": total(replicas.values())})

    async def healthz(self, request: Request) -> Response:
        """200 if a replica answers now, or is busy and has answered within the last seconds."""
        (service, _), *_ = await self.run()
        return json_response({"status": "ok", "model": service.model})

    def services(self) -> list[Service]:
        """What requests may say, by the replicas that run; by the config while none is known."""
        return [offered(self.service, description) for description in self.watch.current] or [self.service]

    async def parsed(
        self, parse: Callable[[bytes, Service], ImageRequest], content: bytes
    ) -> tuple[ImageRequest, Service]:
        """A request may name any model that runs."""
        await self.watch.descriptions(0, BROADCAST_TIMEOUT_S)
        services = {service.model: service for service in self.services()}
        for service in services.values():
            try:
                return parse(content, service), service
            except InvalidField as error:
                if error.code != "model_not_found":
                    raise
                refusal = error
        raise refusal

    async def generate(self, asked: ImageRequest) -> Images:
        response: Pending[Images | ApiError] = self.replicas.generate.remote(asked)
        with self.refusals(asked):
            answer = await answer_of(response, asked.timeout_s)
            if isinstance(answer, ApiError):
                raise answer
        self.finished(asked, answer)
        return answer

    async def stream(self, asked: ImageRequest, model: str) -> Response:
        """Begins to answer once the engine has accepted the request: until then a refusal has a status of its own."""
        items: Items = self.replicas.options(stream=True).generate_stream.remote(asked)
        deadline = asyncio.get_running_loop().time() + asked.timeout_s
        with self.refusals(asked):
            accepted = await next_of(items, deadline, asked.timeout_s)
        assert isinstance(accepted, Accepted)

        async def next_image() -> Preview | Images:
            item = await next_of(items, deadline, asked.timeout_s)
            assert not isinstance(item, Accepted)
            if isinstance(item, Images):
                self.finished(asked, item)
            return item

        return EventStream(next_image, items.cancel, asked, model)

    @contextmanager
    def refusals(self, asked: ImageRequest) -> Iterator[None]:
        """Those who should come back are told different times."""
        try:
            yield
        except ApiError as error:
            if error.code not in CROWDED or error.retry_after_s is None:
                raise
            replicas = len(self.watch.current)
            retry_after_s = self.retry_times.retry_after_s(asked.generation, error.retry_after_s, replicas)
            raise ApiError(error.status, error.message, error.param, error.code, retry_after_s) from None

    def finished(self, asked: ImageRequest, images: Images) -> None:
        if "device_s" in images.timings:
            self.retry_times.finished(asked.generation, images.timings["device_s"])

    async def run(self) -> list[tuple[Service, Description]]:
        """What runs, as last heard."""
        if not (descriptions := await self.watch.descriptions(PATIENCE_S, BROADCAST_TIMEOUT_S)):
            descriptions = (await self.describe(),)
        return [(offered(self.service, description), description) for description in descriptions]

    async def describe(self) -> Description:
        """By the way that requests take, where a broadcast has found no replica: it wakes a deployment that has scaled
        to zero, and fails at once if there will be none."""
        response: Pending[Description] = self.replicas.describe.remote()
        try:
            return await answer_of(response, READY_TIMEOUT_S)
        except ApiError as error:
            if error.status != 504:
                raise
            message = "No replica has answered: the model may still be loading."
            raise ApiError(503, message, None, "model_not_ready", READY_TIMEOUT_S) from None


def offered(service: Service, description: Description) -> Service:
    """What a replica can do that says so."""
    return replace(service, model=description.model or service.model, sizes=description.sizes or service.sizes)


async def answer_of(response: Pending[Answer], timeout_s: float) -> Answer:
    """Wait for a replica."""
    with failures(response, timeout_s):
        async with asyncio.timeout(timeout_s):
            return await response


async def next_of(items: Items, deadline: float, timeout_s: float) -> Accepted | Preview | Images:
    """Wait for the next item of its stream."""
    with failures(items, timeout_s):
        async with asyncio.timeout_at(deadline):
            item = await anext(items, None)
    if item is None:  # a replica that is ended may end its stream like this
        raise given_up()
    if isinstance(item, ApiError):
        raise item
    return item


@contextmanager
def failures(response: Cancellable, timeout_s: float) -> Iterator[None]:
    """Ray's, as ApiErrors; and whoever stops waiting also stops the replica's work."""
    try:
        yield
    except RayTaskError:  # before TimeoutError: Ray makes it an instance of what the replica raised, too
        message = "The model failed on this request; the server's log says why, under this X-Request-ID."
        raise ApiError(500, message, None, "internal_error") from None
    except TimeoutError:
        response.cancel()
        raise ApiError(504, f"No picture within {timeout_s:g} s; the request was dropped.", None, "timeout") from None
    except asyncio.CancelledError:
        response.cancel()
        task = asyncio.current_task()
        if task and task.cancelling():  # the client has gone
            raise
        raise given_up() from None
    except BackPressureError as full:
        message = "Every replica's queue is full; try again later."
        raise ApiError(503, message, None, "queue_full", full.retry_after_s or 1.0) from None
    except DeploymentUnavailableError:
        message = "The deployment has failed: no replica runs, and none will start. `make status` says why."
        raise ApiError(503, message, None, "deployment_failed", FAILED_RETRY_S) from None
    except (RayActorError, ReplicaUnavailableError):
        raise ApiError(503, "The replica was lost; try again.", None, "replica_lost", 5.0) from None


def given_up() -> ApiError:
    return ApiError(503, "The replica gave this request up; try again.", None, "replica_lost", 1.0)


async def read_body(request: Request, limit: int, timeout_s: float) -> bytes:
    """The body of a JSON request; no more of it than the limit is kept, and not much more is read."""
    kind, _, parameters = request.headers.get("content-type", "").partition(";")
    charset = parameters.strip().lower()
    if kind.strip().lower() != "application/json" or charset not in ("", "charset=utf-8", 'charset="utf-8"'):
        raise ApiError(415, "The body must have Content-Type: application/json.", None, "unsupported_media_type")
    too_large = ApiError(413, f"The body must be at most {limit} bytes.", None, "payload_too_large")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > limit + DRAINED_BYTES:
        raise too_large
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                size += len(chunk)
                if size > limit + DRAINED_BYTES:
                    raise too_large
                if size <= limit:
                    body += chunk
    except TimeoutError:
        raise ApiError(408, f"The body did not arrive within {timeout_s:g} s.", None, "timeout") from None
    except ClientDisconnect:
        raise ApiError(400, "The body ended early.", None, "invalid_json") from None
    if size > limit:
        raise too_large
    return bytes(body)


async def on_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError | InvalidField)
    return refused(api_error(error))


def refused(error: ApiError) -> Response:
    headers = {} if error.retry_after_s is None else {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return json_response(error.body(), error.status, headers)


async def on_http_error(request: Request, error: Exception) -> Response:
    """What Starlette's router refuses: an unknown path or method."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        allow = ", ".join(sorted((error.headers or {})["Allow"].split(", ")))
        body = ApiError(405, f"{request.method} is not allowed here; use {allow}.", None, "method_not_allowed").body()
        return json_response(body, 405, {"Allow": allow})
    body = ApiError(error.status_code, "There is no such route; GET / lists them.", None, "not_found").body()
    return json_response(body, error.status_code)


async def on_bug(request: Request, error: Exception) -> Response:
    """Starlette raises the error again after this answer, so it reaches the log with its traceback."""
    return json_response(ApiError(500, "The server failed on this request.", None, "internal_error").body(), 500)


def json_response(body: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """ASCII, so that whatever Unicode a client sent can be quoted back to it."""
    return Response(json.dumps(body), status, headers, "application/json")
