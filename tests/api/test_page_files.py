"""The page's files: who gets them, and that nothing in them comes from elsewhere or could run inline."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from app.api.ingress import APIIngress
from app.api.page_files import FOLDER, PREFIX, page_files, prefers_html
from tests.api.test_api_keys import entry, write
from tests.api.test_ingress import SERVICE, Replicas, local_client

BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,image/webp,*/*;q=0.8"}
TAB = {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}


@pytest.fixture
def client() -> Iterator[TestClient]:
    with local_client(APIIngress(Replicas(), SERVICE)) as client:
        yield client


@pytest.mark.parametrize(
    ("accept", "html"),
    [
        (BROWSER["Accept"], True),
        ("text/html", True),
        ("TEXT/HTML; charset=utf-8", True),
        ("application/json;q=0.5, text/html;q=0.9", True),
        ("*/*", False),
        ("", False),
        ("application/json", False),
        ("application/json, text/html;q=0.9", False),
        ("text/html;q=0", False),
        ("text/html;q=much", False),
        ("text/*", False),
    ],
)
def test_whoever_names_html_gets_the_page_and_all_others_json(client: TestClient, accept: str, html: bool) -> None:
    assert prefers_html(accept) == html
    answer = client.get("/", headers={"Accept": accept})
    kind = "text/html; charset=utf-8" if html else "application/json"
    assert (answer.status_code, answer.headers["content-type"], answer.headers["vary"]) == (200, kind, "Accept")


def test_every_file_has_a_strict_policy_and_is_not_sent_twice(client: TestClient) -> None:
    for name, file in page_files().items():
        answer = client.get(f"{PREFIX}{name}")
        assert answer.content == file.content and answer.headers["content-type"] == file.media_type
        policy = dict(part.strip().partition(" ")[::2] for part in answer.headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'" and policy["frame-ancestors"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert "unsafe" not in str(policy) and answer.headers["x-content-type-options"] == "nosniff"
        again = client.get(f"{PREFIX}{name}", headers={"If-None-Match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("name", ["nothing.js", "../ingress.py", "%2e%2e/ingress.py", ".", "page_files.py", "main.js/"])
def test_no_other_file_is_served(client: TestClient, name: str) -> None:
    answer = client.get(f"{PREFIX}{name}")
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "not_found"


def test_the_files_load_nothing_from_elsewhere_and_have_nothing_inline() -> None:
    index = page_files()["index.html"].content.decode()
    assert not re.search(r"<script(?![^>]* src=)|<style|\sstyle=|\son[a-z]+=|javascript:", index)
    referred = {name for name in re.findall(r'(?:src|href)="([^"#][^"]*)"', index)}
    assert referred <= {f"page/{name}" for name in page_files()} | {"openapi.json"}
    for name, file in page_files().items():
        text = file.content.decode()
        hosts = set(re.findall(r"https?://([^/\s\"'`$]+)", text)) - {"www.w3.org"}  # the namespace of SVG
        assert not hosts, name
        if name.endswith(".js"):
            assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|\beval\(|new Function", text), name
            imported = re.findall(r'from "\./([^"]+)"', text)
            assert {*imported} <= page_files().keys(), name


def test_the_folder_has_nothing_that_is_not_served() -> None:
    assert {path.name for path in FOLDER.iterdir()} == page_files().keys()


def test_with_keys_the_files_need_none_and_the_api_does(tmp_path: Path) -> None:
    file = write(tmp_path / "keys.yaml", entry("alice", "imagine-key"))
    with local_client(APIIngress(Replicas(), SERVICE, file)) as client:
        assert client.get("/", headers=BROWSER).status_code == 200
        assert all(client.get(f"{PREFIX}{name}").status_code == 200 for name in page_files())
        assert client.get("/v1/models").status_code == 401
        assert client.get("/openapi.json").status_code == 401


# Without keys: the page's own requests, through whatever port of this machine, and nobody else's.


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:9123", "[::1]:8000", "draw.localhost"])
def test_the_page_may_ask_through_any_port_of_this_machine(client: TestClient, host: str) -> None:
    own = {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}
    assert client.get("/", headers=BROWSER | TAB | {"Host": host, "Sec-Fetch-Site": "none"}).status_code == 200
    assert client.get(f"{PREFIX}main.js", headers=own).status_code == 200
    assert client.get("/v1/models", headers=own).status_code == 200
    assert client.post("/v1/images/generations", headers=own, json={"prompt": "a"}).status_code == 200


FOREIGN = [
    {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Origin": "http://localhost:3000", "Sec-Fetch-Site": "same-site"},
    {"Host": "evil.example:8000", "Origin": "http://evil.example:8000", "Sec-Fetch-Site": "same-origin"},
]


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_no_other_page_may_ask_or_load_the_files(client: TestClient, headers: dict[str, str]) -> None:
    for path in ("/v1/models", "/v1/stats", "/openapi.json", f"{PREFIX}main.js", "/"):
        assert client.get(path, headers=headers).status_code == 403, path


def test_a_link_of_another_site_leads_to_the_page_and_to_nothing_else(client: TestClient) -> None:
    link = BROWSER | TAB | {"Sec-Fetch-Site": "cross-site"}
    assert client.get("/", headers=link).headers["content-type"].startswith("text/html")
    for path in ("/imagine?prompt=a", "/v1/models", f"{PREFIX}main.js"):
        assert client.get(path, headers=link).status_code == 403
    for other in ({"Sec-Fetch-Dest": "iframe"}, {"Sec-Fetch-Mode": "no-cors"}, {"Host": "evil.example"}):
        assert client.get("/", headers=link | other).status_code == 403
