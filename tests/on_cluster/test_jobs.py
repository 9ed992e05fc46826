"""The jobs on a real local Ray, submitted as `make job` does it. One cluster of one TPU node serves all tests here."""

import contextlib
import gzip
import json
import logging
import re
import shlex
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import psutil
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from app.aot import compile as aot_compile
from app.aot.cache_key import fingerprint
from app.diffusion.models.loading import load_checkpoint
from app.diffusion.pipeline import Pipeline
from cluster import ROOT
from jobs.profile import operations
from jobs.replica_config import ReplicaConfig
from tests.clusters import Verbs, fetch, refuses, soon, succeeds

pytestmark = [pytest.mark.cluster, pytest.mark.jobs]


@pytest.fixture(scope="module", autouse=True)
def chips_are_free(verbs: Verbs) -> None:
    """Jobs take the TPU node that an application of the modules before may hold."""
    succeeds(verbs("deploy", "undeploy"))


def submitted(verbs: Verbs, name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return verbs("job", "run", "--job", name, f"--arguments={shlex.join(map(str, arguments))}")


def started(verbs: Verbs, name: str, *arguments: object) -> subprocess.Popen[str]:
    return beside(verbs, "--job", name, f"--arguments={shlex.join(map(str, arguments))}")


def beside(verbs: Verbs, *options: str) -> subprocess.Popen[str]:
    """`make job` while the test goes on."""
    command = [sys.executable, "-m", "cluster.job", "run", *options, "--run-dir", str(verbs.run_dir)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(process: subprocess.Popen[str], words: str) -> str:
    """Reads what it prints up to a line that has these words."""
    assert process.stdout
    read = ""
    for line in process.stdout:
        read += line
        if words in line:
            return read
    raise AssertionError(read)


def running(verbs: Verbs, beginning: str) -> list[psutil.Process]:
    """The cluster's processes whose command line begins so."""
    processes = []
    for process in verbs.cluster.search():
        with contextlib.suppress(psutil.Error):
            processes += [process] if " ".join(process.cmdline()).startswith(beginning) else []
    return processes


# `make job` and `make jobs` themselves, with the smallest job that there is.


def test_a_jobs_mistake_is_one_line_and_its_exit_status_is_ours(verbs: Verbs) -> None:
    done = submitted(verbs, "demo_quality", "--count", "0")
    assert done.returncode == 2 and "Traceback" not in done.stdout + done.stderr
    assert "\n--count: must be an integer between 1 and 10000, got 0.\ndemo_quality-" in done.stdout
    assert "has failed after" in done.stdout
    assert "failed (exit 2)  demo_quality --count 0\n" in succeeds(verbs("job", "list"))


def test_ctrl_c_stops_the_job(verbs: Verbs, tmp_path: Path) -> None:
    process = started(verbs, "demo_quality", "--count", 9999, "--out", tmp_path)
    until(process, "Running entrypoint")
    (driver,) = running(verbs, "python -m demo.quality ")
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and output.splitlines()[-1].endswith("is stopped.")
    assert soon(lambda: not driver.is_running())
    assert "stopped  demo_quality --count 9999" in succeeds(verbs("job", "list"))


def test_one_that_runs_can_be_followed_again_and_stopped(verbs: Verbs, tmp_path: Path) -> None:
    process = started(verbs, "demo_quality", "--count", 9999, "--out", tmp_path)
    job = until(process, "Following ").split()[1].rstrip(".")
    process.kill()  # as when the terminal's machine goes away
    process.communicate()
    again = beside(verbs, "--id", job)
    until(again, "Running entrypoint")
    assert f"{job} is stopped." in succeeds(verbs("job", "stop", "--id", job))
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 1 and f"{job} was stopped after" in output
    assert "had ended already" in succeeds(verbs("job", "stop", "--id", job))


def test_mistakes_are_told_before_anything_is_submitted(verbs: Verbs) -> None:
    before = succeeds(verbs("job", "list"))
    assert refuses(submitted(verbs, "draw_all")).startswith("JOB must be one of ")
    assert refuses(verbs("job", "run", "--id", "nobody")).startswith("There is no job nobody.")
    assert "No closing quotation" in refuses(verbs("job", "run", "--job", "train_demo", "--arguments", "'"))
    assert refuses(verbs("job", "run", "--job", "train_demo", "--resources", "4")).startswith("RESOURCES must be JSON")
    assert "usage: " in succeeds(submitted(verbs, "demo_quality", "--help"))
    assert succeeds(verbs("job", "list")) == before


# Each of the others, at demo size.


def test_fetched_weights_are_the_models_in_bf16(verbs: Verbs, tmp_path: Path) -> None:
    out = tmp_path / "it's here"  # as a shell must quote it; a relative path starts where the repository is
    output = succeeds(submitted(verbs, "fetch_weights", "assets/demo-model", "--out", out))
    assert f"Deploy it with `model: {out}`." in output
    checkpoint = load_checkpoint(out, dtype=jnp.bfloat16)
    assert checkpoint.family == load_checkpoint(ROOT / "assets/demo-model").family


BATCH = 48


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("batch") / "prompts.jsonl"
    rows: list[dict[str, Any]] = [{"prompt": f"a red boat at dusk, {number}"} for number in range(BATCH - 2)]
    rows += [{"prompt": "a red boat", "seed": 1}, {"prompt": "a red boat", "seed": 1, "n": 1}]  # which mean the same
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "a boat", "n": 99}]))
    return file


def test_a_batch_that_is_killed_twice_is_whole_and_drawn_once(verbs: Verbs, prompts: Path) -> None:
    out = prompts.parent / "out"

    def records() -> dict[str, int]:
        return {file.name: file.stat().st_mtime_ns for file in (out / "rows").glob("*")}

    def drawing(job: subprocess.Popen[str], more: int, name: str) -> psutil.Process:
        until(job, "Waiting for a TPU host")
        had = len(records())
        assert soon(lambda: len(records()) >= had + more)
        (process,) = running(verbs, name)
        return process

    first = started(verbs, "batch_generate", "--prompts", prompts, "--out", out)
    drawing(first, 8, "python -m jobs.batch_generate ").kill()  # the driver
    output, _ = first.communicate(timeout=120)
    assert first.returncode not in (0, 2) and "has failed after" in output
    assert soon(lambda: not running(verbs, "ray::MapWorker"))
    kept = records()
    assert 8 <= len(kept) < BATCH

    second = started(verbs, "batch_generate", "--prompts", prompts, "--out", out)
    worker = drawing(second, 4, "ray::MapWorker")
    kept |= records()
    assert len(kept) < BATCH
    worker.kill()
    output, wrong = second.communicate(timeout=120)
    assert second.returncode == 0, output + wrong
    assert f"{BATCH} pictures of {BATCH} rows are in {out}, 1 rows were skipped." in output
    assert {name: records()[name] for name in kept} == kept  # what was finished was not drawn again

    records_drawn = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert [record["row"] for record in records_drawn] == [*range(1, BATCH + 2)]
    assert records_drawn.pop()["error"] == "n must be an integer between 1 and 4, got 99."
    files = [out / name for record in records_drawn for name in record["files"]]
    assert set(files) == set((out / "images").iterdir()) and len(files) == BATCH
    for record, file in zip(records_drawn, files, strict=True):
        with Image.open(file) as picture:
            picture.load()
            assert picture.text["prompt"] == record["prompt"]  # type: ignore[attr-defined]
    assert pq.read_table(out / "manifest.parquet").num_rows == BATCH + 1
    assert {path.name for path in out.iterdir()} == {"images", "rows", "manifest.jsonl", "manifest.parquet"}

    before = records()
    again = succeeds(submitted(verbs, "batch_generate", "--prompts", prompts, "--out", out))
    assert f"{BATCH} rows: {BATCH} finished before, 0 to draw" in again and records() == before


@pytest.fixture(scope="module")
def config(verbs: Verbs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """serve_config.yaml with few programs, in a folder of their own."""
    folder = tmp_path_factory.mktemp("small")
    content = yaml.safe_load(verbs.config.read_text())
    content["http_options"]["port"] = verbs.serve_port
    small = {"sizes": ["64x64"], "batch_buckets": [1], "programs": str(folder / "programs")}
    content["applications"][0]["args"] |= small
    (folder / "small.yaml").write_text(yaml.safe_dump(content))
    return folder / "small.yaml"


def test_replicas_load_what_was_compiled_ahead_and_say_why_they_do_not(
    verbs: Verbs, config: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = config.parent / "programs"
    output = succeeds(submitted(verbs, "compile_ahead", "--config", config))
    assert f"{folder} has all 9 programs for cpu, 9 of them compiled now" in output
    assert not (folder / ".draft").exists()
    before = {file.name for file in folder.iterdir()}
    assert len(before) == 9 + 1  # published.json
    assert "0 of them compiled now" in succeeds(submitted(verbs, "compile_ahead", "--config", config))

    def new_log_lines() -> list[str]:
        lines = [record.getMessage() for record in caplog.records if record.name == aot_compile.logger.name]
        caplog.clear()
        return lines

    caplog.set_level(logging.INFO, aot_compile.logger.name)
    replica = Pipeline.load(ReplicaConfig.read(config).pipeline_spec)
    replica.warmup()
    assert [line.split()[0] for line in new_log_lines()] == ["loaded"] * 9
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--other")
    facts = fingerprint(replica.mesh.devices.flat)
    aot_compile.compiled(replica.programs[:1], folder=folder, fingerprint=facts)
    line, _ = new_log_lines()
    assert re.fullmatch(r"compiled .*: the saved one differs in LIBTPU_INIT_ARGS \(.*, here --other\)", line)
    assert {file.name for file in folder.iterdir()} == before  # who loads from a published folder adds nothing


def test_two_settings_stand_side_by_side_and_what_was_drawn_is_kept(verbs: Verbs, tmp_path: Path) -> None:
    def evaluated(candidate: str) -> tuple[str, Path]:
        """What it printed, and its report."""
        settings = ["--reference", "num_inference_steps=3", "--candidate", candidate]
        output = succeeds(submitted(verbs, "evaluate", *settings, "--count", 3, "--out", tmp_path))
        (report,) = re.findall(r"side by side in (\S+)\. ", output)
        return output, Path(report)

    def figures_of(report: Path) -> list[dict[str, float]]:
        figures = json.loads((tmp_path / report.name.replace("report", "figures")).with_suffix(".json").read_text())
        assert len(figures["pictures"]) == 3
        return list(figures["pictures"])

    output, report = evaluated("num_inference_steps=2")
    assert output.count("3 rows: 0 finished before") == 2
    assert re.search(r"^1 object, everything said +\d/2 +\d/2$", output, re.M)
    assert all(0 < image["ssim"] < 1 for image in figures_of(report))
    assert report.read_text().count("<figure>") == 3

    min((tmp_path / "images").iterdir()).unlink()  # as if it had been stopped
    again, other = evaluated("num_inference_steps=3")
    assert re.findall(r"3 rows: (\d) finished before", again) in (["2", "3"], ["3", "3"])
    assert [image["ssim"] for image in figures_of(other)] == [1, 1, 1]
    assert other != report and report.is_file(), "each comparison has its own"


def test_a_training_that_is_stopped_goes_on_and_what_it_made_is_judged(verbs: Verbs, tmp_path: Path) -> None:
    out, work = tmp_path / "model", tmp_path / "work"
    batches = "--vae-batch 4 --text-batch 4 --unet-batch 4 --pool 64"
    recipe = f"--architecture tiny --vae-steps 30 --text-steps 2 --unet-steps 2 --decoder-steps 2 {batches}"
    options = [*recipe.split(), "--out", out, "--work", work]
    process = started(verbs, "train_demo", *options, "--checkpoint-steps", 5)
    until(process, "VAE  training  step 1 of 30")
    assert soon((work / "vae.msgpack").is_file)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode == 130 and not out.exists()

    other = submitted(verbs, "train_demo", *options, "--seed", 1)
    assert other.returncode == 2 and "another training's, which differs in seed (0, here 1)." in other.stdout

    output = succeeds(submitted(verbs, "train_demo", *options))
    # A fast machine may have finished this stage before the signal reached it; what was saved is not trained again.
    assert re.search(r"VAE: (goes on after step (5|10|15|20|25) of 30|trained before)$", output, re.M)
    assert f"The demo model stands in {out}" in output
    assert {"README.md", "loss.png", "model_index.json"} <= {file.name for file in out.iterdir()}

    judged = submitted(verbs, "demo_quality", "--model", out, "--count", 2, "--steps", 2, "--out", tmp_path / "sheets")
    assert judged.returncode == 1 and f"A bar was missed. What failed stands in {tmp_path / 'sheets'}." in judged.stdout
    assert {file.name for file in (tmp_path / "sheets").iterdir()} == {"failures.png", "sample.png"}


def test_the_bundled_model_is_judged_good(verbs: Verbs, tmp_path: Path) -> None:
    output = succeeds(submitted(verbs, "demo_quality", "--count", 3, "--out", tmp_path))
    assert "All bars are met." in output and "MISSED" not in output and (tmp_path / "sample.png").is_file()


def test_a_replicas_steps_are_traced_under_load(verbs: Verbs, config: Path, tmp_path: Path) -> None:
    succeeds(verbs.deploy(config))
    idle = submitted(verbs, "profile", "--timeout-s", 1, "--out", tmp_path)
    assert idle.returncode == 1 and "The replica made no step in that time" in idle.stdout
    assert not list(tmp_path.iterdir())

    url = f"http://127.0.0.1:{verbs.serve_port}/imagine?prompt=a+red+boat&num_inference_steps=100"
    over = threading.Event()

    def load() -> None:
        while not over.is_set():
            assert fetch(url)[0] == 200

    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(load)
        output = succeeds(submitted(verbs, "profile", "--steps", 7, "--out", tmp_path))
        over.set()
        loading.result()
    (steps,) = re.findall(r"^(\d+) steps in ", output, re.M)
    assert int(steps) >= 7
    (trace,) = tmp_path.glob("*.xplane.pb")
    assert any(operation.name.startswith("step_program ") for operation in operations(trace)[:3])
    (timeline,) = tmp_path.glob("*.trace.json.gz")
    assert json.loads(gzip.decompress(timeline.read_bytes()))["traceEvents"]
    assert fetch(url)[0] == 200  # the replica goes on
    succeeds(verbs("deploy", "undeploy"))
