"""jobs/fetch_weights.py as a plain module: from a folder, and from a small Hub on loopback."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from app.diffusion.models.loading import load_checkpoint
from cluster import ROOT, processes
from jobs import entry, fetch_weights
from tests.clusters import in_this_process
from tests.hub_server import COMMIT, Hub, serving
from tests.tiny import tensor_shapes, write_checkpoint

pytestmark = pytest.mark.slow

REPO = "somebody/tiny"
Done = subprocess.CompletedProcess[str]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    write_checkpoint(folder, "tiny-sd1", tensor_shapes()["tiny-sd1"])
    return folder


@pytest.fixture
def hub(model: Path) -> Iterator[tuple[Hub, dict[str, str]]]:
    hub = Hub(REPO, model)
    with serving(hub) as endpoint:
        yield hub, {"HF_ENDPOINT": endpoint, "HF_HOME": str(model.parent / "cache"), "HF_HUB_DISABLE_XET": "1"}


def fetch(*arguments: object, environment: dict[str, str] | None = None) -> Done:
    command = ["fetch_weights", *map(str, arguments)]
    if environment is None:
        return in_this_process(partial(entry.run, fetch_weights.main), command)
    variables = processes.environment(**environment)  # which the Hub's client reads when it is imported
    command = [sys.executable, "-m", "jobs.fetch_weights", *command[1:]]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=120)


def made(done: Done) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def refused(done: Done, status: int = 2) -> str:
    assert done.returncode == status and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done.stderr.strip()


def test_a_folder_becomes_bf16_that_our_modules_load(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "shared" / "weights"
    assert f"Deploy it with `model: {out}`." in made(fetch(model, "--out", out))
    assert {file.name for file in out.parent.iterdir()} == {"weights"}  # nothing unfinished is left
    before = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    after = load_file(out / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in after.values()} == {np.dtype(ml_dtypes.bfloat16)}
    name = "conv_in.weight"
    assert after[name].tobytes() == before[name].astype(ml_dtypes.bfloat16).tobytes()
    assert load_checkpoint(out).schedule == load_checkpoint(model).schedule
    files = json.loads((out / "manifest.json").read_text())["files"]
    assert set(files) == {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()} - {"manifest.json"}


def test_again_it_checks_and_writes_nothing(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "weights"
    made(fetch(model, "--out", out))
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    assert "was there already" in made(fetch(model, "--out", out))
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*")} == before

    assert "holds another model: dtype bfloat16" in refused(fetch(model, "--out", out, "--dtype", "float32"))
    weights = out / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    assert "is not what manifest.json says" in refused(fetch(model, "--out", out), 1)


def test_changed_weights_are_another_source(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "weights"
    made(fetch(model, "--out", out))
    file = model / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_in.bias"] = tensors["conv_in.bias"] + 1
    save_file(tensors, file)
    assert "holds another model: revision files" in refused(fetch(model, "--out", out))


def test_one_that_was_killed_after_the_rename_is_finished(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "weights"
    made(fetch(model, "--out", out))
    (out / "model_index.json").unlink()  # which goes in last
    with pytest.raises(ValueError, match=r"model_index\.json is missing"):
        load_checkpoint(out)
    made(fetch(model, "--out", out))
    load_checkpoint(out)


def test_all_that_is_wrong_is_told_and_nothing_is_made(model: Path, tmp_path: Path) -> None:
    file = model / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["surplus"] = tensors.pop("conv_in.bias")
    save_file(tensors, file)
    output = refused(fetch(model, "--out", tmp_path / "weights"), 1)
    assert "conv_in.bias is missing" in output and "surplus is not one" in output
    assert not list(tmp_path.glob("*weights*"))


def test_a_number_that_is_none_is_refused(model: Path, tmp_path: Path) -> None:
    file = model / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["decoder.conv_in.bias"][0] = np.nan
    save_file(tensors, file)
    output = refused(fetch(model, "--out", tmp_path / "w"), 1)
    assert "NaN or infinity stands among the weights, in vae decoder.conv_in.bias." in output
    assert not list(tmp_path.glob("*w"))


def test_unfinished_folders_of_killed_runs_go_and_those_of_running_ones_stay(model: Path, tmp_path: Path) -> None:
    old, young = (tmp_path / f".weights.unfinished-{name}" for name in ("old", "young"))
    for folder in (old, young):
        folder.mkdir()
    os.utime(old, (time.time() - 7200,) * 2)
    made(fetch(model, "--out", tmp_path / "weights"))
    assert not old.exists() and young.exists()


def test_a_repo_is_pinned_to_its_commit(hub: tuple[Hub, dict[str, str]], tmp_path: Path) -> None:
    out = tmp_path / "weights"
    output = made(fetch(REPO, "--out", out, environment=hub[1]))
    assert f"{REPO} at {COMMIT}" in output
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["source"], manifest["revision"]) == (REPO, COMMIT)
    load_checkpoint(out)


def test_a_download_that_broke_goes_on_with_what_is_missing(hub: tuple[Hub, dict[str, str]], tmp_path: Path) -> None:
    server, environment = hub
    server.missing = "unet/diffusion_pytorch_model.safetensors"
    out = tmp_path / "weights"
    assert "cannot be fetched" in refused(fetch(REPO, "--out", out, environment=environment), 1)
    assert not out.exists()
    first = set(server.sent)
    server.missing, server.sent = "", []
    made(fetch(REPO, "--out", out, environment=environment))
    assert "unet/diffusion_pytorch_model.safetensors" in server.sent and not first & set(server.sent)


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.safetensors", "unet/config.json"])
def test_other_bytes_than_declared_are_refused(name: str, hub: tuple[Hub, dict[str, str]], tmp_path: Path) -> None:
    server, environment = hub
    out = tmp_path / "weights"
    server.damaged = name
    assert f"{name} has the hash" in refused(fetch(REPO, "--out", out, environment=environment), 1)
    assert not out.exists()
    server.damaged = ""
    made(fetch(REPO, "--out", out, environment=environment))


def test_mistakes_are_one_line_before_any_work(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # as cluster/job.py sets it for jobs
    out = tmp_path / "weights"
    assert refused(fetch("--out", out)).startswith("The following arguments are required: model.")
    assert refused(fetch(model)).startswith("The following arguments are required: --out.")
    assert refused(fetch("assets/demo-modle", "--out", out)).startswith("model must be a folder")
    assert "has no manifest.json" in refused(fetch(model, "--out", model))
    assert "is one file: copy it, and deploy it as it is." in refused(
        fetch(model / "unet" / "diffusion_pytorch_model.safetensors", "--out", out)
    )
    assert not out.exists()
