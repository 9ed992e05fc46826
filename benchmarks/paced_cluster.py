"""An application whose replicas keep a TPU host's time instead of computing, behind the real replica, engine and HTTP.

`python -m benchmarks.cluster` deploys it twice: with the ingress's queue, book and router, and as Serve itself routes.
"""

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import psutil
from ray import serve
from ray.serve import Application

from app.api.ingress import APIIngress
from app.api.journey import Unary
from app.api.messages import ImageRequest
from app.api.replica_calls import Items
from app.api.replicas import Replicas
from app.api.running_models import RunningModels
from app.api.settings import Defaults, Encoding, Limits, Service
from app.serving.replica import StableDiffusion
from app.types import Capabilities, Generation, RequestDefaults
from benchmarks.paced import Pace, PacedPipeline

SIZE = (8, 8)
BUCKETS = (1, 2, 4, 8)
STEPS = (1, 100)
MOST_WAITING = 10_000
Scaling = int | dict[str, Any]  # how many replicas, or Serve's autoscaling_config


@dataclass(frozen=True)
class PacedSpec:
    """In the place of a PipelineSpec."""

    pace: Pace


class ServedPipeline(PacedPipeline):
    """What the replica asks of a pipeline beside the verbs."""

    samplers = ("ddim",)
    notes: tuple[str, ...] = ()
    request_fields: tuple[str, ...] = ()
    request_defaults = RequestDefaults(20, 1.0)
    capabilities = Capabilities()

    @classmethod
    def load(cls, spec: PacedSpec) -> "ServedPipeline":
        return cls(spec.pace, batch_buckets=BUCKETS, size=SIZE)

    def warmup(self) -> None:
        pass

    def check(self, generation: Generation) -> Generation:
        return generation


class NoCompiles:
    count = 0

    def ready(self) -> None:
        pass

    def close(self) -> None:
        pass


class PacedReplica(StableDiffusion):
    """The real replica. Two modules that import JAX are replaced, as there is nothing to compile.

    It is up after `start_s`, as a node and a model would be, if it takes no longer by itself.
    """

    def __init__(self, spec: PacedSpec, start_s: float, **settings: Any) -> None:
        replaced: Mapping[str, Any] = {
            "app.diffusion.pipeline": SimpleNamespace(Pipeline=ServedPipeline),
            "app.aot.compile": SimpleNamespace(CompileWatch=NoCompiles),
        }
        sys.modules.update(replaced)
        super().__init__(spec, **settings)  # type: ignore[arg-type]
        time.sleep(max(0.0, start_s + psutil.Process().create_time() - time.time()))

    async def stats(self) -> dict[str, Any]:
        name = serve.get_replica_context().replica_tag
        return {"replica": name, "compiles_after_ready": 0, **self.engine.stats()}


class ServeRouted(Replicas):
    """Sends at once, as Serve's own router chooses: requests wait in the replicas."""

    def parts(self, request: ImageRequest, key: str | None) -> list[ImageRequest]:
        return [request]

    async def send(self, request: ImageRequest, key: str | None = None) -> Unary:
        response: Unary = self.handle.generate.remote(request)
        return response

    async def send_stream(self, request: ImageRequest, key: str | None = None) -> Items:
        items: Items = self.handle.options(stream=True).generate_stream.remote(request)
        return items


class ServeRoutedIngress(APIIngress):
    def __init__(self, replicas: Any, service: Service, **settings: Any) -> None:
        super().__init__(replicas, service, **settings)
        self.routed = ServeRouted(replicas, MOST_WAITING)
        self.running_models = RunningModels(service, self.routed)


def application(
    pace: Pace, replicas: Scaling, *, routed: bool, api_keys_file: Any = None, start_s: float = 0.0
) -> Application:
    """With `routed`, the ingress chooses the replicas."""
    service = Service(
        "paced",
        (f"{SIZE[0]}x{SIZE[1]}",),
        Limits(images=4, num_inference_steps=STEPS, timeout_s=120.0),
        Defaults(num_inference_steps=20, guidance_scale=1.0),
        Encoding(png_level=0),
    )
    router: dict[str, Any] = {"request_router_class": "app.serving.router:ReplicaRouter"}
    options: dict[str, Any] = {"request_router_config": router} if routed else {}
    options |= {"num_replicas": replicas} if isinstance(replicas, int) else {"autoscaling_config": replicas}
    model = serve.deployment(
        name="StableDiffusion",
        max_ongoing_requests=1000,
        **options,
        ray_actor_options={"num_cpus": 0},
    )(PacedReplica).bind(
        PacedSpec(pace),
        start_s,
        name="paced",
        max_waiting=MOST_WAITING,
        images_at_once=None,
        admission_gain=0.05,
        prompt_cache=256,
        encoding_threads=1,
        stall_s=60.0,
    )
    ingress = serve.ingress()(APIIngress if routed else ServeRoutedIngress)
    return serve.deployment(
        name="APIIngress", num_replicas=1, max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0}
    )(ingress).bind(model, service, max_waiting=MOST_WAITING, api_keys_file=api_keys_file)
