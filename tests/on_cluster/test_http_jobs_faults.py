"""Two hundred jobs while what draws them is killed ten times: every picture is there, once, and that of its seed.

make test-http-jobs-faults
"""

import json
import os
import signal
import time
from collections.abc import Callable
from http.client import HTTPException
from io import BytesIO
from typing import Any
from urllib.error import URLError

import numpy as np
import psutil
import pytest
import yaml
from PIL import Image

from tests.clusters import Verbs, fetch, soon, succeeds

pytestmark = [pytest.mark.cluster, pytest.mark.faults]

JOBS = 200
KILLS = [
    "ingress",
    "replica",
    "controller",
    "ingress",
    "replica",
    "head",
    "replica",
    "ingress",
    "controller",
    "replica",
]
RECOVERY_S = 300.0
BODY = {"prompt": "a red boat at dusk", "num_inference_steps": 30, "guidance_scale": 4.0}
PROCESSES = {
    "ingress": "ServeReplica:text-to-image:APIIngress",
    "replica": "ServeReplica:text-to-image:StableDiffusion",
    "controller": "ServeController",
    "head": "gcs_server",
}


@pytest.fixture(scope="module")
def deploy(verbs: Verbs) -> Callable[[], str]:
    """The shipped config with one small size, and quick health checks of the model."""
    content: dict[str, Any] = yaml.safe_load(verbs.config.read_text())
    (application,) = content["applications"]
    content["http_options"]["port"] = verbs.serve_port
    application["args"] |= {"batch_buckets": [1, 2], "sizes": ["64x64"]}
    for deployment in application["deployments"]:
        deployment |= {"health_check_period_s": 1, "health_check_timeout_s": 4}
    file = verbs.run_dir / "http-jobs-faults.yaml"
    file.write_text(yaml.safe_dump(content))

    def run() -> str:
        succeeds(verbs.deploy(file))
        return f"http://127.0.0.1:{verbs.serve_port}"

    return run


def answered(api: str, path: str, body: object = None) -> Any:
    """Asks again while nothing answers, or answers that it cannot now."""
    deadline = time.monotonic() + RECOVERY_S
    while time.monotonic() < deadline:
        try:
            status, content, _ = fetch(f"{api}{path}", body, 20)
            if status < 500:
                assert status in (200, 202), content
                return content
        except (URLError, OSError, HTTPException):
            pass
        time.sleep(0.2)
    raise AssertionError(f"{path} was not answered within {RECOVERY_S:g} s")


def processes_of(verbs: Verbs, part: str) -> list[psutil.Process]:
    matching = []
    for process in verbs.cluster.search():
        try:
            if PROCESSES[part] in " ".join(process.cmdline()):
                matching.append(process)
        except psutil.Error:
            continue
    return matching


def kill(verbs: Verbs, part: str) -> None:
    for process in processes_of(verbs, part):
        os.kill(process.pid, signal.SIGKILL)


def wait_until_completed(api: str, ids: list[str], count: int) -> None:
    """The jobs go in their order, but for those that were put off."""

    def enough() -> bool:
        states = [json.loads(answered(api, f"/v1/jobs/{id}"))["status"] for id in ids]
        assert not {*states} - {"queued", "in_progress", "completed"}, states
        return states.count("completed") >= count

    assert soon(enough, RECOVERY_S)


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(png)).convert("RGB")).astype(int)


def test_two_hundred_jobs_and_ten_kills_make_two_hundred_pictures(verbs: Verbs, deploy: Callable[[], str]) -> None:
    api = deploy()  # the same address after each start
    answered(api, "/healthz")
    ids = []
    for seed in range(JOBS):
        body = BODY | {"seed": 1000 + seed, "async": True}
        ids.append(json.loads(answered(api, "/v1/images/generations", body))["id"])
    share = JOBS // (len(KILLS) + 1)
    for number, part in enumerate(KILLS):
        window = ids[number * share : (number + 1) * share]
        wait_until_completed(api, window, share // 2)
        began = time.monotonic()
        kill(verbs, part)
        if part == "head":
            verbs.down()
            succeeds(verbs.up())
            deploy()
        wait_until_completed(api, window, share)
        print(f"| {part} killed | {time.monotonic() - began:.1f} s until the jobs around it were completed |")
    wait_until_completed(api, ids, JOBS)

    jobs = [json.loads(answered(api, f"/v1/jobs/{id}")) for id in ids]
    runs = sum(job["attempts"] for job in jobs)
    urls = [picture["url"] for job in jobs for picture in job["result"]["data"]]
    assert len(set(urls)) == len(urls) == JOBS
    drawn = [pixels(answered(api, url.removeprefix(api))) for url in urls]
    assert [picture["seed"] for job in jobs for picture in job["result"]["data"]] == [1000 + i for i in range(JOBS)]
    worst = 0
    for seed in range(JOBS):
        query = "&".join(f"{name}={value}" for name, value in BODY.items() | {"seed": 1000 + seed}.items())
        alone = pixels(answered(api, f"/imagine?{query.replace(' ', '+')}"))
        worst = max(worst, int(abs(alone - drawn[seed]).max()))
    print(f"{JOBS} jobs, {len(KILLS)} kills, {runs} runs, {len(urls)} pictures; at most {worst} grey levels from alone")
    assert worst <= 1, "the picture of its seed; across buckets within one grey level"
    assert len({picture.tobytes() for picture in drawn}) == JOBS
