"""cluster/ray_client.py without a cluster; tests/on_cluster/test_verbs.py asks a real one."""

import os
import time
from pathlib import Path

import pytest

from cluster import auth_token, processes, ray_client
from cluster.cli import UserError


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if not k.startswith("RAY_")})


def test_without_a_cluster_none_is_started() -> None:
    """Ray itself would start one, and write a token into ~/.ray."""
    with pytest.raises(
        UserError, match=r"No Ray cluster is named here. Run it with `make job JOB=...`, or after: eval"
    ):
        ray_client.address()


def test_a_dashboards_address_is_told_from_rays_own() -> None:
    os.environ["RAY_ADDRESS"] = "http://127.0.0.1:8265"
    with pytest.raises(UserError, match="must be the host and port of Ray itself, got http://127.0.0.1:8265"):
        ray_client.address()


def test_a_cluster_that_is_gone_is_told_at_once() -> None:
    address = f"127.0.0.1:{processes.free_ports(1)[0]}"
    began = time.monotonic()
    with pytest.raises(UserError, match=f"No Ray cluster answers at {address}: unavailable"):
        ray_client.check(address)
    assert time.monotonic() - began < ray_client.TIMEOUT_S


def test_the_token_is_the_one_that_ray_would_send(tmp_path: Path) -> None:
    assert auth_token.of_this_process() == ("", "RAY_AUTH_MODE is not token")
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    assert auth_token.of_this_process() == ("", f"{tmp_path}/token cannot be read: No such file or directory")
    (tmp_path / "token").write_text(" \n")
    assert auth_token.of_this_process() == ("", f"{tmp_path}/token holds no token")
    (tmp_path / "token").write_text("of-the-file\n")
    assert auth_token.of_this_process() == ("of-the-file", f"{tmp_path}/token")
    os.environ["RAY_AUTH_TOKEN"] = "of-the-environment"
    assert auth_token.of_this_process() == ("of-the-environment", "RAY_AUTH_TOKEN")
    os.environ["RAY_AUTH_TOKEN"] = "two words"
    assert auth_token.of_this_process() == ("", "RAY_AUTH_TOKEN holds no token")
