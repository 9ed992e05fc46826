"""The server that a run loads, and the dashboard that it watches."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import UsageError
from loadtest.__main__ import local, target_of
from loadtest.options import parser
from loadtest.session import guard
from tests.loadtest.test_cluster import ANSWERS, cluster


def options(tmp_path: Path, *arguments: str) -> Any:
    return parser(None).parse_args(["run", *arguments, "--run-dir", str(tmp_path)])


def test_without_a_cluster_the_target_is_port_8000_of_this_machine(tmp_path: Path) -> None:
    target = target_of(options(tmp_path))
    assert (target.url, target.dashboard) == ("http://127.0.0.1:8000", None)
    assert local(tmp_path / "nowhere") == (None, None)


def test_a_dashboard_given_by_its_url_gets_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = tmp_path / "auth_token"
    token.write_text("abc\n")
    for module in ("loadtest.__main__", "cluster.connection"):
        monkeypatch.setattr(f"{module}.token_file", lambda: token)
    with cluster(ANSWERS) as url:
        dashboard = target_of(options(tmp_path, "--dashboard", url)).dashboard
        assert dashboard and dashboard.headers == {"Authorization": "Bearer abc"}
        assert dashboard.details() == json.loads(json.dumps(ANSWERS["/api/serve/applications/"]))
    with pytest.raises(UsageError, match="is another machine"):
        target_of(options(tmp_path, "--dashboard", "http://192.0.2.1:8265"))


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000", "http://localhost:8000/", "http://[::1]:8000"])
def test_every_name_of_this_machine_may_be_loaded(url: str) -> None:
    assert guard(url, allow_remote=False) == url.rstrip("/")


def test_this_machine_by_its_own_address_may_be_loaded() -> None:
    """The kernel names this machine's address as the source of outgoing packets."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no address beyond loopback")
        own = probe.getsockname()[0]
    assert guard(f"http://{own}:8000", allow_remote=False) == f"http://{own}:8000"


def test_a_refused_name_is_reported_with_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(*_: object, **__: object) -> list[object]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.7", 80))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(UsageError, match=r"^api\.example, which is 192\.0\.2\.7, is another machine\."):
        guard("http://api.example", allow_remote=False)


FLAGS = ("--save_pictures", "--save-pictures")


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ([], True),
        (["True"], True),
        (["true"], True),
        (["1"], True),
        (["False"], False),
        (["false"], False),
        (["0"], False),
    ],
)
def test_a_switch_takes_the_predecessors_truth_values(flag: str, value: list[str], wanted: bool) -> None:
    joined = [f"{flag}={part}" for part in value] or [flag]
    for words in ([flag, *value], joined):
        options = parser(None).parse_args(["run", *words])
        assert options.save_pictures is wanted and options.scenario is None
        options = parser(None).parse_args(["run", *words, "smoke", "--stream"])
        assert options.save_pictures is wanted and options.scenario == "smoke" and options.stream is True


@pytest.mark.parametrize("url", ["http://192.0.2.1", "http://[2001:db8::1]:80", "http://0.0.0.1"])
def test_another_machine_needs_the_flag(url: str) -> None:
    with pytest.raises(UsageError, match="is another machine"):
        guard(url, allow_remote=False)
    assert guard(url, allow_remote=True) == url


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "http://", "http://a:b:c", "http://u@127.0.0.1", "http://127.0.0.1/?a"]
)
def test_a_malformed_url_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="The URL must be like http://127.0.0.1:8000"):
        guard(url, allow_remote=True)
