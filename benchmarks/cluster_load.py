"""A Ray and a Serve of their own for benchmarks of the cluster, and the client that loads what runs on them."""

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import aiohttp
import numpy as np
import ray
from ray import serve

from app.api.api_keys import digest_of
from app.types import Generation
from benchmarks.paced import Pace
from benchmarks.paced_cluster import Scaling, application
from cluster import ROOT, processes
from loadtest.arrivals import Seconds

PORTS = range(19000, 20000)
KEYS = ("flood", "rare")
API_KEYS = "keys.yaml"
TIMEOUT_S = 300.0
SYSTEMS = ("ours", "serve")


@dataclass(frozen=True)
class LocalServe:
    port: int
    folder: Path

    def deploy(self, system: str, pace: Pace, replicas: Scaling, start_s: float = 0.0) -> str:
        """Brings up a system of paced replicas. Returns the URL of its API."""
        routed = system == "ours"
        keys = self.folder / API_KEYS if routed else None
        app = application(pace, replicas, routed=routed, api_keys_file=keys, start_s=start_s)
        serve.run(app, name=system, route_prefix=f"/{system}")
        return f"http://127.0.0.1:{self.port}/{system}/v1"


@contextmanager
def local_serve() -> Iterator[LocalServe]:
    port = next(port for port in PORTS if processes.free(port))
    with TemporaryDirectory(prefix="bench-cluster-") as name:
        folder = Path(name)
        entries = [f"- name: {key}\n  sha256: {digest_of(key.encode())}\n" for key in KEYS]
        (folder / API_KEYS).write_text("".join(entries) + "...\n")
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=150_000_000,
            runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
        )
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            yield LocalServe(port, folder)
        finally:
            serve.shutdown()
            ray.shutdown()


def replicas_of(system: str) -> tuple[int, int]:
    """How many replicas of the model there are, those that start included, and how many can take requests."""
    states = serve.status().applications[system].deployments["StableDiffusion"].replica_states
    return sum(states.values()), sum(count for state, count in states.items() if str(state) == "RUNNING")


def in_turn(run: int) -> tuple[str, ...]:
    """The systems in the order of a run: each goes first as often as the other."""
    return SYSTEMS[::-1] if run % 2 else SYSTEMS


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def ask(session: aiohttp.ClientSession, url: str, generation: Generation, key: str) -> None:
    body = {
        "prompt": generation.prompt,
        "seed": generation.seed,
        "num_inference_steps": generation.num_inference_steps,
        "guidance_scale": generation.guidance_scale,
        "n": generation.n,
    }
    async with session.post(f"{url}/images/generations", json=body, headers=bearer(key)) as response:
        content = await response.read()
        if response.status != 200:
            raise RuntimeError(f"The server answers {response.status}: {content[:300]!r}")


async def offer(url: str, requests: Sequence[Generation], arrivals: Seconds, key: str = KEYS[0]) -> Seconds:
    """Sends each request at its time, whether or not earlier ones are done. Latencies count from that time."""
    latencies = np.zeros(len(requests))
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        began = time.monotonic() + 0.1

        async def send(index: int) -> None:
            await asyncio.sleep(began + arrivals[index] - time.monotonic())
            await ask(session, url, requests[index], key)
            latencies[index] = time.monotonic() - began - arrivals[index]

        await asyncio.gather(*map(send, range(len(requests))))
    return latencies
