"""A real local cluster under load whose nodes come and go, die, are preempted or cannot be had.

It runs serve_config.yaml with delays of seconds instead of minutes. Every wait is for a condition; `PATIENCE_S` only
bounds how long a slow machine may take for one. The order matters where a test ends the cluster: those come last.
"""

import json
import os
import re
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from cluster import ROOT, nodes, processes
from tests.clusters import Verbs, fetch, ports, refuses, soon, succeeds

pytestmark = pytest.mark.scaling

RUN_DIR = ROOT / ".run" / "test-scaling"
PATIENCE_S = 180.0
PROMPT = "a red house under a yellow sun at dusk"
LONG = {"prompt": PROMPT, "num_inference_steps": 100, "n": 4, "seed": 7}  # long enough for things to happen to it
QUICK = {"metrics_interval_s": 1, "look_back_period_s": 2, "max_replicas": 3}
POLICY = {"objective_s": 10, "hold_s": 5, "start_s": 5}  # one client at a time wants one replica
# With the least objective that the policy takes, half of what nine clients ask for wants three replicas. With 0.5 s it
# took nearly all: a machine whose clients are slow beside its replicas never wanted the third.
EAGER = POLICY | {"objective_s": 0.1}
# More than the clients of `load`, who all may wait in the ingress.
WAITING = 12
Answer = tuple[int, bytes, dict[str, str]]


@pytest.fixture(scope="module")
def verbs() -> Iterator[Verbs]:
    dashboard_port, serve_port = ports(2)
    verbs = Verbs(RUN_DIR, dashboard_port, serve_port)
    verbs.down()  # what a test run that was killed may have left
    yield verbs
    succeeds(verbs.down())


@pytest.fixture(scope="module")
def config(verbs: Verbs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("config"), verbs, POLICY)


def write_config(folder: Path, verbs: Verbs, policy: Mapping[str, float]) -> Path:
    content = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    content["http_options"]["port"] = verbs.serve_port
    deployments = content["applications"][0]["deployments"]
    (model,) = [deployment for deployment in deployments if "autoscaling_config" in deployment]
    model["autoscaling_config"] |= QUICK
    model["autoscaling_config"]["policy"]["policy_kwargs"] = policy
    model["max_queued_requests"] = content["applications"][0]["args"]["max_waiting"] = WAITING
    path = folder / "serve_config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def api(verbs: Verbs, config: Path) -> str:
    """Up, deployed and at rest, whatever the test before has left."""
    succeeds(verbs.up("--idle-minutes", "0.1", "--stock-out", "0"))
    succeeds(verbs.deploy(config))
    api = f"http://127.0.0.1:{verbs.serve_port}"
    assert soon(lambda: len(replicas(api)) == 1 and tpu_nodes(verbs) == 1, PATIENCE_S)
    return api


def replicas(api: str) -> set[int]:
    """The processes of those that answer."""
    try:
        status, body, _ = fetch(f"{api}/v1/stats", timeout_s=30)
        replicas: list[dict[str, Any]] = [*json.loads(body)["replicas"].values()] if status == 200 else []
    except (OSError, ValueError):
        return set()
    return {replica["pid"] for replica in replicas if "error" not in replica}


def busy(api: str) -> bool:
    status, body, _ = fetch(f"{api}/v1/stats", timeout_s=30)
    return status == 200 and json.loads(body)["total"]["active_slots"] > 0


def tpu_nodes(verbs: Verbs) -> int:
    return nodes.status(verbs.cluster.dashboard).running["ray_tpu"]


def raylet_of(pid: int) -> psutil.Process:
    (raylet,) = [process for process in psutil.Process(pid).parents() if processes.name_of(process) == "raylet"]
    return raylet


def generate(api: str, body: dict[str, Any]) -> Answer:
    return fetch(f"{api}/v1/images/generations", body, timeout_s=PATIENCE_S)


@contextmanager
def load(api: str, clients: int, steps: int = 10) -> Iterator[list[Answer]]:
    """So many clients, each of which asks again as soon as it has its answer; all answers, complete after the block."""
    answers: list[Answer] = []
    stop = threading.Event()

    def client() -> None:
        while not stop.is_set():
            answers.append(generate(api, {"prompt": PROMPT, "num_inference_steps": steps}))

    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(client) for _ in range(clients)]
        try:
            yield answers
        finally:
            stop.set()
    for future in running:
        future.result()


def statuses(answers: list[Answer]) -> Counter[int]:
    return Counter(status for status, _, _ in answers)


def retry_after(answer: Answer) -> int:
    return int({name.lower(): value for name, value in answer[2].items()}["retry-after"])


def test_replicas_and_nodes_follow_the_load_up_and_down_and_no_request_fails(
    api: str, verbs: Verbs, tmp_path: Path
) -> None:
    succeeds(verbs.deploy(write_config(tmp_path, verbs, EAGER)))
    with load(api, clients=9, steps=25) as answers:
        assert soon(lambda: len(replicas(api)) == 3 and tpu_nodes(verbs) == 3, PATIENCE_S)
        assert "Adding " in succeeds(verbs("local", "monitor", "--once"))
        status = succeeds(verbs("deploy", "status"))
        assert "Nodes  1 head, 3 ray_tpu\n" in status and "StableDiffusion  HEALTHY  3 of 3 ready" in status
    assert soon(lambda: len(replicas(api)) == 1 and tpu_nodes(verbs) == 1, PATIENCE_S)
    assert set(statuses(answers)) == {200}, [body for status, body, _ in answers if status != 200][:3]
    assert "Removing " in succeeds(verbs("local", "monitor", "--once"))


def test_a_node_that_is_taken_away_loses_nothing(api: str, verbs: Verbs) -> None:
    """By way of the watcher, which drains the node as it would on Google Cloud."""
    (before,) = replicas(api)
    raylet = raylet_of(before)
    with load(api, clients=1) as answers, ThreadPoolExecutor(1) as pool:
        long = pool.submit(generate, api, LONG)
        assert soon(lambda: busy(api))
        assert "has its notice" in succeeds(verbs("local", "preempt"))
        assert soon(lambda: processes.dead(raylet), PATIENCE_S)
        assert soon(lambda: bool(replicas(api) - {before}), PATIENCE_S)
        assert long.result()[0] == 200
    assert set(statuses(answers)) == {200}, [body for status, body, _ in answers if status != 200][:3]
    log = verbs.cluster.temp_dir / "ray" / "session_latest" / "logs" / "watcher.log"
    assert "draining node" in log.read_text() and "drained: Serve starts replicas" in log.read_text()


def test_a_node_that_dies_costs_its_requests_a_clear_error_and_comes_back(api: str) -> None:
    (before,) = replicas(api)
    with ThreadPoolExecutor(2) as pool:
        long = pool.submit(generate, api, LONG)
        assert soon(lambda: busy(api))
        for process in [raylet := raylet_of(before), *raylet.children(recursive=True)]:
            process.kill()
        status, body, _ = answer = long.result()
        assert status == 200 or (status, json.loads(body)["error"]["code"]) == (503, "replica_lost"), body
        assert status == 200 or retry_after(answer) >= 1
        assert soon(lambda: generate(api, {"prompt": PROMPT, "seed": 7})[0] == 200, PATIENCE_S)
    assert before not in replicas(api)


def test_while_there_is_no_tpu_requests_wait_or_are_told_when_to_retry(api: str, verbs: Verbs) -> None:
    (before,) = replicas(api)
    assert "From now on: IDLE_MINUTES=0.1, STOCK_OUT=1\n" in succeeds(verbs.up("--stock-out", "1"))
    raylet_of(before).kill()
    assert soon(lambda: tpu_nodes(verbs) == 0 and not replicas(api), PATIENCE_S)
    with ThreadPoolExecutor(2 * WAITING) as pool:
        futures = [pool.submit(generate, api, {"prompt": PROMPT, "seed": seed}) for seed in range(2 * WAITING)]
        assert soon(lambda: sum(future.done() for future in futures) >= WAITING, PATIENCE_S)
        refused = [future.result() for future in futures if future.done()]
        assert soon(lambda: "no more capacity" in verbs("local", "monitor", "--once").stdout, PATIENCE_S)
        status = verbs("deploy", "status")
        assert "text-to-image does not serve" in refuses(status) and "no more capacity for ray_tpu" in status.stdout
        succeeds(verbs.up("--stock-out", "0"))
        answers = [future.result() for future in futures]
    assert set(statuses(refused)) == {503} and all(retry_after(answer) >= 1 for answer in refused)
    assert statuses(answers)[200] == len(futures) - len(refused) > 0


def test_without_the_controller_requests_go_on_and_it_comes_back(api: str, verbs: Verbs) -> None:
    def controllers() -> list[psutil.Process]:
        return [process for process in verbs.cluster.search() if "ray::ServeController" in " ".join(process.cmdline())]

    (before,) = replicas(api)
    (controller,) = controllers()
    with load(api, clients=1) as answers:
        controller.kill()
        answered = len(answers)
        assert soon(lambda: any(process.pid != controller.pid for process in controllers()), PATIENCE_S)
        assert soon(lambda: len(answers) >= answered + 10, PATIENCE_S)
    assert set(statuses(answers)) == {200}, [body for status, body, _ in answers if status != 200][:3]
    assert soon(lambda: "StableDiffusion  HEALTHY  1 of 1 ready" in verbs("deploy", "status").stdout, PATIENCE_S)
    assert replicas(api) == {before}


def test_plain_ray_serve_and_curl_work_with_the_address(api: str, verbs: Verbs, tmp_path: Path) -> None:
    address = succeeds(verbs("local", "address"))
    script = f'{address}\nray status; serve status; ray job list; curl -sf "$IMAGINE_URL/healthz" && echo well'
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHONPATH"))}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=bare, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r" [123] ray_tpu", done.stdout) and "RUNNING" in done.stdout and done.stdout.endswith("well\n")


def test_two_local_clusters_run_side_by_side_and_each_is_ended_whole(api: str, verbs: Verbs, tmp_path: Path) -> None:
    """Also after its autoscaler, the parent of its nodes, was killed."""
    before = verbs.cluster.search()
    other = replace(verbs, run_dir=tmp_path / "run", dashboard_port=ports(1)[0])
    try:
        succeeds(other.up())
        cluster = other.cluster
        for recorded in cluster.processes:
            if recorded.name == "monitor" and (process := processes.find(recorded)):
                process.kill()
        raylets = [process for process in cluster.search() if processes.name_of(process) == "raylet"]
        assert len(raylets) == 2, "the head's and the node's"
        assert soon(lambda: "The cluster died (monitor gone)" in other("deploy", "status").stderr)
    finally:
        succeeds(other.down())
    assert not cluster.search() and all(processes.dead(process) for process in raylets)
    assert not [process for process in before if processes.name_of(process) == "raylet" and processes.dead(process)]
    assert generate(api, {"prompt": PROMPT})[0] == 200


# The end of the head, and of all.


def test_after_the_head_was_killed_up_and_deploy_serve_again(api: str, verbs: Verbs, config: Path) -> None:
    before = verbs.cluster
    for recorded in before.processes:
        if recorded.name in ("gcs_server", "raylet") and (process := processes.find(recorded)):
            process.send_signal(signal.SIGKILL)
    assert soon(lambda: bool(before.missing))
    assert "The cluster died" in refuses(verbs("deploy", "status"))
    assert "Removed the leftovers of a cluster that died" in succeeds(verbs.up("--idle-minutes", "0.1"))
    assert not before.search() and not before.temp_dir.exists()
    succeeds(verbs.deploy(config))
    assert generate(api, {"prompt": PROMPT})[0] == 200


def test_down_under_load_leaves_nothing_and_nobody_hangs(api: str, verbs: Verbs) -> None:
    cluster = verbs.cluster
    taken = [cluster.dashboard_port, verbs.serve_port, *cluster.ports.values()]
    ended: list[str] = []

    def ask() -> None:
        try:
            while True:
                generate(api, {"prompt": PROMPT, "num_inference_steps": 50})
        except OSError as error:  # nobody listens any more
            ended.append(str(error))

    clients = [threading.Thread(target=ask) for _ in range(6)]
    for client in clients:
        client.start()
    assert soon(lambda: busy(api))
    began = time.monotonic()
    assert succeeds(verbs.down()).startswith("The local cluster is down: ")
    assert time.monotonic() - began < PATIENCE_S
    for client in clients:
        client.join(PATIENCE_S)
    assert len(ended) == len(clients)
    assert not cluster.search() and not cluster.temp_dir.exists()
    assert all(processes.free(port) for port in taken)
