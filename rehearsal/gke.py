"""Rehearses what `make gke` writes, without Kubernetes: `python -m rehearsal.gke`.

The Dockerfile's commands run, then those of the head's pod and a worker's: probes, the deployment of serveConfigV2, a
picture for another pod, the preStop hook. Ray's autoscaler for KubeRay does not run, as it asks Kubernetes.
"""

import hashlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml

from cluster import ROOT
from cluster.cli import UserError, run_command
from cluster.gke.__main__ import write
from rehearsal import image
from rehearsal.full import expect
from rehearsal.namespaces import Network
from rehearsal.pods import TOKEN, Layers
from rehearsal.stage import check

Json = dict[str, Any]
HEAD, WORKER, OPERATOR = "10.128.0.11", "10.128.0.12", "10.128.0.13"
TIMEOUT_S, POLL_S = 600.0, 2.0
KEY = f"imagine-{secrets.token_hex(32)}"
CONFIG = {  # as a user opens the API, and as there is no TPU
    "host: 127.0.0.1 ": "host: 0.0.0.0 ",
    "api_keys_file: null ": "api_keys_file: {keys} ",
    "batch_buckets: [1, 2, 4] ": "batch_buckets: [1] ",
    "target_ongoing_requests: 8 ": "target_ongoing_requests: 4 ",
    "          num_cpus: 1 ": "          runtime_env: {{env_vars: {{JAX_PLATFORMS: cpu}}}}\n          num_cpus: 1 ",
}


@contextmanager
def keys_file() -> Iterator[Path]:
    """A file with an API key, below the repository, where a user's is."""
    file = ROOT / f".run/rehearsal-{os.getpid()}/keys.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(f"- name: rehearsal\n  sha256: {hashlib.sha256(KEY.encode()).hexdigest()}\n...\n")
    try:
        yield file
    finally:
        shutil.rmtree(file.parent)


def config(folder: Path, keys: Path) -> Path:
    """serve_config.yaml as a user opens it, for pods without a TPU."""
    text = (ROOT / "serve_config.yaml").read_text()
    for shipped, changed in CONFIG.items():
        assert text.count(shipped) == 1, shipped
        text = text.replace(shipped, changed.format(keys=keys.relative_to(ROOT)))
    (folder / "serve_config.yaml").write_text(text)
    return folder / "serve_config.yaml"


def rehearse() -> None:
    check()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all is removed
    disk = image.make()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rehearsal-", ignore_cleanup_errors=True)))
        folder.chmod(0o755)
        keys = stack.enter_context(keys_file())
        secret = folder / "secret"
        secret.mkdir()
        (secret / keys.name).write_text(keys.read_text())
        write(config(folder, keys), ROOT / "cluster.yaml", "imagine:1", "", folder / "gke")
        network = Network()
        stack.callback(network.close)
        network.join("operator", OPERATOR)
        layers = Layers(folder, disk, network)
        layers.build((folder / "gke/Dockerfile").read_text(), ROOT)
        service, _ = yaml.safe_load_all((folder / "gke/rayservice.yaml").read_text())
        groups = service["spec"]["rayClusterConfig"]
        head, (workers,) = groups["headGroupSpec"], groups["workerGroupSpecs"]
        try:
            layers.pod("head", HEAD, head, secret, HEAD)
            probed(layers, "head", HEAD, head, "livenessProbe")
            worker = layers.pod("worker", WORKER, workers, secret, HEAD)
            probed(layers, "worker", WORKER, workers, "livenessProbe")
            deploy(layers, service["spec"]["serveConfigV2"])
            check_api(layers)
            leave(layers, worker, workers)
        except UserError:
            for name in ("head", "worker"):
                log = folder / f"{name}.log"
                print(f"{name}: {log.read_text(errors='replace')[-2000:] if log.exists() else 'not started'}")
            raise
    print("Nothing is left.")


def probed(layers: Layers, name: str, address: str, group: Json, kind: str) -> None:
    """Waits until a probe of a pod succeeds."""
    get = group["template"]["spec"]["containers"][0][kind]["httpGet"]
    url = f"http://{address}:{get['port']}{get['path']}"
    await_answer(layers, url, answers, f"the {kind} of the {name}, {url}")


def answers(status: int, _: str) -> bool:
    return status == 200


def deploy(layers: Layers, text: str) -> None:
    """Deploys as KubeRay does: the config as JSON, to the dashboard, with the token."""
    url, token = f"http://{HEAD}:8265/api/serve/applications/", ["-H", f"Authorization: Bearer {TOKEN}"]
    status, _ = layers.ask(url)
    expect(status in (401, 403), f"the dashboard answers {status} to a caller without the token")
    body = ["-X", "PUT", "-H", "Content-Type: application/json", "-d", json.dumps(yaml.safe_load(text))]
    status, answer = layers.ask(url, *token, *body)
    expect(status == 200, f"the dashboard answers {status} to serveConfigV2: {answer}")

    def runs(status: int, answer: str) -> bool:
        states = [app["status"] for app in json.loads(answer)["applications"].values()] if status == 200 else []
        expect("DEPLOY_FAILED" not in states, f"the application does not start: {answer[-2000:]}")
        return states == ["RUNNING"]

    await_answer(layers, url, runs, "the application of serveConfigV2", *token)
    await_answer(layers, f"http://{HEAD}:8000/-/healthz", answers, "KubeRay's look at the proxy")


def check_api(layers: Layers) -> None:
    """Another pod gets a picture with a key, and nothing without."""
    url = f"http://{HEAD}:8000/imagine?prompt=a+red+house&seed=1"
    for words, options, expected in (
        ("without a key", [], 401),
        ("with a key", ["-H", f"Authorization: Bearer {KEY}"], 200),
    ):
        status, _ = layers.ask(url, *options)
        print(f"GET /imagine from another pod {words}: {status}", flush=True)
        expect(status == expected, f"{url} {words} answers {status}, not {expected}")


def leave(layers: Layers, worker: subprocess.Popen[bytes], group: Json) -> None:
    """Kubernetes ends the worker: its preStop hook drains the node, within the time before SIGKILL."""
    spec, began = group["template"]["spec"], time.monotonic()
    layers.execute(worker, group, HEAD, spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"])
    seconds = time.monotonic() - began
    expect(seconds < spec["terminationGracePeriodSeconds"], f"the preStop hook took {seconds:.0f} s")


def await_answer(layers: Layers, url: str, condition: Callable[[int, str], bool], purpose: str, *options: str) -> None:
    began = time.monotonic()
    while time.monotonic() < began + TIMEOUT_S:
        if condition(*layers.ask(url, *options)):
            print(f"{purpose}: after {time.monotonic() - began:.0f} s", flush=True)
            return
        time.sleep(POLL_S)
    raise UserError(f"The rehearsal failed: {purpose}: not within {TIMEOUT_S:.0f} s.")


if __name__ == "__main__":
    run_command(rehearse)
