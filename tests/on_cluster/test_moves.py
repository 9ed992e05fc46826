"""Images that move between replicas of a real deployment, whose devices only take time."""

import base64
import json
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from app.engine.virtual import number_of
from cluster import ROOT
from tests.clusters import Verbs, fetch, put_config, soon, succeeds
from tests.paced_app import STEP_S

pytestmark = pytest.mark.cluster

STEPS = 100


def paced_config(port: int, replicas: int, chips: int) -> dict[str, Any]:
    """serve_config.yaml, with so many replicas whose devices only take time."""
    content: dict[str, Any] = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    content["http_options"]["port"] = port
    (application,) = content["applications"]
    application["import_path"] = "tests.paced_app:paced"
    application["args"] |= {"sizes": ["64x64"], "batch_buckets": [1, 2, 4], "jobs": {"database": None}}
    (model,) = [deployment for deployment in application["deployments"] if deployment["name"] == "StableDiffusion"]
    del model["autoscaling_config"]
    model["num_replicas"] = replicas
    model["ray_actor_options"] = {"num_cpus": 0.1, "resources": {"TPU": chips}}
    return content


@pytest.fixture(scope="module")
def api(verbs: Verbs, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two replicas that share a node."""
    path = tmp_path_factory.mktemp("moves") / "paced.yaml"
    path.write_text(yaml.safe_dump(paced_config(verbs.serve_port, 2, chips=1)))
    succeeds(verbs("deploy", "undeploy"))  # whose replica would hold the chips of the only node
    succeeds(verbs.deploy(path))
    return f"http://127.0.0.1:{verbs.serve_port}"


def drawn(encoded: str) -> int:
    """The seed plus the steps of a picture."""
    return number_of(np.asarray(Image.open(BytesIO(base64.b64decode(encoded)))))


def whole(api: str, seed: int) -> dict[str, Any]:
    status, body, _ = fetch(f"{api}/v1/images/generations", {"prompt": "a", "num_inference_steps": STEPS, "seed": seed})
    assert status == 200, body
    answer: dict[str, Any] = json.loads(body)
    assert drawn(answer["data"][0]["b64_json"]) == seed + STEPS
    return answer


def streamed(api: str, seed: int) -> dict[str, Any]:
    request = {"prompt": "a", "num_inference_steps": STEPS, "seed": seed, "stream": True, "partial_images": 3}
    status, body, _ = fetch(f"{api}/v1/images/generations", request)
    events = [json.loads(line[6:]) for line in body.decode().splitlines() if line.startswith("data: ")]
    assert status == 200 and drawn(events[-1]["b64_json"]) == seed + STEPS, events[-1]
    assert [event["partial_image_index"] for event in events[:-1]] == [0, 1, 2]
    last: dict[str, Any] = events[-1]
    return last


def running(api: str) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(fetch(f"{api}/v1/stats")[1])
    return {name: stats for name, stats in answer["replicas"].items() if stats.get("active_slots")}


def queue(api: str) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(fetch(f"{api}/v1/stats")[1])["queue"]
    return answer


def test_a_request_that_waits_in_a_replica_goes_to_one_that_becomes_free(verbs: Verbs, api: str) -> None:
    """The third request waits behind the first, which ends sooner than the second. The second's client hangs up."""

    def first_is_ahead() -> bool:
        pages = queue(api)["replicas"].values()
        return sum(page["usable"] for page in pages) == 2 and 0 < max(page["backlog_s"] for page in pages) < ahead_s

    ahead_s = 0.95 * STEPS * STEP_S
    second = HTTPConnection("127.0.0.1", verbs.serve_port, timeout=30)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(whole, api, 10_000)
        assert soon(first_is_ahead)
        body = json.dumps({"prompt": "a", "num_inference_steps": STEPS, "seed": 20_000})
        second.request("POST", "/v1/images/generations", body, {"Content-Type": "application/json"})
        assert soon(lambda: len(running(api)) == 2)
        third = pool.submit(whole, api, 30_000)
        assert soon(lambda: sum(page["requests"] for page in queue(api)["replicas"].values()) == 3)
        second.close()
        answers = [first.result(), third.result()]
    assert [(answer.get("moves", 0), answer.get("restarts", 0)) for answer in answers] == [(0, 0), (1, 0)]
    assert queue(api)["rebalanced"] == 1


def test_a_replica_that_is_taken_away_is_empty_at_once_and_its_images_are_finished_elsewhere(
    verbs: Verbs, api: str
) -> None:
    """A picture takes 4 s alone, and the eight of them 16 s on two replicas. Serve ends one replica meanwhile."""
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(streamed if seed % 2 else whole, api, 1000 * seed) for seed in range(8)]
        assert soon(lambda: len(running(api)) == 2)
        began = time.monotonic()
        put_config(verbs, paced_config(verbs.serve_port, 1, chips=1))
        assert soon(lambda: len(running(api)) == 1)
        print(f"one replica at work {time.monotonic() - began:.1f} s after this was wanted")
        answers = [future.result() for future in futures]
    moved = [answer for answer in answers if answer.get("moves")]
    assert moved and not [answer for answer in answers if answer.get("restarts")]
    device_s = [answer["timings"]["device_s"] for answer in answers]
    print(f"{len(moved)} moved; device seconds {device_s}")
    assert max(device_s) < 1.5 * (STEPS + 1) * STEP_S, "no step is repeated"
    assert soon(lambda: json.loads(fetch(f"{api}/v1/stats")[1])["total"]["unfinished"] == 0)
