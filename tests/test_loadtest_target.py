"""Which server a run is put on, and which dashboard it watches."""

import json
from pathlib import Path
from typing import Any

import pytest

from loadtest import Mistake
from loadtest.__main__ import local, target_of
from loadtest.options import parser
from loadtest.session import guard
from tests.test_loadtest_cluster import ANSWERS, cluster


def asked(tmp_path: Path, *arguments: str) -> Any:
    return parser(None).parse_args(["run", *arguments, "--run-dir", str(tmp_path)])


def test_without_a_cluster_it_is_port_8000_of_this_machine(tmp_path: Path) -> None:
    found = target_of(asked(tmp_path))
    assert (found.url, found.dashboard) == ("http://127.0.0.1:8000", None)
    assert local(tmp_path / "nowhere") == (None, None)


def test_a_dashboard_that_is_named_is_asked_with_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = tmp_path / "auth_token"
    token.write_text("abc\n")
    for module in ("loadtest.__main__", "ops.places"):
        monkeypatch.setattr(f"{module}.token_file", lambda: token)
    with cluster(ANSWERS) as url:
        found = target_of(asked(tmp_path, "--dashboard", url)).dashboard
        assert found and found.headers == {"Authorization": "Bearer abc"}
        assert found.details() == json.loads(json.dumps(ANSWERS["/api/serve/applications/"]))
    with pytest.raises(Mistake, match="not this machine"):
        target_of(asked(tmp_path, "--dashboard", "http://192.0.2.1:8265"))


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000", "http://localhost:8000/", "http://[::1]:8000"])
def test_every_name_of_this_machine_may_be_loaded(url: str) -> None:
    assert guard(url, allow_remote=False) == url.rstrip("/")


@pytest.mark.parametrize("url", ["http://192.0.2.1", "http://[2001:db8::1]:80", "http://0.0.0.1"])
def test_any_other_needs_the_flag(url: str) -> None:
    with pytest.raises(Mistake, match="not this machine"):
        guard(url, allow_remote=False)
    assert guard(url, allow_remote=True) == url


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "http://", "http://a:b:c", "http://u@127.0.0.1", "http://127.0.0.1/?a"]
)
def test_what_is_no_address_of_a_server_is_told(url: str) -> None:
    with pytest.raises(Mistake, match="The URL must be like http://127.0.0.1:8000"):
        guard(url, allow_remote=True)
