"""Jobs over HTTP: the routes, with fake replicas and a real database."""

import json
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from starlette.testclient import TestClient

from app.api.api_keys import digest_of
from app.api.errors import ApiError
from app.api.ingress import APIIngress
from app.api.messages import Accepted, ImageRequest, Progress
from tests.api.conftest import with_jobs
from tests.api.test_ingress import SERVICE, Items, Replicas, local_client, no_replicas, pictures, post
from tests.clusters import soon


def accepted(client: TestClient, headers: dict[str, str] | None = None, **fields: Any) -> dict[str, Any]:
    answer = client.post("/v1/images/generations", json={"prompt": "a", "async": True, **fields}, headers=headers)
    assert answer.status_code == 202, answer.text
    job: dict[str, Any] = answer.json()
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    return job


def state(client: TestClient, id: str, headers: dict[str, str] | None = None) -> dict[str, Any]:
    answer = client.get(f"/v1/jobs/{id}", headers=headers)
    assert answer.status_code == 200, answer.text
    job: dict[str, Any] = answer.json()
    return job


def ended(client: TestClient, id: str, status: str = "completed") -> dict[str, Any]:
    assert soon(lambda: state(client, id)["status"] == status, 20), state(client, id)
    return state(client, id)


def hold(ingress: APIIngress) -> list[Items]:
    """Has the replicas begin, and never end, what they get."""
    progress = Progress("running", 0, 3, 12, 9.0)
    ingress.replicas.generate_stream.outcome = lambda request: [Accepted(), progress, None]
    answers: list[Items] = ingress.replicas.generate_stream.answers
    return answers


def test_a_job_is_drawn_and_its_pictures_are_those_of_its_seeds(client: TestClient) -> None:
    job = accepted(client, seed=7, n=2, output_format="webp")
    assert job["object"] == "job" and job["model"] == "tiny" and job["error"] is None
    done = ended(client, job["id"])
    assert [client.get(picture["url"]).content for picture in done["result"]["data"]] == [b"webp 7", b"webp 8"]
    assert [picture["seed"] for picture in done["result"]["data"]] == [7, 8]
    assert done["result"]["num_inference_steps"] == 12 and done["result"]["timings"]["device_s"] == 0.75
    assert done["progress"] == 100 and done["attempts"] == 1 and done["position"] is None
    described = client.get("/openapi.json").json()
    schema = Draft202012Validator({"$ref": "#/components/schemas/Job", "components": described["components"]})
    assert schema.is_valid(job) and schema.is_valid(done) and not schema.is_valid(done | {"status": "done"})
    assert done["created_at"] <= done["started_at"] <= done["completed_at"] < done["expires_at"]


def test_a_preference_makes_a_job_unless_the_body_rules_it_out(client: TestClient) -> None:
    prefer = {"Prefer": "wait=5, respond-async"}
    answer = client.post("/v1/images/generations", json={"prompt": "a"}, headers=prefer)
    assert (answer.status_code, answer.headers["preference-applied"]) == (202, "respond-async")
    for fields in ({"response_format": "b64_json"}, {"stream": True}):
        assert client.post("/v1/images/generations", json={"prompt": "a", **fields}, headers=prefer).status_code == 200
    for other in ("respond-sync", "respond-async-never", "wait=5"):
        answer = client.post("/v1/images/generations", json={"prompt": "a"}, headers={"Prefer": other})
        assert answer.status_code == 200


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"async": 1}, "async", "async must be true or false, got 1."),
        ({"stream": True}, "stream", "stream must be false where async is true."),
        ({"response_format": "b64_json"}, "response_format", "response_format must be url where async is true."),
        ({"prompt": ""}, "prompt", "prompt must not be empty."),
        ({"webhook_url": "https://a.example"}, "webhook_url", "webhook_url is not supported here; leave it out."),
    ],
)
def test_a_request_that_no_job_can_answer_is_refused(
    client: TestClient, fields: dict[str, Any], param: str, message: str
) -> None:
    answer = post(client, **{"prompt": "a", "async": True, **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert answer.json()["error"]["message"] == message


def test_a_service_without_a_database_takes_no_jobs() -> None:
    with local_client(APIIngress(Replicas(), SERVICE)) as client:
        answer = post(client, prompt="a", **{"async": True})
        assert answer.json()["error"]["message"] == "async must be false: this service keeps no jobs."
        answer = client.post("/v1/images/generations", json={"prompt": "a"}, headers={"Prefer": "respond-async"})
        assert answer.status_code == 200


def test_a_job_stands_on_the_disk_before_its_answer(ingress: APIIngress, client: TestClient, tmp_path: Path) -> None:
    hold(ingress)
    id = accepted(client, seed=7)["id"]
    with sqlite3.connect(tmp_path / "state" / "jobs.sqlite3") as other_process:
        assert [*other_process.execute("SELECT id FROM jobs")] == [(id,)]


def test_a_running_job_tells_its_progress_and_a_waiting_one_its_place(ingress: APIIngress, client: TestClient) -> None:
    hold(ingress)
    running = accepted(client, n=3)["id"]  # of four places for images
    assert soon(lambda: state(client, running)["progress"] == 25)
    job = state(client, running)
    assert job["status"] == "in_progress" and 0 < job["estimated_s"] <= 9 and job["result"] is None
    waiting = [accepted(client, n=3)["id"] for _ in range(3)]
    assert soon(lambda: len(ingress.replicas.generate_stream.answers) == 2)
    shown = [state(client, id) for id in waiting[1:]]
    assert [(job["status"], job["position"], job["estimated_s"]) for job in shown] == [
        ("queued", 0, None),
        ("queued", 1, None),
    ]
    assert ingress.job_service
    ingress.job_service.share.spent(1000.0, 2.0, job=True)
    assert 0 < state(client, waiting[1])["estimated_s"] < state(client, waiting[2])["estimated_s"]


def test_the_statistics_count_jobs_and_the_bytes_of_files(
    ingress: APIIngress, client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.api.ingress.stats_of_all", no_replicas)

    def stats() -> object:
        return client.get("/v1/stats").json()["jobs"]

    assert stats() == {"queued": 0, "in_progress": 0, "file_bytes": 0} and not [*tmp_path.iterdir()]
    post(client, prompt="a", seed=7, response_format="url")
    answers = hold(ingress)
    for _ in range(3):
        accepted(client, n=3)
    assert soon(lambda: len(answers) == 2)
    assert stats() == {"queued": 1, "in_progress": 2, "file_bytes": len("png 7")}


def test_a_cancelled_job_leaves_its_replica_at_once(ingress: APIIngress, client: TestClient) -> None:
    answers = hold(ingress)
    id = accepted(client)["id"]
    assert soon(lambda: len(answers) == 1)
    assert client.delete(f"/v1/jobs/{id}").json()["status"] == "cancelled"
    assert soon(lambda: answers[0].cancelled)
    assert state(client, id)["status"] == "cancelled"


def test_a_deleted_job_takes_its_pictures_with_it(client: TestClient) -> None:
    id = accepted(client)["id"]
    (picture,) = ended(client, id)["result"]["data"]
    assert client.delete(f"/v1/jobs/{id}").json() == {"id": id, "object": "job", "deleted": True}
    assert client.get(f"/v1/jobs/{id}").status_code == client.get(picture["url"]).status_code == 404


def test_jobs_are_listed_from_the_newest_in_pages(client: TestClient) -> None:
    ids = [accepted(client)["id"] for _ in range(3)]
    first = client.get("/v1/jobs?limit=2").json()
    assert [job["id"] for job in first["data"]] == [ids[2], ids[1]] and first["has_more"]
    second = client.get(f"/v1/jobs?limit=2&after={ids[1]}").json()
    assert [job["id"] for job in second["data"]] == [ids[0]] and not second["has_more"]
    for query in ("limit=0", "limit=101", "limit=a", "before=3"):
        assert client.get(f"/v1/jobs?{query}").status_code == 400


def test_a_repeated_post_with_the_same_key_is_the_same_job(ingress: APIIngress, client: TestClient) -> None:
    key = {"Idempotency-Key": '"9f2c"'}
    first, second = (accepted(client, key)["id"] for _ in range(2))
    assert first == second != accepted(client)["id"]
    ended(client, first)
    assert accepted(client, key)["status"] == "completed"
    answer = client.post("/v1/images/generations", json={"prompt": "b", "async": True}, headers=key)
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "idempotency_key_reused")
    for malformed in ("", "a" * 256, '"a', "a b"):
        answer = client.post(
            "/v1/images/generations", json={"prompt": "a", "async": True}, headers={"Idempotency-Key": malformed}
        )
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_idempotency_key")


def test_a_key_sees_its_own_jobs_only(tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    entries = [f"- {{name: {name}, sha256: {digest_of(name.encode())}}}" for name in ("alice", "bob")]
    keys.write_text("\n".join([*entries, "..."]))
    ingress = APIIngress(Replicas(), with_jobs(tmp_path).service, keys)
    with local_client(ingress) as client:
        alice, bob = ({"Authorization": f"Bearer {name}", "Idempotency-Key": "1"} for name in ("alice", "bob"))
        job = accepted(client, alice)["id"]
        assert accepted(client, bob)["id"] != job
        assert [listed["id"] for listed in client.get("/v1/jobs", headers=alice).json()["data"]] == [job]
        assert client.get(f"/v1/jobs/{job}", headers=bob).status_code == 404
        assert client.delete(f"/v1/jobs/{job}", headers=bob).status_code == 404
        assert client.get(f"/v1/jobs/{job}", headers=alice).status_code == 200
        listed = client.get(f"/v1/jobs?after={job}", headers=bob).json()["data"]
        assert job not in [other["id"] for other in listed]


def test_jobs_beyond_the_limits_are_refused(tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    entries = [f"- {{name: {name}, sha256: {digest_of(name.encode())}}}" for name in ("alice", "bob")]
    keys.write_text("\n".join([*entries, "..."]))
    ingress = APIIngress(Replicas(), with_jobs(tmp_path, max_jobs=3, max_jobs_per_key=2).service, keys)
    hold(ingress)
    with local_client(ingress) as client:
        alice, bob = ({"Authorization": f"Bearer {name}"} for name in ("alice", "bob"))

        def refused(headers: dict[str, str]) -> tuple[int, str]:
            answer = client.post("/v1/images/generations", json={"prompt": "a", "async": True}, headers=headers)
            assert int(answer.headers["retry-after"]) > 0
            return answer.status_code, answer.json()["error"]["code"]

        accepted(client, alice), accepted(client, alice)
        assert refused(alice) == (429, "too_many_jobs")
        accepted(client, bob)
        assert refused(bob) == (503, "queue_full")


def test_what_will_never_go_well_fails_with_the_sentence_of_a_connected_request(
    ingress: APIIngress, client: TestClient
) -> None:
    error = ApiError(400, "sampler must be one of euler, got pndm.", "sampler", "invalid_value")
    ingress.replicas.generate_stream.outcome = lambda request: [error]
    job = ended(client, accepted(client)["id"], "failed")
    assert job["error"]["message"] == error.message and job["attempts"] == 1


def test_jobs_outlive_the_ingress_and_a_cleanly_stopped_one_leaves_them_to_the_next(tmp_path: Path) -> None:
    first = with_jobs(tmp_path)
    answers = hold(first)
    with local_client(first) as client:
        ids = [accepted(client, seed=seed)["id"] for seed in range(3)]
        assert soon(lambda: len(answers) == 3)
    assert all(answer.cancelled for answer in answers)
    with local_client(with_jobs(tmp_path)) as client:
        done = [ended(client, id) for id in ids]
        assert [client.get(job["result"]["data"][0]["url"]).content for job in done] == [b"png 0", b"png 1", b"png 2"]
        assert {job["attempts"] for job in done} == {1}


def test_a_webhook_is_told_when_its_job_has_ended(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text(f"whsec_{'a' * 40}")
    secret.chmod(0o600)
    ingress = with_jobs(tmp_path, webhook_hosts=["hooks.example.com"], webhook_secret_file=str(secret))
    delivered: list[tuple[str, Any]] = []

    async def post_to(url: str, body: bytes, headers: dict[str, str]) -> int:
        delivered.append((url, json.loads(body)))
        return 204

    assert ingress.job_service and ingress.job_service.webhooks
    ingress.job_service.webhooks.post = post_to
    with local_client(ingress) as client:
        id = accepted(client, webhook_url="https://hooks.example.com/a")["id"]
        assert soon(lambda: len(delivered) == 1, 20)
        assert state(client, id)["status"] == "completed"
    url, event = delivered[0]
    assert (url, event["type"], event["data"]["id"]) == ("https://hooks.example.com/a", "job.completed", id)


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"response_format": "url"}])
def test_a_client_counts_as_waiting_until_its_answer_has_ended(
    ingress: APIIngress, client: TestClient, fields: dict[str, Any]
) -> None:
    assert ingress.job_service
    share, counted = ingress.job_service.share, []

    def drawn(request: ImageRequest) -> Any:
        counted.append(share.connected)
        return pictures(request)

    ingress.replicas.generate.outcome = drawn
    ingress.replicas.generate_stream.outcome = lambda request: [Accepted(), drawn(request)]
    assert post(client, prompt="a", **fields).status_code == 200
    assert counted == [1] and share.connected == 0 and share.connected_s == 0.75
    ended(client, accepted(client)["id"])
    assert counted == [1, 0] and share.jobs_s == 0.75


def test_a_database_that_does_not_work_hides_no_other_statistics(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.api.ingress.stats_of_all", no_replicas)
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "jobs.sqlite3").write_bytes(b"not a database" * 100)
    stats = client.get("/v1/stats").json()
    assert "does not work" in stats["jobs"]["error"] and stats["replicas"] == {}


def test_an_ingress_that_keeps_nothing_writes_nothing(tmp_path: Path) -> None:
    with local_client(with_jobs(tmp_path)) as client:
        assert post(client, prompt="a").status_code == 200
        time.sleep(0)
    assert not [*tmp_path.iterdir()]


def test_a_database_that_cannot_be_opened_is_a_503_and_other_requests_go_on(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file where the folder should be")
    with local_client(with_jobs(tmp_path)) as client:
        answer = post(client, prompt="a", **{"async": True})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "database_failed")
        assert post(client, prompt="a").status_code == 200
