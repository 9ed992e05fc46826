"""Jobs and pictures by URL on a real Serve, as serve_config.yaml deploys them."""

import json
import subprocess
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from PIL import Image

from cluster import ROOT
from tests.clusters import fetch, soon
from tests.docs_commands import API, commands

pytestmark = pytest.mark.cluster

PROMPT = "a red boat at dusk"
BODY: dict[str, object] = {"prompt": PROMPT, "seed": 7, "num_inference_steps": 8}


def job_of(api: str, id: str) -> dict[str, Any]:
    status, body, _ = fetch(f"{api}/v1/jobs/{id}")
    assert status == 200, body
    job: dict[str, Any] = json.loads(body)
    return job


def test_a_job_has_the_picture_of_a_connected_request(api: str) -> None:
    status, body, headers = fetch(f"{api}/v1/images/generations", BODY | {"async": True})
    job = json.loads(body)
    location = {name.lower(): value for name, value in headers.items()}["location"]
    assert (status, location) == (202, f"/v1/jobs/{job['id']}")
    assert soon(lambda: job_of(api, job["id"])["status"] == "completed"), job_of(api, job["id"])
    (picture,) = job_of(api, job["id"])["result"]["data"]
    with OpenAI(base_url=f"{api}/v1", api_key="none") as client:
        answer = client.images.generate(
            prompt=PROMPT, response_format="url", extra_body={"seed": 7, "num_inference_steps": 8}
        )
    assert answer.data and answer.data[0].url
    pictures = [Image.open(BytesIO(fetch(url)[1])) for url in (picture["url"], answer.data[0].url)]
    assert pictures[0].tobytes() == pictures[1].tobytes() and pictures[0].size[0] > 0


def test_a_cancelled_job_frees_its_slot(api: str) -> None:
    body = BODY | {"async": True, "num_inference_steps": 100, "n": 4}
    ids = [json.loads(fetch(f"{api}/v1/images/generations", body)[1])["id"] for _ in range(2)]
    assert soon(lambda: job_of(api, ids[0])["status"] == "in_progress")
    for id in ids:
        done = subprocess.run(["curl", "-fsX", "DELETE", f"{api}/v1/jobs/{id}"], capture_output=True, text=True)
        assert json.loads(done.stdout)["status"] == "cancelled"

    def idle() -> bool:
        total = json.loads(fetch(f"{api}/v1/stats")[1])["total"]
        return total["unfinished"] == 0

    assert soon(idle)


def test_the_curls_of_the_page_on_jobs_work(api: str, tmp_path: Path) -> None:
    for command in commands(API, ROOT / "docs" / "http-jobs.md"):
        curl = command.replace("http://127.0.0.1:8000", api).replace("curl ", "curl --fail ", 1)
        done = subprocess.run(["bash", "-c", curl], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, (command, done.stdout[-500:], done.stderr)
