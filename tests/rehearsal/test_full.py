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
from loadtest.__main__ import print_summary
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


def added(shipped: Path, changed: Path) -> list[str]:
    lines = difflib.ndiff(shipped.read_text().splitlines(), changed.read_text().splitlines())
    return [line.removeprefix("+").strip().partition(" #")[0] for line in lines if line.startswith("+")]


def test_the_deployed_config_differs_from_the_shipped_one_in_five_lines(tmp_path: Path) -> None:
    file = full.without_tpu(tmp_path)
    assert added(ROOT / "configs/quick-scaling.yaml", file) == [
        "batch_buckets: [1]",
        "programs: /mnt/image/programs",
        "max_replicas: 2",
        "target_ongoing_requests: 4",
        "runtime_env: {env_vars: {JAX_PLATFORMS: cpu}}",
    ]
    refuse_errors([file])


def test_the_second_deploy_and_the_new_code_change_a_line_of_what_is_shipped(tmp_path: Path) -> None:
    config, code = full.without_tpu(tmp_path), tmp_path / "image_metadata.py"
    before = Path(shutil.copy(config, tmp_path / "before.yaml"))
    full.change(config, full.STEPS)
    assert added(before, config) == ["num_inference_steps: 8"]
    refuse_errors([config])
    shutil.copy(ROOT / "app/serving/image_metadata.py", code)
    full.change(code, full.NEW_CODE)
    assert added(ROOT / "app/serving/image_metadata.py", code) == ['"Software": "imagine-tpu 2",']


@pytest.mark.parametrize("cluster", CLUSTERS, ids=[file.stem for file in CLUSTERS])
def test_a_cluster_file_gets_a_short_idle_timeout(cluster: Path, tmp_path: Path) -> None:
    file = tmp_path / cluster.name
    shutil.copy(cluster, file)
    full.change(file, full.IDLE)
    assert added(cluster, file) == ["idle_timeout_minutes: 0.5"]


def test_the_load_test_prints_the_words_by_which_nodes_are_seen_to_come_and_go(
    capsys: pytest.CaptureFixture[str],
) -> None:
    latency: dict[str, float] = {}
    summary = {"complete": True, "requests": 1, "planned": 1, "failed": 0, "errors": [], "completed_per_s": 1.0}
    summary |= {
        "images_per_s": 1.0,
        "latency": latency,
        "moved": 0,
        "restarted": 0,
        "goodput_share": None,
        "scale_ups": [],
        "invalid": [],
    }
    most = {"replicas": 2, "replicas_at_end": 1, "nodes": 2, "nodes_at_end": 1}
    print_summary(summary | {"most": most}, Path("folder"))
    assert full.SCALED in capsys.readouterr().out


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
