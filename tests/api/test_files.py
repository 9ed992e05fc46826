"""Pictures behind URLs: storage, ranges, expiry, and who may read them."""

import os
import stat
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from app.api.api_keys import digest_of
from app.api.files.files import Files
from app.api.files.ranges import Unsatisfiable, byte_range
from app.api.files.storage import Folder, Storage, storage_at
from app.api.ingress import APIIngress
from tests.api.conftest import with_jobs
from tests.api.test_ingress import SERVICE, Replicas, local_client, post

PICTURE = b"png 7"  # what the fake replicas draw of seed 7


def files_of(ingress: APIIngress) -> Files:
    assert ingress.job_service
    return ingress.job_service.files


def kept(client: TestClient) -> str:
    (picture,) = post(client, prompt="a", seed=7, response_format="url").json()["data"]
    assert picture.keys() == {"url", "seed"}
    return str(picture["url"])


def test_a_picture_is_behind_a_url_at_the_address_that_the_client_used(client: TestClient) -> None:
    url = kept(client)
    assert url.startswith("http://127.0.0.1/v1/files/") and url.endswith(".png")
    answer = client.get(url)
    assert (answer.status_code, answer.content) == (200, PICTURE)
    expected = {
        "content-type": "image/png",
        "content-length": "5",
        "accept-ranges": "bytes",
        "x-content-type-options": "nosniff",
    }
    assert {name: answer.headers[name] for name in expected} == expected
    assert answer.headers["cache-control"].startswith("private, max-age=3") and "etag" in answer.headers
    head = client.head(url)
    assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", "5")


def test_a_configured_address_is_that_of_the_urls(tmp_path: Path) -> None:
    with local_client(with_jobs(tmp_path, base_url="https://images.example.com/api")) as client:
        assert kept(client).startswith("https://images.example.com/api/v1/files/")


def test_each_of_several_pictures_has_a_url_of_its_own(client: TestClient) -> None:
    data = post(client, prompt="a", seed=7, n=3, response_format="url", output_format="webp").json()["data"]
    assert [client.get(picture["url"]).content for picture in data] == [b"webp 7", b"webp 8", b"webp 9"]
    assert client.get(data[0]["url"]).headers["content-type"] == "image/webp"


def test_a_range_is_answered_and_one_beyond_the_end_refused(client: TestClient) -> None:
    url = kept(client)
    part = client.get(url, headers={"Range": "bytes=1-2"})
    assert (part.status_code, part.content, part.headers["content-range"]) == (206, b"ng", "bytes 1-2/5")
    beyond = client.get(url, headers={"Range": "bytes=5-"})
    assert (beyond.status_code, beyond.headers["content-range"]) == (416, "bytes */5")
    tag = part.headers["etag"]
    assert client.get(url, headers={"Range": "bytes=1-2", "If-Range": tag}).status_code == 206
    assert client.get(url, headers={"Range": "bytes=1-2", "If-Range": '"another"'}).status_code == 200
    for header in (tag, f"W/{tag}", "*", f'"a", {tag}'):
        assert client.get(url, headers={"If-None-Match": header}).status_code == 304
    assert client.get(url, headers={"If-None-Match": '"another"'}).status_code == 200


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, None),
        ("bytes=0-0", range(0, 1)),
        ("Bytes = 2-", range(2, 10)),
        ("bytes=-3", range(7, 10)),
        ("bytes=-30", range(0, 10)),
        ("bytes=8-99", range(8, 10)),
        ("bytes=3-2", None),
        ("bytes=0-1,4-5", None),
        ("bytes=-", None),
        ("bytes=a-b", None),
        ("lines=0-1", None),
    ],
)
def test_ranges_are_read_as_the_rfc_has_them(header: str | None, expected: range | None) -> None:
    assert byte_range(header, 10) == expected


@pytest.mark.parametrize("header", ["bytes=10-", "bytes=11-12", "bytes=-0"])
def test_a_range_without_a_byte_of_the_file_cannot_be_satisfied(header: str) -> None:
    with pytest.raises(Unsatisfiable):
        byte_range(header, 10)


def test_a_file_expires_and_is_gone_from_the_disk(ingress: APIIngress, client: TestClient, tmp_path: Path) -> None:
    url = kept(client)
    files = files_of(ingress)
    later = files.clock() + 3601
    files.clock = lambda: later
    assert client.get(url).status_code == 404
    assert client.portal and client.portal.call(files.sweep) == 1
    assert not [*(tmp_path / "files").iterdir()]


def test_files_and_database_can_be_read_by_their_user_alone(client: TestClient, tmp_path: Path) -> None:
    kept(client)
    for path in (*(tmp_path / "files").iterdir(), *(tmp_path / "state").iterdir()):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert (
        stat.S_IMODE((tmp_path / "files").stat().st_mode) == stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
    )


@pytest.mark.parametrize(
    "name",
    [
        "",
        "..",
        "..%2f..%2fetc%2fpasswd",
        "a.png",
        f"{'a' * 32}",
        f"{'a' * 32}.png",
        f"{'a' * 32}.npy",
        f"{'a' * 33}.png",
    ],
)
def test_no_other_name_leads_to_a_file(client: TestClient, name: str) -> None:
    kept(client)
    assert client.get(f"/v1/files/{name}").status_code == 404


def test_a_file_answers_to_its_own_name_only(client: TestClient) -> None:
    assert client.get(kept(client).replace(".png", ".webp")).status_code == 404


def test_another_keys_file_is_as_one_that_is_not_there(tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    entries = [f"- {{name: {name}, sha256: {digest_of(name.encode())}}}" for name in ("alice", "bob")]
    keys.write_text("\n".join([*entries, "..."]))
    plain = with_jobs(tmp_path)
    with local_client(APIIngress(Replicas(), plain.service, keys)) as client:
        alice, bob = ({"Authorization": f"Bearer {name}"} for name in ("alice", "bob"))
        body = {"prompt": "a", "seed": 7, "response_format": "url"}
        url = client.post("/v1/images/generations", json=body, headers=alice).json()["data"][0]["url"]
        assert client.get(url, headers=alice).content == PICTURE
        assert client.get(url, headers=bob).status_code == 404
        assert client.get(url).status_code == 401


def test_nothing_is_drawn_while_no_more_can_be_kept(tmp_path: Path) -> None:
    ingress = with_jobs(tmp_path)
    with local_client(ingress) as client:
        kept(client)
        files_of(ingress).max_bytes = 5
        drawn = len(ingress.replicas.generate.calls)
        answer = post(client, prompt="a", response_format="url")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "storage_full")
        assert len(ingress.replicas.generate.calls) == drawn


def test_a_service_without_a_database_keeps_no_picture() -> None:
    with local_client(APIIngress(Replicas(), SERVICE)) as client:
        answer = post(client, prompt="a", response_format="url").json()["error"]
        assert answer["message"] == 'response_format must be b64_json, got "url".'
        answer = client.get("/v1/files/a.png").json()["error"]
        assert answer["message"] == "This service keeps neither jobs nor files: args.jobs.database is null."


@pytest.fixture(params=["folder", "fsspec"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return storage_at(str(tmp_path / "files") if request.param == "folder" else "memory://bucket/prefix")


def test_a_storage_gives_back_what_was_written(storage: Storage) -> None:
    storage.write("a.png", b"0123456789")
    assert storage.read("a.png", 0, 10) == b"0123456789" and storage.read("a.png", 3, 5) == b"34"
    storage.write("a.png", b"abc")
    assert storage.read("a.png", 0, 3) == b"abc"
    storage.delete("a.png")
    storage.delete("a.png")
    with pytest.raises(FileNotFoundError):
        storage.read("a.png", 0, 3)


def test_a_write_that_dies_leaves_nothing_that_could_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda descriptor: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        folder.write("a.png", b"abc")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png.part"]
    folder.delete("a.png")  # as the sweep does, for its row has stood since before
    assert not [*tmp_path.iterdir()]


def test_a_url_that_nothing_here_can_open_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^must be a folder or a URL that fsspec can open, got nowhere://bucket: "):
        storage_at("nowhere://bucket")
