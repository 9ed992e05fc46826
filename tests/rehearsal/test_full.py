"""rehearsal/full.py and what it is made of, without root. `make rehearse` is the whole of it."""

import difflib
import os
import shutil
from pathlib import Path

import pytest
import yaml

pytest.importorskip("googleapiclient", reason="needs Google's client: make gcp")

from cluster import ROOT
from cluster.cli import UserError
from cluster.config.lint import refuse_errors
from rehearsal import full, hosts, image, stage
from rehearsal.books import Books, Project

CLUSTERS = [ROOT / "cluster.yaml", *sorted((ROOT / "configs").glob("cluster-*.yaml"))]


def test_without_root_or_a_program_it_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(UserError, match="^A rehearsal with hosts needs root on Linux; without: make rehearse-calls$"):
        stage.check()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "rsync" else name)
    with pytest.raises(UserError, match=r"^A rehearsal with hosts needs rsync\.$"):
        stage.check()


def test_the_deployed_config_differs_from_the_shipped_one_in_three_lines(tmp_path: Path) -> None:
    shipped, changed = (ROOT / "serve_config.yaml").read_text(), full.without_tpu(tmp_path).read_text()
    added = [line for line in difflib.ndiff(shipped.splitlines(), changed.splitlines()) if line.startswith("+")]
    buckets, target, environment = (line.removeprefix("+").strip() for line in added)
    assert buckets.startswith("batch_buckets: [1] #")
    assert target.startswith("target_ongoing_requests: 4 #")
    assert environment == "runtime_env: {env_vars: {JAX_PLATFORMS: cpu}}"
    refuse_errors([tmp_path / "serve_config.yaml"])


@pytest.mark.parametrize("cluster", CLUSTERS, ids=[file.stem for file in CLUSTERS])
def test_a_rehearsal_copies_the_folders_that_every_cluster_file_mounts(cluster: Path) -> None:
    mounts = yaml.safe_load(cluster.read_text())["file_mounts"].values()
    assert {mount for mount in mounts if not mount.startswith("~")} == {*stage.MOUNTED}


def test_a_host_takes_the_projects_ssh_keys_for_its_user(tmp_path: Path) -> None:
    project = Project("my-project")
    lines = "ubuntu:ssh-rsa AAAA ubuntu\nother:ssh-rsa BBBB other"
    project.metadata["items"] = [{"key": "ssh-keys", "value": lines}]
    assert hosts.keys(Books(project, lambda: 0.0)) == "ssh-rsa AAAA ubuntu\n"


def test_the_hosts_get_the_uv_that_cluster_yaml_asks_for() -> None:
    assert f"UV_VERSION := {image.uv_requirement().removeprefix('uv==')}\n" in (ROOT / "Makefile").read_text()
