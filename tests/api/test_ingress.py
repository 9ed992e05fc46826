"""The routes, with Starlette's test client and fake replicas."""

import asyncio
import base64
import json
import logging
import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from ray import serve
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.testclient import TestClient
from starlette.types import Message

from app.api.errors import ApiError
from app.api.ingress import APIIngress
from app.api.messages import Accepted, Description, ImageRequest, Images, Preview, QueueState, Report, SizeCosts
from app.api.replica_calls import answer_of
from app.api.request_body import DRAINED_BYTES
from app.api.retry_after import RetryAfter
from app.api.settings import Defaults, Limits, Service
from app.api.stats import SUMMED
from app.types import Generation

SERVICE = Service(
    "tiny",
    ("128x128", "256x128"),
    Limits(body_bytes=300, query_bytes=300, timeout_s=0.2, images=3),
    Defaults(num_inference_steps=12, guidance_scale=3.5),
)


class Answer:
    """A DeploymentResponse: an outcome, or None for an answer that never comes."""

    def __init__(self, outcome: Any) -> None:
        self.outcome = outcome
        self.cancelled = False

    def __await__(self) -> Generator[Any, None, Any]:
        if self.outcome is None:
            yield from asyncio.Event().wait().__await__()
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome

    def cancel(self) -> None:
        self.cancelled = True


class Method:
    def __init__(self, outcome: Callable[..., Any]) -> None:
        self.outcome = outcome
        self.calls: list[tuple[Any, ...]] | deque[tuple[Any, ...]] = []
        self.answers: list[Answer] = []

    def remote(self, *args: Any) -> Answer:
        self.calls.append(args)
        self.answers.append(Answer(self.outcome(*args)))
        return self.answers[-1]


class Items:
    """A DeploymentResponseGenerator of items, of errors that it raises, and of None for an item that never comes."""

    def __init__(self, items: Iterable[Any]) -> None:
        self.items = iter(items)
        self.cancelled = False

    def __aiter__(self) -> "Items":
        return self

    async def __anext__(self) -> Any:
        try:
            item = next(self.items)
        except StopIteration:
            raise StopAsyncIteration from None
        if item is None:
            await asyncio.Event().wait()
        if isinstance(item, BaseException) and not isinstance(item, ApiError):
            raise item
        return item

    def cancel(self) -> None:
        self.cancelled = True


class StreamMethod:
    def __init__(self) -> None:
        self.outcome: Callable[[ImageRequest], Iterable[Any]] = stream_of
        self.answers: list[Items] = []

    def remote(self, request: ImageRequest) -> Items:
        self.answers.append(Items(self.outcome(request)))
        return self.answers[-1]


DESCRIPTION = Description(
    *(("euler", "pndm"), "pndm", "tiny", ("128x128", "256x128"), ("The nearest is pndm.",)),
    *(4, 0.5, ("target_size",)),
)


class Replicas:
    """A DeploymentHandle. The replicas in `running` answer a broadcast, and None never does. Where there are none, it
    raises Serve's error."""

    def __init__(self) -> None:
        self.generate = Method(pictures)
        self.generate_stream = StreamMethod()
        self.describe = Method(lambda: DESCRIPTION)
        self.report = Method(lambda _: report_of(DESCRIPTION))  # wakes a first replica up
        self.running: list[Description | None] = [DESCRIPTION]
        self.broadcasts = 0
        self.app_name, self.deployment_name = "text-to-image", "StableDiffusion"

    def broadcast(self, method: str, queue: QueueState) -> "Replicas":
        assert method == "report"
        self.broadcasts += 1
        return self

    async def _fetch_replica_results_async(self) -> list[Any]:
        if not self.running:
            raise DeploymentUnavailableError(DeploymentID("StableDiffusion"))
        answers = [description and report_of(description, f"replica-{i}") for i, description in enumerate(self.running)]
        return [SimpleNamespace(get_async=partial(awaited, Answer(answer))) for answer in answers]

    def options(self, *, session_id: str, stream: bool = False) -> "Replicas":
        assert session_id.startswith("replica-")
        return self


def report_of(description: Description, replica: str = "replica-0") -> Report:
    costs = SizeCosts({1: 0.001, 2: 0.001}, {1: 0.0, 2: 0.0}, {1: 0.001})
    return Report(replica, dict.fromkeys(description.sizes or SERVICE.sizes, costs), 0, 0.0, description=description)


async def awaited(answer: Answer) -> Any:
    return await answer


def stream_of(request: ImageRequest) -> Iterator[Any]:
    yield Accepted()
    for index in range(request.partial_images):
        yield Preview(index, f"preview {index}".encode())
    yield pictures(request)


def pictures(request: ImageRequest) -> Images:
    generation, encoding = request.generation, request.encoding
    seeds = tuple(generation.seed + i for i in range(generation.n))
    facts: dict[str, str | int | float] = {
        "seed": generation.seed,
        "sampler": generation.sampler or "pndm",
        "num_inference_steps": generation.num_inference_steps,
        "guidance_scale": generation.guidance_scale,
        "size": f"{generation.width}x{generation.height}",
        "prompt_truncated": len(generation.prompt) > 77,
        "negative_prompt_truncated": False,
    }
    encoded = tuple(f"{encoding.output_format} {seed}".encode() for seed in seeds)
    return Images(encoded, seeds, facts, {"queue_s": 0.5, "denoise_s": 1.25, "device_s": 0.75})


@pytest.fixture
def replicas() -> Replicas:
    return Replicas()


@pytest.fixture
def client(replicas: Replicas) -> Iterator[TestClient]:
    with local_client(APIIngress(replicas, SERVICE)) as client:
        yield client


def local_client(ingress: APIIngress) -> TestClient:
    """A client on this machine, as an API without keys requires."""
    app, address = ingress.__serve_build_asgi_app__(), ("127.0.0.1", 50000)
    return TestClient(app, "http://127.0.0.1", raise_server_exceptions=False, client=address)


def post(client: TestClient, **fields: Any) -> Any:
    return client.post("/v1/images/generations", json=fields)


def test_imagine_answers_a_png_with_the_facts_in_headers(client: TestClient, replicas: Replicas) -> None:
    response = client.get("/imagine", params={"prompt": "a red house", "seed": 7, "size": "256x128"})
    assert (response.status_code, response.content) == (200, b"png 7")
    expected = {
        "content-type": "image/png",
        "x-seed": "7",
        "x-sampler": "pndm",
        "x-num-inference-steps": "12",
        "x-guidance-scale": "3.5",
        "x-size": "256x128",
        "x-prompt-truncated": "false",
        "x-negative-prompt-truncated": "false",
        "cache-control": "no-store",
    }
    assert {name: response.headers[name] for name in expected} == expected
    waited, _, timings = response.headers["server-timing"].partition(", ")
    assert waited.startswith("ingress;dur=") and timings == "queue;dur=500.0, denoise;dur=1250.0, device;dur=750.0"
    generation = Generation("a red house", "", 256, 128, 12, 3.5, 7, None, 1)
    assert replicas.generate.calls == [(ImageRequest(generation, SERVICE.encoding, 0.2),)]


def test_a_random_seed_is_in_the_answer(client: TestClient, replicas: Replicas) -> None:
    first, second = (client.get("/imagine?prompt=a").headers["x-seed"] for _ in range(2))
    assert first != second
    assert [str(request.generation.seed) for (request,) in replicas.generate.calls] == [first, second]


@pytest.mark.parametrize("kind", ["png", "webp", "jpeg"])
def test_output_format_sets_the_content_type(client: TestClient, kind: str) -> None:
    response = client.get(f"/imagine?prompt=a&output_format={kind}")
    assert response.headers["content-type"] == f"image/{kind}"


def test_generations_answers_in_openais_shape_with_the_facts(client: TestClient) -> None:
    response = post(client, prompt="a" * 78, n=2, seed=40, sampler="euler", output_format="webp", guidance_scale=1)
    answer = response.json()
    assert answer.pop("created") > 1.7e9 and 0 <= answer["timings"].pop("ingress_s") < 0.1
    assert answer == {
        "data": [
            {"b64_json": base64.b64encode(b"webp 40").decode(), "seed": 40},
            {"b64_json": base64.b64encode(b"webp 41").decode(), "seed": 41},
        ],
        "model": "tiny",
        "output_format": "webp",
        "seed": 40,
        "sampler": "euler",
        "num_inference_steps": 12,
        "guidance_scale": 1.0,
        "size": "128x128",
        "prompt_truncated": True,
        "negative_prompt_truncated": False,
        "timings": {"queue_s": 0.5, "denoise_s": 1.25, "device_s": 0.75},
    }


def test_models_lists_sizes_samplers_limits_and_defaults_and_asks_once_a_second(
    client: TestClient, replicas: Replicas
) -> None:
    assert client.get("/v1/models").json() == client.get("/v1/models").json()
    assert replicas.broadcasts == 1 and not replicas.describe.calls
    (model,) = client.get("/v1/models").json()["data"]
    assert model.pop("created") > 1.7e9
    assert model == {
        "id": "tiny",
        "object": "model",
        "owned_by": "imagine-tpu",
        "sizes": ["128x128", "256x128"],
        "samplers": ["euler", "pndm"],
        "capabilities": {
            **{"generations": True, "edits": False, "masks": False, "references": 0},
            **{"strength": 0.8, "mask_strength": 1.0},
        },
        "fields": ["target_size"],
        "aliases": [],
        "qualities": {},
        "notes": ["The nearest is pndm."],
        "limits": {
            "images": 3,
            "num_inference_steps": [1, 100],
            "guidance_scale": [1.0, 20.0],
            "prompt_characters": 4000,
            "query_bytes": 300,
            "body_bytes": 300,
            "upload_bytes": 20 << 20,
            "input_images": 4,
            "input_pixels": 25_000_000,
            "partial_images": 3,
            "timeout_s": 0.2,
        },
        "defaults": {
            "num_inference_steps": 12,
            "guidance_scale": 3.5,
            "sampler": "pndm",
            "size": "128x128",
            "output_format": "png",
            "quality": 90,
            "png_level": 6,
        },
    }


@pytest.mark.parametrize("name", ["tiny", "CompVis/stable-diffusion-v1-4"])
def test_a_model_id_may_have_slashes_percent_encoded_or_not(replicas: Replicas, name: str) -> None:
    replicas.running = [replace(DESCRIPTION, model=name)]
    with local_client(APIIngress(replicas, replace(SERVICE, model=name))) as client:
        (listed,) = client.get("/v1/models").json()["data"]
        for path in (name, name.replace("/", "%2F")):
            assert client.get(f"/v1/models/{path}").json() == listed
        for other in ("gpt-image-1", f"{name}/", f"a/{name}", ""):
            response = client.get(f"/v1/models/{other}")
            assert (response.status_code, response.json()) == (404, no_such_model(other, name))


def test_a_model_answers_to_its_aliases_too(replicas: Replicas) -> None:
    with local_client(APIIngress(replicas, replace(SERVICE, aliases=("gpt-image-1", "dall-e-3")))) as client:
        (listed,) = client.get("/v1/models").json()["data"]
        assert listed["id"] == "tiny" and listed["aliases"] == ["gpt-image-1", "dall-e-3"]
        assert client.get("/v1/models/gpt-image-1").json() == listed
        assert post(client, prompt="a", model="dall-e-3").json()["model"] == "tiny"
        assert post(client, prompt="a", model="dall-e-2").status_code == 404


OWN = replace(SERVICE, defaults=Defaults(num_inference_steps=None, guidance_scale=None))


def test_defaults_that_the_config_leaves_open_are_the_checkpoints_within_the_limits(
    replicas: Replicas, caplog: pytest.LogCaptureFixture
) -> None:
    note = "The checkpoint's guidance_scale is 0.5, outside limits.guidance_scale; the default is 1."
    with local_client(APIIngress(replicas, OWN)) as client, caplog.at_level(logging.WARNING, logger="ray.serve"):
        answer = post(client, prompt="a").json()
        (model,) = client.get("/v1/models").json()["data"]
    for numbers in (answer, model["defaults"]):
        assert (numbers["num_inference_steps"], numbers["guidance_scale"]) == (4, 1.0)
    assert model["notes"] == ["The nearest is pndm.", note]
    assert caplog.messages == [note], "once"


def test_a_request_to_which_no_replica_is_known_waits_for_the_checkpoints_defaults(replicas: Replicas) -> None:
    replicas.running = []
    with local_client(APIIngress(replicas, OWN)) as client:
        assert post(client, prompt="a").json()["num_inference_steps"] == 4
        assert post(client, prompt="a", num_inference_steps=7).json()["num_inference_steps"] == 7
        replicas.describe.outcome = lambda: None
        response = post(client, prompt="a")
        assert (response.status_code, response.json()["error"]["code"]) == (503, "model_not_ready")


def no_such_model(other: str, name: str) -> dict[str, Any]:
    message = f'model must be {name}, got "{other}".'
    return {"error": {"message": message, "type": "invalid_request_error", "param": "model", "code": "model_not_found"}}


def test_health_is_from_the_latest_descriptions_and_waits_for_no_request(replicas: Replicas) -> None:
    now = 100.0
    ingress = APIIngress(replicas, SERVICE)
    ingress.routed.watch.clock = lambda: now
    replicas.describe.outcome = lambda: None  # requests wait: the queue is full
    with local_client(ingress) as client:
        assert client.get("/healthz").json() == {"status": "ok", "model": "tiny"}
        replicas.running = [None]  # too busy to answer
        now += 5
        assert client.get("/healthz").status_code == 200
        assert replicas.broadcasts == 2 and not replicas.describe.calls


def test_health_is_bad_at_once_when_no_replica_runs(
    client: TestClient, replicas: Replicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.api.replica_watch.FRESH_S", 0.0)
    assert client.get("/healthz").status_code == 200
    replicas.running = []
    replicas.describe.outcome = lambda: None
    monkeypatch.setattr("app.api.running_models.READY_TIMEOUT_S", 0.01)
    response = client.get("/healthz")
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert response.json()["error"]["code"] == "model_not_ready"
    assert len(replicas.describe.calls) == 1 and replicas.describe.answers[0].cancelled
    replicas.describe.outcome = lambda: DeploymentUnavailableError(DeploymentID("StableDiffusion"))
    error = client.get("/healthz").json()["error"]
    assert error["code"] == "deployment_failed" and "`make status` says why" in error["message"]


def test_old_descriptions_expire(replicas: Replicas, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    ingress = APIIngress(replicas, SERVICE)
    ingress.routed.watch.clock = lambda: now
    monkeypatch.setattr("app.api.running_models.BROADCAST_TIMEOUT_S", 0.01)
    monkeypatch.setattr("app.api.running_models.READY_TIMEOUT_S", 0.01)
    with local_client(ingress) as client:
        assert client.get("/healthz").status_code == 200
        replicas.running, replicas.describe.outcome = [None], lambda: None
        now += 11
        assert client.get("/healthz").json()["error"]["code"] == "model_not_ready"


OTHER = Description(("ddim",), "ddim", "other", ("64x64",))


def test_the_model_and_the_sizes_are_those_of_the_running_replicas(client: TestClient, replicas: Replicas) -> None:
    """As after a failed deployment of another model: the new ingress runs with the old replicas."""
    replicas.running = [OTHER]
    replicas.generate.outcome = lambda request: replace(pictures(request), model="other")
    replicas.generate_stream.outcome = lambda request: [Accepted(), replace(pictures(request), model="other")]
    assert client.get("/healthz").json()["model"] == client.get("/").json()["model"] == "other"
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["sizes"], model["samplers"]) == ("other", ["64x64"], ["ddim"])
    assert client.get("/v1/models/other").json() == model
    assert client.get("/v1/models/tiny").json()["error"]["code"] == "model_not_found"
    answer = post(client, prompt="a", model="other").json()
    assert (answer["model"], answer["size"]) == ("other", "64x64")
    assert '"model": "other"' in post(client, prompt="a", stream=True).text
    assert post(client, prompt="a", model="tiny").json()["error"]["code"] == "model_not_found"
    assert post(client, prompt="a", size="128x128").json()["error"]["param"] == "size"


def test_during_a_rollout_a_request_may_name_either_model_and_the_answer_names_the_one_used(
    client: TestClient, replicas: Replicas
) -> None:
    replicas.running = [OTHER, DESCRIPTION, DESCRIPTION]
    replicas.generate.outcome = lambda request: replace(pictures(request), model="tiny")
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["tiny", "other"]
    assert client.get("/v1/models/other").json()["id"] == "other"
    assert client.get("/").json()["model"] == "tiny", "the more frequent"
    for name in ("tiny", "other"):
        assert post(client, prompt="a", model=name).json()["model"] == "tiny"
    error = post(client, prompt="a", model="third").json()["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "model")


def test_an_old_replica_that_sends_no_model_has_the_configs(client: TestClient, replicas: Replicas) -> None:
    replicas.running = [Description(("euler",), "euler")]
    assert client.get("/healthz").json()["model"] == post(client, prompt="a", model="tiny").json()["model"] == "tiny"


def test_before_any_replica_is_known_the_configs_rules_apply(client: TestClient, replicas: Replicas) -> None:
    replicas.running = []
    assert post(client, prompt="a", model="tiny").status_code == 200
    assert post(client, prompt="a", model="other").status_code == 404


def test_the_retries_of_200_refused_requests_are_spread_over_the_time_of_their_work(replicas: Replicas) -> None:
    now, drawn = 100.0, 0
    ingress = APIIngress(replicas, SERVICE)
    ingress.retry_after = RetryAfter(lambda: now, lambda low, high: low)
    with local_client(ingress) as client:
        assert post(client, prompt="a").status_code == 200  # 0.75 s of a device, as `pictures` says
        refusals = [ApiError(503, "Full.", None, "queue_full", 0.3), BackPressureError(9, 8, 503, 0.3)]
        replicas.generate.outcome = lambda _: refusals[drawn % 2]
        replicas.generate_stream.outcome = lambda _: [refusals[drawn % 2]]
        times = []
        for drawn in range(200):
            response = post(client, prompt="a", stream=drawn % 3 == 0)
            assert (response.status_code, response.json()["error"]["code"]) == (503, "queue_full")
            times.append(int(response.headers["retry-after"]))
    assert times == [math.ceil(0.3 + 0.75 * refused) for refused in range(200)]


def test_serve_asks_the_ingress_for_its_health_on_the_loop_of_its_routes() -> None:
    """Ray calls it there, if it is a coroutine function: tests/on_cluster/test_faults.py blocks the loop of a real
    one."""
    assert asyncio.iscoroutinefunction(serve.ingress()(APIIngress).check_health)


def test_the_index_names_every_route(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.api.ingress.stats_of_all", no_replicas)
    named = client.get("/").json()["routes"]
    for route in named:
        method, _, path = route.partition(" ")
        answer = client.request(method, path.replace("...", "a").replace("{id}", "tiny"))
        assert "There is no such route" not in answer.text


async def no_replicas(replicas: Any, timeout_s: float) -> dict[str, Any]:
    return {}


def test_stats_are_for_each_replica_and_in_total(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    stats = dict.fromkeys(SUMMED, 2) | {"requests": {"completed": 3}}

    async def stats_of_all(replicas: Any, timeout_s: float) -> dict[str, Any]:
        return {"a": stats, "b": stats, "c": {"error": "No answer."}}

    monkeypatch.setattr("app.api.ingress.stats_of_all", stats_of_all)
    answer = client.get("/v1/stats").json()
    assert answer["model"] == "tiny" and answer["replicas"] == {"a": stats, "b": stats, "c": {"error": "No answer."}}
    assert answer["total"] == {
        "replicas": 2,
        **dict.fromkeys(SUMMED, 4),
        "requests": {"completed": 6, "queue_full": 0, "deadline": 0, "cancelled": 0},
    }


@pytest.mark.parametrize("query", ["", "prompt=", "prompt=a&size=1x1", "prompt=a&seed=-1", "prompt=a&foo=1"])
def test_a_bad_query_never_reaches_a_replica(client: TestClient, replicas: Replicas, query: str) -> None:
    response = client.get(f"/imagine?{query}")
    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (400, "invalid_request_error")
    assert error["param"] in ("prompt", "size", "seed", "foo")
    assert not replicas.generate.calls


def test_each_kind_of_error_has_its_status(client: TestClient) -> None:
    json_type = {"content-type": "application/json"}
    route = "/v1/images/generations"
    cases = [
        (client.get(f"/imagine?prompt={'a' * 300}"), 414, "uri_too_long"),
        (client.post(route, content=b"{}"), 415, "unsupported_media_type"),
        (client.post(route, data={"prompt": "a"}), 415, "unsupported_media_type"),
        (
            client.post(route, content=b"{}", headers={"content-type": "application/json; charset=latin-1"}),
            415,
            "unsupported_media_type",
        ),
        (client.post(route, content=b"", headers=json_type), 400, "invalid_json"),
        (client.post(route, content=b"[]", headers=json_type), 400, "invalid_json"),
        (client.post(route, content=b"{" * 250, headers=json_type), 400, "invalid_json"),
        (post(client, prompt="a", model="dall-e-3"), 404, "model_not_found"),
        (post(client, prompt="a", response_format="url"), 400, "invalid_value"),
        (client.get("/v1/images"), 404, "not_found"),
        (client.get("/imagine/?prompt=a"), 404, "not_found"),
    ]
    for response, status, code in cases:
        assert (response.status_code, response.json()["error"]["code"]) == (status, code), response.text
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_a_charset_that_says_utf8_is_accepted(client: TestClient) -> None:
    headers = {"content-type": "application/json; charset=UTF-8"}
    assert client.post("/v1/images/generations", content=b'{"prompt": "a"}', headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("POST", "/imagine", "GET"),
        ("HEAD", "/imagine?prompt=a", "GET"),
        ("GET", "/v1/images/generations", "POST"),
        ("DELETE", "/v1/models", "GET, HEAD"),
        ("PUT", "/healthz", "GET, HEAD"),
    ],
)
def test_a_wrong_method_gets_405_and_the_right_one(
    client: TestClient, replicas: Replicas, method: str, path: str, allow: str
) -> None:
    response = client.request(method, path)
    assert (response.status_code, response.headers["allow"]) == (405, allow)
    if method != "HEAD":
        assert response.json()["error"]["message"] == f"{method} is not allowed here; use {allow}."
    assert not replicas.generate.calls


def test_a_body_of_absurd_declared_length_is_refused_before_it_is_read() -> None:
    async def receive() -> Message:
        raise AssertionError("the body was read")

    status, answer = asyncio.run(raw_post(receive, {"content-length": str(301 + DRAINED_BYTES)}))
    assert (status, answer["error"]["message"]) == (413, "The body must be at most 300 bytes.")


def test_a_body_above_the_limit_is_read_to_its_end_so_that_the_client_sees_the_answer() -> None:
    left = 5

    async def receive() -> Message:
        nonlocal left
        left -= 1
        return {"type": "http.request", "body": b" " * 100, "more_body": left > 0}

    status, answer = asyncio.run(raw_post(receive, {"content-length": "500"}))
    assert (status, answer["error"]["code"], left) == (413, "payload_too_large", 0)


def test_an_endless_body_is_refused_after_a_limit() -> None:
    read = 0

    async def receive() -> Message:
        nonlocal read
        read += 1 << 20
        return {"type": "http.request", "body": bytes(1 << 20), "more_body": True}

    status, answer = asyncio.run(raw_post(receive, {"transfer-encoding": "chunked"}))
    assert (status, answer["error"]["code"], read) == (413, "payload_too_large", DRAINED_BYTES + (1 << 20))


def test_a_body_that_never_ends_times_out() -> None:
    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    status, answer = asyncio.run(raw_post(receive, {}))
    assert (status, answer["error"]["message"]) == (408, "The body did not arrive within 0.2 s.")


def test_a_client_that_disconnects_while_it_sends_is_no_server_error() -> None:
    async def receive() -> Message:
        return {"type": "http.disconnect"}

    status, _ = asyncio.run(raw_post(receive, {"content-length": "-5"}))
    assert status == 400


async def raw_post(
    receive: Callable[[], Any], headers: dict[str, str], ingress: APIIngress | None = None
) -> tuple[int, Any]:
    """One POST over bare ASGI, for bodies that no client library sends."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    headers = {"content-type": "application/json", **headers}
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/images/generations",
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        "server": ("127.0.0.1", 8000),
        "client": ("127.0.0.1", 50000),
    }
    app = (ingress or APIIngress(Replicas(), SERVICE)).__serve_build_asgi_app__()
    await app(scope, receive, send)
    return sent[0]["status"], json.loads(sent[1]["body"])


SECRET = "/root/weights exploded"
FAILURES: list[tuple[Any, int, str, str | None]] = [
    (ApiError(503, "Every place is taken.", None, "queue_full", 2.1), 503, "queue_full", "3"),
    (ApiError(503, "Too late.", "timeout", "deadline_unmeetable", 0.2), 503, "deadline_unmeetable", "1"),
    (ApiError(400, "sampler must be one of euler, got pndm.", "sampler", "invalid_value"), 400, "invalid_value", None),
    (BackPressureError(9, 8, 503, 4.0), 503, "queue_full", "4"),
    (BackPressureError(9, 8), 503, "queue_full", "1"),
    (DeploymentUnavailableError(DeploymentID("StableDiffusion")), 503, "deployment_failed", "30"),
    (ActorDiedError(), 503, "replica_lost", "5"),
    (asyncio.CancelledError(), 503, "replica_lost", "1"),
    (RuntimeError(SECRET), 500, "internal_error", None),
    (None, 504, "timeout", None),
]


@pytest.mark.parametrize(
    ("outcome", "status", "code", "retry_after"), FAILURES, ids=[str(case[2:]) for case in FAILURES]
)
def test_failures_of_replicas_become_statuses_and_show_no_internals(
    replicas: Replicas, outcome: Any, status: int, code: str, retry_after: str | None
) -> None:
    replicas.generate.outcome = lambda *_: outcome
    replicas.generate_stream.outcome = lambda _: [outcome]
    requests: list[Callable[[TestClient], Any]] = [
        lambda client: client.get("/imagine?prompt=a"),
        lambda client: post(client, prompt="a", stream=True),
    ]
    for send in requests:
        ingress = APIIngress(replicas, SERVICE)
        ingress.retry_after = RetryAfter(uniform=lambda low, high: low)
        with local_client(ingress) as client:
            response = send(client)
        assert (response.status_code, response.json()["error"]["code"]) == (status, code)
        assert response.headers.get("retry-after") == retry_after
        assert SECRET not in response.text and "Traceback" not in response.text


@pytest.mark.parametrize("cause", [RuntimeError(SECRET), TimeoutError(SECRET), ValueError(SECRET)])
def test_an_exception_in_the_replica_is_a_500_whatever_its_kind(
    client: TestClient, replicas: Replicas, cause: Exception
) -> None:
    make: Any = RayTaskError  # Ray does not type it
    failure = make("generate", f"Traceback ... {SECRET}", cause, "ray::x", 1, "127.0.0.1")
    replicas.generate.outcome = lambda *_: failure.as_instanceof_cause()
    response = client.get("/imagine?prompt=a")
    assert (response.status_code, response.json()["error"]["type"]) == (500, "server_error")
    assert SECRET not in response.text and "Traceback" not in response.text


def test_a_timeout_stops_the_replicas_work(client: TestClient, replicas: Replicas) -> None:
    replicas.generate.outcome = lambda *_: None
    assert client.get("/imagine?prompt=a").status_code == 504
    assert replicas.generate.answers[0].cancelled


def test_a_requests_own_timeout_is_used_and_sent_to_the_replica(client: TestClient, replicas: Replicas) -> None:
    replicas.generate.outcome = lambda *_: None
    response = client.get("/imagine?prompt=a&timeout=0.05")
    assert response.json()["error"]["message"] == "No picture within 0.05 s; the request was dropped."
    assert replicas.generate.calls[0][0].timeout_s == 0.05


def test_a_client_that_disconnects_stops_the_replicas_work() -> None:
    async def leave() -> Answer:
        answer = Answer(None)
        waiting = asyncio.ensure_future(answer_of(answer, 60))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        return answer

    assert asyncio.run(leave()).cancelled


def test_the_error_can_quote_text_that_has_no_utf8(client: TestClient) -> None:
    body = b'{"prompt": "a", "\\ud800": "\\udfff"}'
    response = client.post("/v1/images/generations", content=body, headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "\ud800")
