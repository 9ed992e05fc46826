"""cluster.yaml and its variants: how Ray reads them, and what their shell commands do.

Google Cloud is not asked, so names of images, zones and machine types are not tested.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.command_runner import _with_environment_variables, _with_interactive
from ray.autoscaler._private.providers import _get_default_config
from ray.autoscaler._private.util import prepare_config, validate_config, with_envs
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.scripts.scripts import start

from cluster import ROOT

BASE = ROOT / "cluster.yaml"
CLUSTERS = [BASE, *sorted((ROOT / "configs").glob("cluster-*.yaml"))]
each_cluster = pytest.mark.parametrize("path", CLUSTERS, ids=[path.stem for path in CLUSTERS])
COMMANDS = ("setup_commands", "head_setup_commands", "worker_setup_commands")
STARTS = ("head_start_ray_commands", "worker_start_ray_commands")


def config(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    return content


def command_with(text: str, path: Path = BASE) -> str:
    """The only command of a file that contains this text."""
    (match,) = [line for name in (*COMMANDS, *STARTS) for line in config(path)[name] if text in line]
    return str(match)


# How Ray reads them


@each_cluster
def test_rays_own_validation_accepts_it(path: Path) -> None:
    validate_config(prepare_config(config(path)))


@each_cluster
def test_nothing_that_runs_is_left_to_rays_defaults_for_google_cloud(path: Path) -> None:
    content = config(path)
    for key, value in _get_default_config({"type": "gcp"}).items():
        if key.endswith("_commands") or key in ("available_node_types", "head_node_type", "provider"):
            assert key in content
            assert not value or content[key] != value
    text = json.dumps(prepare_config(content))
    assert "cp37" not in text and "0.0.0.0" not in text


@each_cluster
def test_the_autoscaler_reads_a_head_without_work_and_one_to_four_tpu_nodes(path: Path) -> None:
    read = AutoscalingConfig(config(path), skip_content_hash=True)
    types = read.get_node_type_configs()
    head, tpu = types["head"], types["ray_tpu"]
    assert set(types) == {"head", "ray_tpu"} and read.get_head_node_type() == "head"
    assert head.resources == {"CPU": 0}
    assert (tpu.min_worker_nodes, tpu.max_worker_nodes, read.get_max_num_worker_nodes()) == (1, 4, 4)
    assert tpu.resources == {"CPU": 8, "TPU": 4}
    assert read.get_idle_timeout_s() == 600


def leaves(value: Any, key: str = "") -> dict[str, Any]:
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {name: leaf for part, inner in items for name, leaf in leaves(inner, f"{key}.{part}").items()}
    return {key.lstrip("."): value}


NODE = "available_node_types.ray_tpu"
DIFFERENT = {"cluster_name", "provider.region", "provider.availability_zone", f"{NODE}.labels.ray.io/accelerator-type"}
DIFFERENT |= {f"{NODE}.node_config.{key}" for key in ("acceleratorType", "runtimeVersion", "schedulingConfig.spot")}


@pytest.mark.parametrize("path", CLUSTERS[1:], ids=[path.stem for path in CLUSTERS[1:]])
def test_a_variant_differs_in_name_place_and_tpu_alone(path: Path) -> None:
    base, variant = leaves(config(BASE)), leaves(config(path))
    assert set(base) == set(variant)
    different = {key for key in base if base[key] != variant[key]}
    assert "cluster_name" in different and different <= DIFFERENT


def test_the_variants_are_the_predecessors_tpu_the_newer_one_and_a_spot_one() -> None:
    nodes = {path.stem: config(path)["available_node_types"]["ray_tpu"]["node_config"] for path in CLUSTERS[1:]}
    assert {name: (node["acceleratorType"], node["schedulingConfig"]["spot"]) for name, node in nodes.items()} == {
        "cluster-spot": ("v5litepod-4", True),
        "cluster-v4-8": ("v4-8", False),
        "cluster-v6e": ("v6e-4", False),
    }


@each_cluster
def test_head_and_tpu_nodes_have_the_same_network_and_tag(path: Path) -> None:
    types = config(path)["available_node_types"]
    head, tpu = (types[name]["node_config"] for name in ("head", "ray_tpu"))
    assert head["networkInterfaces"][0]["network"].rpartition("/")[2] == tpu["networkConfig"]["network"]
    assert head["tags"]["items"] == tpu["tags"]


@each_cluster
def test_every_line_fits_and_the_project_must_be_set(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert [line for line in lines if len(line) > 120 and "https://" not in line] == []
    assert config(path)["provider"]["project_id"] is None  # Ray stops at once, and says that it must be set


# What is installed


def test_the_nodes_install_what_this_repository_pins() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (version,) = set(re.findall(r"^UV_VERSION := (\S+)$", makefile, re.MULTILINE))
    fetch = command_with("files.pythonhosted.org")
    assert f"/uv-{version}-py3-none-manylinux" in fetch and f"/tmp/uv/uv-{version}.data/scripts/uv" in fetch
    assert re.search(r'echo "[0-9a-f]{64}  /tmp/uv.whl" \| sha256sum --check', fetch)
    (python,) = set(re.findall(r"--python-version (\S+)$", makefile, re.MULTILINE))
    assert f"venv --managed-python --python {python} " in command_with("--managed-python")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["mypy"]["python_version"] == python


@pytest.mark.parametrize("name", ["gcp", "tpu"])
def test_each_package_that_a_node_installs_has_hashes_and_is_the_one_tested_here(name: str) -> None:
    assert f"--require-hashes -r ~/imagine/requirements/{name}.txt" in command_with(
        f"-r ~/imagine/requirements/{name}.txt"
    )
    text = (ROOT / f"requirements/{name}.txt").read_text()
    pinned = re.findall(r"^([\w.-]+)==(\S+)( ; [^\\]+)? \\$", text, re.MULTILINE)
    blocks = re.split(r"^(?=[\w.-]+==)", text, flags=re.MULTILINE)[1:]
    assert len(pinned) == len(blocks) and all("--hash=sha256:" in block for block in blocks)
    runtime = re.findall(r"^[\w.-]+==\S+", (ROOT / "requirements/runtime.txt").read_text(), re.MULTILINE)
    assert set(runtime) <= {f"{package}=={version}" for package, version, _ in pinned}


@pytest.mark.slow
def test_the_folders_that_are_mounted_are_all_that_the_app_needs(tmp_path: Path) -> None:
    content = config(BASE)
    for remote, local in content["file_mounts"].items():
        if remote.startswith("~/imagine/"):
            target = tmp_path / remote.removeprefix("~/imagine/")
            if local == "assets":  # large, and only read
                target.symlink_to(ROOT / local)
            else:
                shutil.copytree(ROOT / local, target, ignore=shutil.ignore_patterns(*content["rsync_exclude"]))
    args = config(ROOT / "serve_config.yaml")["applications"][0]["args"]
    program = (
        "import json, sys, app.builders, app.diffusion.pipeline, cluster.node_watcher;"
        "app.builders.text_to_image(app.builders.Args.model_validate(json.loads(sys.argv[1])));"
        "print(app.builders.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, json.dumps(args)],
        cwd="/",
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout.strip()) == (0, str(tmp_path / "app/builders.py")), done.stderr


# What the shell commands do


def wrapped(command: str) -> list[str]:
    """The command line that Ray's updater sends over SSH, with its variables (autoscaler/_private/updater.py)."""
    command = with_envs([command], {"RAY_HEAD_IP": "10.0.0.2", "RAY_CLOUD_INSTANCE_ID": "x"})[0]
    variables = {"RAY_OVERRIDE_RESOURCES": {"CPU": 8, "TPU": 4}, "RAY_OVERRIDE_LABELS": {"a/b": "c"}}
    words: list[str] = _with_interactive(_with_environment_variables(command, variables))
    return words


@each_cluster
def test_every_command_is_one_that_bash_can_parse_as_ray_sends_it(path: Path) -> None:
    for name in (*COMMANDS, *STARTS):
        for command in config(path)[name]:
            done = subprocess.run(["bash", "-n", "-c", " ".join(wrapped(command))], capture_output=True, text=True)
            assert (done.returncode, done.stderr) == (0, ""), command


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A node's home after the mounts, with a `ray` that only records how it was called."""
    folder = tmp_path / "home"
    for file in ("app/builders.py", "cluster/node_watcher.py", "requirements/tpu.txt"):
        (folder / "imagine" / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / "imagine" / file).touch()
    (folder / ".ray").mkdir()
    (folder / ".ray/auth_token").write_text("secret")
    (folder / ".ray/auth_token").chmod(0o644)
    install(folder, "ray", f'{{ echo "$0 $@"; env; }} > {tmp_path}/called')
    install(folder, "curl", "exit 7")  # no Ray answers
    return folder


def install(home: Path, name: str, script: str) -> None:
    program = home / "imagine/.venv/bin" / name
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text(f"#!/bin/bash\n{script}\n")
    program.chmod(0o755)


def shell(home: Path, command: str) -> subprocess.CompletedProcess[str]:
    """Runs a command as Ray would over SSH, without login and terminal."""
    text = _with_environment_variables(f"export RAY_HEAD_IP=10.0.0.2; {command}", {"RAY_USAGE_STATS_ENABLED": 1})
    environment = {"HOME": str(home), "PATH": f"{home}/imagine/.venv/bin:{os.environ['PATH']}"}
    return subprocess.run(["bash", "-c", text], env=environment, capture_output=True, text=True, cwd=home, timeout=120)


def set_up(home: Path) -> None:
    for words in ("chmod 600", "> ~/imagine/environment", ">> ~/.bashrc"):
        done = shell(home, command_with(words))
        assert done.returncode == 0, done.stderr


def called(home: Path) -> tuple[str, dict[str, str]]:
    """The last command line of `ray`, and its environment."""
    line, *variables = (home.parent / "called").read_text().splitlines()
    return line, dict(variable.partition("=")[::2] for variable in variables)


def test_setup_stops_where_the_code_or_the_token_is_missing(home: Path) -> None:
    check = command_with("chmod 600")
    assert shell(home, check).returncode == 0
    assert (home / ".ray/auth_token").stat().st_mode & 0o777 == 0o600
    for file in ("imagine/requirements/tpu.txt", ".ray/auth_token"):
        (home / file).unlink()
        done = shell(home, check)
        assert done.returncode != 0 and Path(file).name in done.stderr


def test_setup_can_be_run_again(home: Path) -> None:
    for _ in range(3):
        set_up(home)
    assert (home / ".bashrc").read_text().count("environment") == 1


def test_ray_starts_with_the_token_mode_and_the_code_and_reports_no_usage(home: Path) -> None:
    set_up(home)
    for words, platforms in (("ray start --head", "cpu"), ("ray start --address", "tpu,cpu")):
        done = shell(home, command_with(words))
        assert done.returncode == 0, done.stderr
        line, environment = called(home)
        assert line.startswith(f"{home}/imagine/.venv/bin/ray start --")
        assert environment["RAY_AUTH_MODE"] == "token"
        assert environment["PYTHONPATH"] == f"{home}/imagine"
        assert environment["RAY_USAGE_STATS_ENABLED"] == "0"
        assert environment["RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S"] == "2"
        assert environment["RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS"] == "1"
        assert environment["RAY_preload_python_modules"] == "cluster.closed_port", "a module that the nodes have"
        assert environment["JAX_PLATFORMS"] == platforms
        assert environment["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] == "app.api.proxy:guards"


def options(home: Path, words: str) -> dict[str, Any]:
    """The options of a `ray start`, as Ray's command line parses them."""
    set_up(home)
    shell(home, command_with(words))
    arguments = called(home)[0].partition(" start ")[2].split()
    return dict(start.make_context("start", arguments).params)


def test_the_head_takes_no_work_and_its_dashboard_listens_on_loopback(home: Path) -> None:
    head = options(home, "ray start --head")
    assert head["head"] and head["num_cpus"] == 0 and head["port"] == 6379
    assert head["autoscaling_config"] == f"{home}/ray_bootstrap_config.yaml"
    assert (head["dashboard_host"], head["dashboard_port"]) == ("127.0.0.1", 8265)


def test_a_tpu_node_joins_the_head_that_ray_names(home: Path) -> None:
    assert options(home, "ray start --address")["address"] == "10.0.0.2:6379"


@pytest.mark.skipif(not shutil.which("setsid"), reason="setsid is Linux's")
def test_the_watcher_starts_after_ray_in_a_session_of_its_own(home: Path) -> None:
    set_up(home)
    logs, done = home.parent / "logs", home.parent / "done"
    logs.mkdir()
    os.mkfifo(done)
    install(home, "python", f'echo watching; echo "$@ $RAY_AUTH_MODE $(ps -o sid= $$) $$" > {done}')
    command = config(BASE)["worker_start_ray_commands"][-1]
    started = shell(home, command.replace("/tmp/ray/session_latest/logs", str(logs)))
    assert (started.returncode, started.stdout, started.stderr) == (0, "", "")
    words = subprocess.run(["cat", done], capture_output=True, text=True, timeout=120).stdout.split()
    assert words[:3] == ["-m", "cluster.node_watcher", "token"]
    assert words[3] == words[4]  # the leader of its session
    assert (logs / "watcher.log").read_text() == "watching\n"


@each_cluster
def test_start_commands_that_run_again_leave_alone_a_ray_that_the_head_knows(home: Path, path: Path) -> None:
    set_up(home)
    install(home, "curl", f'echo "$@" > {home.parent}/asked; echo success')
    start, watch = config(path)["worker_start_ray_commands"]
    assert shell(home, start).returncode == 0
    assert "http://127.0.0.1:52365/api/local_raylet_healthz" in (home.parent / "asked").read_text()
    assert not (home.parent / "called").exists(), "neither `ray stop` nor `ray start`"
    assert "flock --no-fork -w 10 ~/imagine/watcher.lock python" in watch


@each_cluster
def test_the_file_has_no_secret(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"RAY_AUTH_TOKEN\s*=|HF_TOKEN|hf_[A-Za-z0-9]{20}|-----BEGIN", text)
    assert config(path)["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
