"""Replicas, nodes, the controller and the proxy are killed at random under load, and images move all the while.

    make test-chaos          # five minutes; SEED=7 draws the same faults and requests again, LOAD_S=120 is shorter

The devices only take time. A picture shows its seed plus the steps that it took, so what a client must get is known.
"""

import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from cluster import ROOT
from tests.clusters import Verbs, fetch, ports, put_config, soon, succeeds
from tests.on_cluster.test_moves import drawn, paced_config
from tests.on_cluster.test_scaling import raylet_of

pytestmark = pytest.mark.chaos

SEED = int(os.environ.get("SEED") or random.randrange(10**6))
LOAD_S = float(os.environ.get("LOAD_S") or 300)
CLIENTS, TIMEOUT_S = 8, 60
FAULT_EVERY_S = (8.0, 16.0)
RETRYABLE = ("replica_lost", "queue_full", "deadline_unmeetable", "model_not_ready", "timeout")
PROXY_BACK_S = 60.0  # the proxy is replaced, and until then no connection gets through
RECOVERY_S = 240.0


@pytest.fixture(scope="module")
def verbs() -> Iterator[Verbs]:
    dashboard_port, serve_port = ports(2)
    verbs = Verbs(ROOT / ".run" / "test-chaos", dashboard_port, serve_port)
    verbs.down()  # what a test run that was killed may have left
    succeeds(verbs.up("--idle-minutes", "5"))
    yield verbs
    succeeds(verbs.down())


@pytest.fixture(scope="module")
def config(verbs: Verbs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each replica has a node of its own, and is checked each second."""
    content = paced_config(verbs.serve_port, replicas=3, chips=4)
    content["applications"][0]["args"]["limits"]["timeout_s"] = TIMEOUT_S
    for deployment in content["applications"][0]["deployments"]:
        deployment |= {"health_check_period_s": 1, "health_check_timeout_s": 4}
    path = tmp_path_factory.mktemp("chaos") / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


class Clients:
    """Each asks for one picture after the other. No two pictures have the same seed."""

    def __init__(self, api: str) -> None:
        self.api = api
        self.outcomes: Counter[str] = Counter()
        self.facts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.proxy_killed_at = -PROXY_BACK_S
        self.left = threading.Event()
        self.lock = threading.Lock()

    def ask_on(self, number: int) -> None:
        draw = random.Random(SEED * 100 + number)
        seed = number * 10_000_000
        while not self.left.is_set():
            seed += 1000  # more than any number of steps, so that no sum of seed and steps has two meanings
            outcome = self.ask(draw, seed)
            with self.lock:
                self.outcomes[outcome] += 1
            if outcome != "ok":
                self.left.wait(0.5)

    def ask(self, draw: random.Random, seed: int) -> str:
        stream, n = draw.random() < 0.4, draw.choice([1, 1, 2, 4])
        request: dict[str, Any] = {
            "prompt": f"{draw.randrange(5)}",
            "num_inference_steps": draw.choice([4, 8, 20, 50]),
            "guidance_scale": draw.choice([1.0, 4.0]),
            "seed": seed,
            **({"stream": True, "partial_images": 3} if stream else {"n": n}),
        }
        began = time.monotonic()
        try:
            status, body, headers = fetch(f"{self.api}/v1/images/generations", request, timeout_s=TIMEOUT_S + 30)
        except (OSError, HTTPException) as error:
            if time.monotonic() - self.proxy_killed_at < PROXY_BACK_S + time.monotonic() - began:
                return "no connection while the proxy was away"
            self.wrong.append(f"{request}: {error!r}")
            return "no connection"
        try:
            return self.judged(request, status, body, headers)
        except (ValueError, LookupError) as error:
            cut_off = self.proxy_killed_at >= began
            if not cut_off:
                self.wrong.append(f"{request}: {status} {body[:300]!r} {error!r}")
            return "cut off with the proxy" if cut_off else "unreadable"

    def judged(self, request: dict[str, Any], status: int, body: bytes, headers: dict[str, str]) -> str:
        answer: dict[str, Any]
        if "stream" in request and status == 200:
            events = [json.loads(line[6:]) for line in body.decode().splitlines() if line.startswith("data: ")]
            *previews, answer = events
            indices = [event["partial_image_index"] for event in previews]
            self.expect(indices == sorted(set(indices)), f"{request}: previews {indices}")
            pictures = [answer["b64_json"]] if "error" not in answer else []
        else:
            answer = json.loads(body)
            pictures = [data["b64_json"] for data in answer["data"]] if status == 200 else []
        if "error" in answer:
            code = answer["error"]["code"]
            if status != 200:
                known = {name.lower() for name in headers}
                self.expect(status == 504 or "retry-after" in known, f"{request}: {status} {code} without Retry-After")
            self.expect(code in RETRYABLE, f"{request}: {answer['error']}")
            return str(code)
        shown = [drawn(picture) for picture in pictures]
        expected = [request["seed"] + i + request["num_inference_steps"] for i in range(request.get("n", 1))]
        self.expect(shown == expected, f"{request}: {shown}")
        with self.lock:
            for name in ("moves", "restarts"):
                self.facts[name] += name in answer
        return "ok"

    def expect(self, true: bool, what: str) -> None:
        if not true:
            self.wrong.append(what)


def stats(api: str) -> dict[str, Any]:
    try:
        status, body, _ = fetch(f"{api}/v1/stats", timeout_s=10)
        answer: dict[str, Any] = json.loads(body) if status == 200 else {}
    except (OSError, HTTPException, ValueError):
        return {}
    return answer


def pids(api: str) -> list[int]:
    return sorted(replica["pid"] for replica in stats(api).get("replicas", {}).values() if "pid" in replica)


def processes_of(verbs: Verbs, title: str) -> list[psutil.Process]:
    return [process for process in verbs.cluster.search() if title in " ".join(process.cmdline()[:1])]


class Chaos:
    """Faults, drawn by chance."""

    def __init__(self, verbs: Verbs, config: Path, clients: Clients) -> None:
        self.verbs, self.clients, self.draw = verbs, clients, random.Random(SEED)
        self.content: dict[str, Any] = yaml.safe_load(config.read_text())
        self.seen: list[str] = []

    def strike(self) -> None:
        faults: list[tuple[int, Callable[[], None]]] = [
            (4, self.resize),
            (3, self.kill_replica),
            (2, self.preempt),
            (1, self.kill_node),
            (1, self.kill_controller),
            (1, self.kill_proxy),
        ]
        weights, calls = zip(*faults, strict=True)
        (fault,) = self.draw.choices(calls, weights)
        self.seen.append(fault.__name__)
        try:
            fault()
        except (OSError, ValueError, psutil.Error, RuntimeError) as error:  # what it was meant for has just gone
            self.seen[-1] += f" ({type(error).__name__})"

    def resize(self) -> None:
        """Serve drains a replica, or starts one."""
        self.put(self.draw.choice([1, 2, 3]))

    def put(self, replicas: int) -> None:
        for deployment in self.content["applications"][0]["deployments"]:
            if deployment["name"] == "StableDiffusion":
                deployment["num_replicas"] = replicas
        put_config(self.verbs, self.content)

    def kill_replica(self) -> None:
        psutil.Process(self.draw.choice(pids(self.clients.api))).kill()

    def preempt(self) -> None:
        self.verbs("local", "preempt")

    def kill_node(self) -> None:
        raylet = raylet_of(self.draw.choice(pids(self.clients.api)))
        for process in [raylet, *raylet.children(recursive=True)]:
            process.kill()

    def kill_controller(self) -> None:
        for process in processes_of(self.verbs, "ServeController"):
            process.kill()

    def kill_proxy(self) -> None:
        self.clients.proxy_killed_at = time.monotonic()
        for process in processes_of(self.verbs, "ProxyActor"):
            process.kill()


def test_every_request_ends_in_its_picture_or_in_one_clear_error(verbs: Verbs, config: Path) -> None:
    print(f"SEED={SEED}")
    succeeds(verbs.deploy(config))
    clients = Clients(f"http://127.0.0.1:{verbs.serve_port}")
    chaos = Chaos(verbs, config, clients)
    with ThreadPoolExecutor(CLIENTS) as pool:
        asking = [pool.submit(clients.ask_on, number) for number in range(CLIENTS)]
        try:
            until = time.monotonic() + LOAD_S
            while time.monotonic() < until:
                time.sleep(chaos.draw.uniform(*FAULT_EVERY_S))
                chaos.strike()
            chaos.put(3)
            well = clients.outcomes["ok"]
            assert soon(lambda: clients.outcomes["ok"] > well + 10, RECOVERY_S), "nobody is served any more"
        finally:
            clients.left.set()
        for client in asking:
            client.result(RECOVERY_S)
    print(f"faults: {', '.join(chaos.seen)}")
    print(f"requests: {dict(clients.outcomes.most_common())}; of them {dict(clients.facts)}")
    assert not clients.wrong, clients.wrong[:5]
    assert clients.outcomes["ok"] > sum(clients.outcomes.values()) / 2
    assert clients.facts["moves"] and clients.facts["restarts"]

    def at_rest() -> bool:
        """The engines, and the ingress' book of what it has sent."""
        answer = stats(clients.api)
        if "total" not in answer:
            return False
        total, queue = answer["total"], answer["queue"]
        held = [total["unfinished"], total["active_slots"], queue["waiting"]]
        held += [replica["requests"] for replica in queue["replicas"].values()]
        return not any(held)

    assert soon(at_rest, 60), stats(clients.api)
