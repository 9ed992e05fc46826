"""Faults of a real deployment: what breaks is killed, blocked or frozen under a client that asks all the time.

What the client saw and how long it lasted is printed, as a row of the table in docs/reliability.md:

    make test-faults
"""

import json
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import psutil
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from cluster import ROOT
from cluster.connection import dashboard_of
from tests.clusters import Verbs, fetch, refuses, soon, succeeds

pytestmark = [pytest.mark.cluster, pytest.mark.faults]

MODEL = ROOT / "assets" / "demo-model"
PATIENCE_S = 5.0  # of the client, who then counts the request as one that hangs
HEALTH = {"health_check_period_s": 1, "health_check_timeout_s": 4}  # of the model, to be quick here
RECOVERY_S = 240.0  # anything longer is not recovered; how long it was is printed


@pytest.fixture(scope="module")
def config(verbs: Verbs) -> dict[str, Any]:
    """The shipped one with one replica, a route that blocks the ingress, and quick health checks of the model."""
    content: dict[str, Any] = yaml.safe_load(verbs.config.read_text())
    content["http_options"]["port"] = verbs.serve_port
    (application,) = content["applications"]
    application["import_path"] = "tests.failing_apps:blockable"
    application["args"] |= {"batch_buckets": [1, 2], "sizes": ["64x64"]}
    for deployment in application["deployments"]:
        if deployment["name"] == "StableDiffusion":
            deployment |= HEALTH
    return content


@pytest.fixture(scope="module")
def api(verbs: Verbs, config: dict[str, Any]) -> str:
    file = verbs.run_dir / "faults.yaml"
    file.write_text(yaml.safe_dump(config))
    succeeds(verbs.deploy(file))
    return f"http://127.0.0.1:{verbs.serve_port}"


@pytest.fixture(autouse=True)
def recovered(api: str) -> Iterator[None]:
    """Each test begins where all is well."""
    assert soon(lambda: ask(f"{api}/healthz") == "200", RECOVERY_S)
    yield


def ask(url: str) -> str:
    """What a client sees of one request: a status and a code, or how the connection ended."""
    try:
        with urlopen(url, timeout=PATIENCE_S) as answer:
            answer.read()
            return str(answer.status)
    except HTTPError as error:
        body = error.read()
        try:
            return f"{error.code} {json.loads(body)['error']['code']}"
        except (ValueError, KeyError, TypeError):
            return f"{error.code} without a code"
    except (URLError, OSError, HTTPException) as error:
        cause = getattr(error, "reason", error)
        return "no answer within 5 s" if isinstance(cause, TimeoutError) else type(cause).__name__


class Client:
    """Asks for a picture again and again, from several threads, so that one request that hangs hides nothing."""

    def __init__(self, api: str) -> None:
        self.url = f"{api}/imagine?prompt=a&num_inference_steps=10&timeout=30"
        self.seen: list[tuple[float, float, str]] = []  # when asked, when answered, what
        self.left = threading.Event()
        self.pool = ThreadPoolExecutor(4)

    def ask_on(self) -> None:
        while not self.left.is_set():
            began = time.monotonic()
            outcome = ask(self.url)
            self.seen.append((began, time.monotonic(), outcome))
            self.left.wait(0.2)

    def serves(self, since: float) -> bool:
        """Whether the last requests of all threads have been answered, none of them asked before `since`."""
        last = sorted(self.seen)[-8:]
        return len(last) == 8 and all(began > since and outcome == "200" for began, _, outcome in last)


@contextmanager
def fault(name: str, api: str) -> Iterator[Client]:
    """The block makes it. Waits until it is over, and prints what the client saw of it."""
    client = Client(api)
    asking = [client.pool.submit(client.ask_on) for _ in range(4)]
    try:
        assert soon(lambda: client.serves(0), 60)
        began = time.monotonic()
        yield client
        assert soon(lambda: client.serves(began), RECOVERY_S), Counter(outcome for _, _, outcome in client.seen)
    finally:
        client.left.set()
        for thread in asking:
            thread.result()
        client.pool.shutdown()
    bad = [(at, until, outcome) for at, until, outcome in client.seen if until > began and outcome != "200"]
    served = min(until for at, until, outcome in client.seen if at > began and outcome == "200")
    outage_s = max([served, *(until for _, until, _ in bad)]) - began
    outcomes = ", ".join(f"{count} x {outcome}" for outcome, count in Counter(out for _, _, out in bad).most_common())
    print(f"| {name} | {outcomes or 'nothing'} | {outage_s:.1f} |")


def replica_pid(verbs: Verbs, deployment: str) -> int:
    with dashboard_of("local", verbs.run_dir) as dashboard:
        app = dashboard.details()["applications"]["text-to-image"]
    (replica,) = [replica for replica in app["deployments"][deployment]["replicas"] if replica["state"] == "RUNNING"]
    return int(replica["pid"])


def proxy_pid(verbs: Verbs) -> int:
    (proxy,) = [process for process in verbs.cluster.search() if "ProxyActor" in " ".join(process.cmdline()[:1])]
    return proxy.pid


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        if psutil.pid_exists(pid):
            os.kill(pid, signal.SIGCONT)


def test_a_killed_proxy_is_replaced_and_status_says_meanwhile_that_nothing_answers(verbs: Verbs, api: str) -> None:
    with fault("proxy killed", api):
        os.kill(proxy_pid(verbs), signal.SIGKILL)
        assert "text-to-image does not serve: its /healthz does not answer" in refuses(verbs("deploy", "status"))
    succeeds(verbs("deploy", "status"))


def test_a_killed_ingress_is_replaced(verbs: Verbs, api: str) -> None:
    with fault("ingress killed", api):
        os.kill(replica_pid(verbs, "APIIngress"), signal.SIGKILL)


def test_an_ingress_whose_event_loop_is_blocked_is_replaced(verbs: Verbs, api: str) -> None:
    pid = replica_pid(verbs, "APIIngress")
    with fault("ingress blocked", api):
        threading.Thread(target=ask, args=[f"{api}/block?s=900"]).start()
        assert soon(lambda: replica_pid_if_running(verbs, "APIIngress") not in (None, pid), RECOVERY_S)


def test_a_frozen_ingress_is_replaced(verbs: Verbs, api: str) -> None:
    with fault("ingress frozen", api), frozen(replica_pid(verbs, "APIIngress")):
        assert soon(lambda: ask(f"{api}/healthz") == "200", RECOVERY_S)


def test_a_killed_replica_is_replaced(verbs: Verbs, api: str) -> None:
    with fault("model's replica killed", api):
        os.kill(replica_pid(verbs, "StableDiffusion"), signal.SIGKILL)


def test_a_frozen_replica_is_replaced_and_gives_up_its_chips(verbs: Verbs, api: str) -> None:
    pid = replica_pid(verbs, "StableDiffusion")
    with fault("model's replica frozen", api), frozen(pid):
        assert soon(lambda: replica_pid_if_running(verbs, "StableDiffusion") not in (None, pid), RECOVERY_S)


def replica_pid_if_running(verbs: Verbs, deployment: str) -> int | None:
    try:
        return replica_pid(verbs, deployment)
    except ValueError:  # none, or two for a moment
        return None


def changed(config: dict[str, Any], path: Path, **args: Any) -> Path:
    content = json.loads(json.dumps(config))
    content["applications"][0]["args"] |= args
    path.write_text(yaml.safe_dump(content))
    return path


def test_weights_that_are_cut_off_are_refused_and_nothing_is_stopped(
    verbs: Verbs, api: str, config: dict[str, Any], tmp_path: Path
) -> None:
    model = Path(shutil.copytree(MODEL, tmp_path / "cut-model"))
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    os.truncate(weights, 1_000_000)
    with fault("weights cut off, deployed over a good config", api) as client:
        before = len(client.seen)
        failure = refuses(verbs.deploy(changed(config, tmp_path / "cut.yaml", model=str(model))))
        assert "is cut off: by its header it has" in failure and "Nothing was started" in failure
        assert {outcome for _, _, outcome in client.seen[before:]} == {"200"}


def test_a_config_that_fails_at_its_start_is_followed_by_what_ran_before(
    verbs: Verbs, api: str, config: dict[str, Any], tmp_path: Path
) -> None:
    """A weight that is no number is what only the replica finds."""
    model = Path(shutil.copytree(MODEL, tmp_path / "broken-model"))
    weights = model / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["post_quant_conv.bias"][0] = float("nan")
    save_file(tensors, weights)
    with fault("a config that fails at its start, over a good one", api):
        failure = refuses(verbs.deploy(changed(config, tmp_path / "broken.yaml", model=str(model))))
        assert "text-to-image/StableDiffusion did not start: " in failure and "NaN" in failure
        assert "is not deployed. text-to-image serves as before" in failure
    assert json.loads(fetch(f"{api}/healthz")[1])["model"] == MODEL.name


def test_two_hundred_clients_leave_health_and_model_quick_to_answer_and_come_back_at_different_times(api: str) -> None:
    body = {"prompt": "a", "num_inference_steps": 20}
    with ThreadPoolExecutor(200) as pool:
        futures = [pool.submit(fetch, f"{api}/v1/images/generations", body | {"seed": seed}) for seed in range(200)]
        times, codes = [], Counter[str]()
        while not all(future.done() for future in futures):
            began = time.monotonic()
            codes[ask(f"{api}/healthz")] += 1
            codes[ask(f"{api}/v1/models")] += 1
            times.append((time.monotonic() - began) / 2)
            time.sleep(0.05)
    refused = [headers for status, _, headers in (future.result() for future in futures) if status == 503]
    retries = [int({name.lower(): value for name, value in headers.items()}["retry-after"]) for headers in refused]
    print(f"/healthz and /v1/models under 200 clients: {len(times)} times, at most {max(times):.2f} s, {dict(codes)}")
    print(f"{len(refused)} refused; Retry-After {dict(sorted(Counter(retries).items()))}")
    assert set(codes) == {"200"}
    assert refused and len(set(retries)) > 1
