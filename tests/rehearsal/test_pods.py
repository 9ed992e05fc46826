"""rehearsal/pods.py without root: how it reads a Dockerfile, and the command that KubeRay makes of a group."""

import shlex
from pathlib import Path

import pytest
import yaml
from ray.scripts.scripts import start

pytest.importorskip("googleapiclient", reason="needs Google's client: make gcp")

from cluster import ROOT
from cluster.gke.__main__ import write
from rehearsal import gke
from rehearsal.pods import instructions, start_command


def test_a_dockerfiles_instructions_are_joined_over_lines_and_comments_left_out() -> None:
    text = "# a comment\nFROM python:3.11-slim\nRUN one \\\n    && two\nENV A=1 \\\n    B=2\n"
    assert [*instructions(text)] == [("FROM", "python:3.11-slim"), ("RUN", "one && two"), ("ENV", "A=1 B=2")]


def test_ray_takes_the_command_that_kuberay_makes_of_a_group(tmp_path: Path) -> None:
    with gke.keys_file() as keys:
        write(gke.config(tmp_path, keys), ROOT / "cluster.yaml", "imagine:1", "", tmp_path)
    service, _ = yaml.safe_load_all((tmp_path / "rayservice.yaml").read_text())
    groups = service["spec"]["rayClusterConfig"]
    head = start_command(groups["headGroupSpec"], "10.0.0.2")
    assert head.startswith("ray start --head --block ") and "--no-monitor" in head and "--num-cpus=0" in head
    worker = start_command(groups["workerGroupSpecs"][0], "10.0.0.2")
    assert worker == (
        "ray start --address=10.0.0.2:6379 --block --dashboard-agent-listen-port=52365 "
        "--labels=ray.io/accelerator-type=TPU-V5LITEPOD --metrics-export-port=8080 --num-cpus=8 "
        "--resources='{\"TPU\": 4}'"
    )
    for command in (head, worker):
        start.make_context("start", shlex.split(command)[2:])
