"""A server to look at in a browser: the real routes, replicas and engines over real HTTP, without Ray or a model.

Its pipeline paints a landscape from the seed, at the pace of a clock. In place of Serve's DeploymentHandle stands one
that calls replicas in this process.
"""

import asyncio
import socket
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import uvicorn

from app.api.ingress import APIIngress
from app.api.messages import Report
from app.api.settings import Defaults, Limits, Service
from app.engine.virtual import Pixels, RealClock, SlotState, State, VirtualPipeline
from app.serving.replica import StableDiffusion
from app.types import Capabilities, Edit, Generation, PipelineSpec, RequestDefaults, Size

SIZES: tuple[Size, ...] = ((256, 256), (320, 192), (192, 320))
NAMES = tuple(f"{width}x{height}" for width, height in SIZES)
SERVICE = Service("studio", NAMES, Limits(timeout_s=60.0), Defaults(num_inference_steps=12, guidance_scale=5.0))
NODES = [
    {"id": "head-node", "type": "head", "head": True, "resources": {"CPU": 4.0}},
    {"id": "tpu-node-1", "type": "ray_tpu", "head": False, "resources": {"CPU": 8.0, "TPU": 4.0}},
]


def landscape(seed: int, size: Size, progress: float) -> np.ndarray:
    """A sky, a sun and two hills, under noise that goes with the steps."""
    rng, (width, height) = np.random.default_rng(seed), size
    y, x = np.mgrid[0:height, 0:width] / np.array([height, width]).reshape(2, 1, 1)
    low, high, sun, near, far = rng.uniform(60, 255, (5, 3))
    pixels = low + (high - low) * y[..., None]
    sun_x, sun_y, radius = rng.uniform(0.2, 0.8), rng.uniform(0.15, 0.4), rng.uniform(0.06, 0.12)
    pixels[np.hypot((x - sun_x) * width / height, y - sun_y) < radius] = sun
    for colour, level in ((far, 0.62), (near, 0.78)):
        phase, waves = rng.uniform(0, 6), rng.uniform(3, 9)
        pixels[y > level + 0.06 * np.sin(waves * x + phase)] = colour * level
    noise = rng.normal(0, 90 * (1 - progress), pixels.shape)
    return np.clip(pixels + noise, 0, 255).astype(np.uint8)


@dataclass(frozen=True)
class Painting(Pixels):
    images: tuple[SlotState, ...] = ()

    edits: Mapping[int, Edit] = field(default_factory=dict)  # by seed

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        pixels = super().__array__()
        for place, image in zip(pixels, self.images, strict=False):
            place[:] = landscape(image.seed, self.size, image.taken / image.steps)
            edit = self.edits.get(image.seed)
            if edit and edit.image is not None and edit.mask is not None:
                place[~edit.mask] = edit.image[~edit.mask]
        return pixels


class Studio(VirtualPipeline):
    """One guided image takes `step_s` seconds a step; two that share it take as long as one after the other."""

    samplers = ("ddim", "euler", "dpmpp_2m_karras")
    notes = ()
    request_defaults = RequestDefaults()
    request_fields = ()
    capabilities = Capabilities(edits=True, masks=True)

    def __init__(self, step_s: float) -> None:
        steps = {(size, rows): step_s * rows / 2 for size in SIZES for rows in (1, 2, 4)}
        decodes = {(size, images): 0.01 * images for size in SIZES for images in (1, 2)}
        super().__init__(steps, decodes, num_slots=4, clock=RealClock())
        self.edits: dict[int, Edit] = {}  # by seed

    @classmethod
    def load(cls, spec: PipelineSpec) -> "Studio":
        return cls(0.02)

    def warmup(self) -> None:
        """Nothing is compiled."""

    def check(self, generation: Generation) -> Generation:
        """The engine hands an edit's arrays to the device. What this device paints follows them from here."""
        if generation.edit:
            self.edits[generation.seed] = generation.edit
        return generation

    def _pixels(
        self,
        verb: str,
        state: State,
        slots: Sequence[int],
        images: Sequence[SlotState],
        bucket: int,
        seconds: float,
    ) -> Pixels:
        pixels = super()._pixels(verb, state, slots, images, bucket, seconds)
        return Painting(**vars(pixels), images=tuple(images), edits=self.edits)


class NoCompiles:
    count = 0

    def ready(self) -> None: ...
    def close(self) -> None: ...


class NamedReplica(StableDiffusion):
    """Says its name where one in Ray would say its id."""

    replica = ""

    def load(self) -> Report:
        return replace(super().load(), replica=self.replica)

    async def stats(self) -> dict[str, Any]:
        return await super().stats() | {"replica": self.replica, "node": NODES[-1]["id"]}


def new_replica(name: str, max_waiting: int = 16) -> StableDiffusion:
    modules = {
        "app.diffusion.pipeline": SimpleNamespace(Pipeline=Studio),
        "app.aot.compile": SimpleNamespace(CompileWatch=NoCompiles),
    }
    with patch.dict(sys.modules, modules):  # the real ones import JAX
        replica = NamedReplica(
            PipelineSpec("studio", SIZES, (1, 2), 100),
            name="studio",
            max_waiting=max_waiting,
            images_at_once=None,
            admission_gain=0.05,
            prompt_cache=16,
            encoding_threads=2,
            stall_s=60.0,
        )
        replica.replica = name
        return replica


class Stream:
    """A DeploymentResponseGenerator over a replica's own generator."""

    def __init__(self, items: AsyncIterator[Any]) -> None:
        self.queue: asyncio.Queue[Any] = asyncio.Queue()
        self.task = asyncio.ensure_future(self.pump(items))

    async def pump(self, items: AsyncIterator[Any]) -> None:
        try:
            async for item in items:
                self.queue.put_nowait(item)
        finally:
            self.queue.put_nowait(None)
            await items.aclose()  # type: ignore[attr-defined]

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> Any:
        if (item := await self.queue.get()) is None:
            raise StopAsyncIteration
        return item

    def cancel(self) -> None:
        self.task.cancel()


@dataclass
class Handle:
    """A DeploymentHandle. The ingress names the replica, as it does to Serve's router."""

    replicas: dict[str, StableDiffusion]
    app_name: str = "text-to-image"
    deployment_name: str = "StableDiffusion"
    method: str = ""

    def replica(self) -> StableDiffusion:
        return self.replicas.get(self.chosen) or next(iter(self.replicas.values()))

    chosen: str = ""

    def __getattr__(self, method: str) -> "Handle":
        if method.startswith("_"):
            raise AttributeError(method)
        return Handle(self.replicas, method=method, chosen=self.chosen)

    def options(self, session_id: str = "", stream: bool = False) -> "Handle":
        return Handle(self.replicas, chosen=session_id)

    def remote(self, *arguments: Any) -> Any:
        answer = getattr(self.replica(), self.method)(*arguments)
        return Stream(answer) if hasattr(answer, "__anext__") else asyncio.ensure_future(answer)

    def broadcast(self, method: str, *arguments: Any) -> SimpleNamespace:
        async def results() -> list[Any]:
            calls = [partial(getattr(replica, method), *arguments) for replica in self.replicas.values()]
            return [SimpleNamespace(get_async=call) for call in calls]

        return SimpleNamespace(_fetch_replica_results_async=results)


@dataclass
class Server:
    """Serves on a port of its own, which stays the same when it stops and starts again."""

    replicas: dict[str, StableDiffusion]
    api_keys_file: Path | None = None
    service: Service = SERVICE
    port: int = 0
    ingress: Any = None
    running: list[tuple[uvicorn.Server, threading.Thread]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.ingress = APIIngress(Handle(self.replicas), self.service, self.api_keys_file)
        app = self.ingress.__serve_build_asgi_app__()
        server = uvicorn.Server(
            uvicorn.Config(app, log_level="error", ws="none", lifespan="off", timeout_graceful_shutdown=0)
        )
        listener = socket.create_server(("127.0.0.1", self.port))
        self.port = listener.getsockname()[1]
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        self.running.append((server, thread))

    def stop(self) -> None:
        """Breaks the connections off, as a killed server does."""
        server, thread = self.running.pop()
        server.force_exit = server.should_exit = True
        for connection in list(server.server_state.connections):
            connection.transport.abort()
        thread.join(10)

    def slow_down(self, times: float) -> None:
        """Lets everything take so many times as long."""
        for replica in self.replicas.values():
            replica.pipeline.pace = times  # type: ignore[attr-defined]

    def unfinished(self) -> int:
        """Requests that wait in the ingress, and those that replicas have."""
        waiting = len(self.ingress.routed.dispatch.waiting)
        return waiting + sum(replica.engine.stats()["unfinished"] for replica in self.replicas.values())


async def nodes() -> list[dict[str, Any]]:
    return NODES


@contextmanager
def studio(
    count: int = 1, api_keys_file: Path | None = None, max_waiting: int = 16, service: Service = SERVICE
) -> Iterator[Server]:
    names = [f"replica-{number}" for number in range(count)]
    replicas = {name: new_replica(name, max_waiting) for name in names}
    with (
        patch("app.serving.description.device", lambda: "easel x1"),
        serving(replicas, service, api_keys_file) as server,
    ):
        yield server


@contextmanager
def serving(
    replicas: dict[str, StableDiffusion], service: Service, api_keys_file: Path | None = None
) -> Iterator[Server]:
    """Serves replicas of this process, and closes them."""
    server = Server(replicas, api_keys_file, service)
    with (
        patch("app.api.stats.replica_ids", lambda app, deployment: list(replicas)),
        patch("app.api.ingress.nodes", nodes),
    ):
        server.start()
        try:
            yield server
        finally:
            if server.running:
                server.stop()
            for replica in replicas.values():
                replica.ended = True  # what Serve would have it do at its end is done here
                replica.engine.close()
                replica.encoders.shutdown()
