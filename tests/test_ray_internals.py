"""app/ray_internals: each private name of Ray is still there and works as it is used, and stands nowhere else."""

import ast
import asyncio
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import ray
import yaml
from ray.serve import context

import app.ray_internals
from app import builders
from app.ray_internals import autoscaler, core, serve
from cluster import ROOT

PACKAGES = ("app", "benchmarks", "capacity", "cluster", "demo", "jobs", "loadtest", "rehearsal")
PRIVATE = re.compile(r"ray(\.\w+)*\.(_\w+)")  # ray._private, ray.serve._private.api, ray._common
CLUSTER = yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_the_version_that_they_were_seen_in_is_the_one_that_is_pinned() -> None:
    assert ray.__version__ == app.ray_internals.RAY_VERSION
    pinned = re.findall(r"^ray(?:\[.*\])?==(\S+)", (ROOT / "requirements/runtime.txt").read_text(), re.MULTILINE)
    assert pinned == [app.ray_internals.RAY_VERSION]


def private_names(file: Path) -> list[str]:
    """Private modules of Ray that a file imports, or names in a string that is no docstring."""
    tree = ast.parse(file.read_text())
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
            names.append(node.value)
    return [name for name in names if PRIVATE.match(name)]


def test_no_other_module_names_a_private_module_of_ray() -> None:
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    users = {str(file.relative_to(ROOT)) for file in files if private_names(file)}
    internals = {
        f"app/ray_internals/{name}.py" for name in ("autoscaler", "core", "google", "key_value", "routing", "serve")
    }
    assert users == {*internals, "rehearsal/ray_parts.py"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "unloaded"),
    [
        ("app.ray_internals.core", "ray.serve"),
        ("app.ray_internals.core", "ray.autoscaler._private"),
        ("app.ray_internals.autoscaler", "ray.serve"),
        ("app.ray_internals.serve", "ray.autoscaler._private"),
        ("cluster.closed_port", "ray.serve"),
    ],
)
def test_a_part_of_ray_is_loaded_only_where_it_is_used(module: str, unloaded: str) -> None:
    script = f"import sys, {module}; print([name for name in sys.modules if name.startswith({unloaded!r})])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# core


def test_tables_of_tpus_have_the_slices_that_are_used() -> None:
    tpu = core.tpu
    assert tpu.get_total_chips_from_accelerator_type("v4-16") == 8
    assert tpu.get_num_tpu_visible_chips_per_host("v5litepod-8") == 8
    assert tpu.get_tpu_cores_per_chip("v4-8") == 2
    assert tpu.infer_tpu_pod_type_from_topology("2x2", "v5litepod") == "v5litepod-4"
    assert tpu.get_num_chips_from_topology(min(tpu.VALID_TPU_TOPOLOGY["v6e"])) > 0
    assert tpu.TPUAcceleratorManager.is_valid_tpu_accelerator_type("v6e-4")
    assert not tpu.TPUAcceleratorManager.is_valid_tpu_accelerator_type("banana")
    assert set(tpu.VALID_TPU_TYPES) >= {"v4", "v5p", "v5litepod", "v6e"}
    assert tpu.TPU_VALID_CHIP_OPTIONS == (1, 2, 4, 8) and tpu.DEFAULT_TPU_NUM_CHIPS_PER_HOST == 4


def test_a_node_takes_the_options_that_the_local_cluster_gives() -> None:
    assert {"shutdown_at_exit", "spawn_reaper"} <= set(inspect.signature(core.Node).parameters)
    assert {"check_alive", "wait"} <= set(inspect.signature(core.Node.kill_all_processes).parameters)
    parameters = core.RayParams(node_ip_address="127.0.0.1", resources={"TPU": 4}, labels={"a": "b"})
    assert parameters.resources == {"TPU": 4}
    assert core.PROCESS_TYPE_RAYLET == "raylet"


def test_no_cluster_is_found_where_none_has_started(tmp_path: Path) -> None:
    assert core.find_bootstrap_address(str(tmp_path)) is None
    (tmp_path / "ray_current_cluster").write_text("127.0.0.1:6379")
    assert core.find_bootstrap_address(str(tmp_path)) == "127.0.0.1:6379"


@pytest.mark.slow
def test_a_replica_that_wants_a_port_gets_none() -> None:
    """In a process of its own, as it changes Ray for good."""
    script = (
        "import grpc; from app.ray_internals.core import close_replica_port; close_replica_port();"
        "from ray.serve._private import replica;"
        "print(replica.add_port_to_grpc_server(None, '127.0.0.1:0'))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "0\n", done.stderr


def test_the_loggers_of_uploads_are_rays() -> None:
    for name in core.UPLOAD_LOGGERS:
        assert importlib.import_module(name).default_logger.name == name


# serve


def test_serves_headers_are_headers() -> None:
    headers = [getattr(serve, name) for name in serve.__all__ if name.endswith("_HEADER")]
    headers += [serve.SERVE_MULTIPLEXED_MODEL_ID, serve.SERVE_SESSION_ID]
    assert len(headers) == 5
    assert all(re.fullmatch(r"[a-z_-]+", header.lower()) for header in headers), headers
    assert serve.RAY_SERVE_ENABLE_HA_PROXY is False, "nothing here asks for it"


def test_options_have_the_defaults_that_serve_documents() -> None:
    assert serve.default_option("max_ongoing_requests") == 5
    assert serve.default_option("max_queued_requests") == -1
    assert serve.default_option("graceful_shutdown_timeout_s") == 20


def test_tasks_of_one_http_request_get_ids_of_their_own_under_its_request_id() -> None:
    from ray.serve.context import _get_serve_request_context as request_context

    async def ids() -> list[tuple[str, str]]:
        context._set_request_context(request_id="abc", _internal_request_id="1")

        async def task() -> tuple[str, str]:
            serve.begin_own_request()
            return request_context().request_id, request_context()._internal_request_id

        return [
            *await asyncio.gather(task(), task()),
            (request_context().request_id, request_context()._internal_request_id),
        ]

    first, second, own = asyncio.run(ids())
    assert own == ("abc", "1") and {first[0], second[0]} == {"abc"}
    assert len({first[1], second[1], "1"}) == 3


def test_the_default_policy_is_the_one_of_the_target() -> None:
    from ray.serve.config import AutoscalingConfig

    assert AutoscalingConfig().policy.policy_function == serve.DEFAULT_AUTOSCALING_POLICY_NAME


def test_a_builder_makes_its_deployments() -> None:
    args = yaml.safe_load((ROOT / "serve_config.yaml").read_text())["applications"][0]["args"]
    assert set(serve.deployment_names(builders.text_to_image, args)) == {"APIIngress", "StableDiffusion"}


@pytest.mark.slow
def test_a_replica_is_told_that_it_ends_before_serve_waits_for_its_requests() -> None:
    """Serve's own shutdown runs, of a replica that has nothing but what this shutdown uses before it waits."""
    script = """
import asyncio
from types import SimpleNamespace
from app.ray_internals.serve import on_shutdown
from ray.serve._private.replica import Replica, ReplicaActor

events = []

class Waiting(Exception):
    pass

class Ending(Replica):
    def __init__(self):
        self._graceful_shutdown_task, self._event_loop = None, asyncio.get_running_loop()
        self._deployment_config = SimpleNamespace(graceful_shutdown_timeout_s=20)
        self._user_callable_initialized, self._ingress = True, False

    async def _drain_ongoing_requests(self, *arguments):
        events.append("waits")
        raise Waiting

on_shutdown(events.append)

async def end():
    try:
        await ReplicaActor.perform_graceful_shutdown(SimpleNamespace(_replica_impl=Ending()))
    except Waiting:
        print(events)

asyncio.run(end())
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[20.0, 'waits']\n", done.stderr


# autoscaler


def test_a_cluster_file_is_completed_and_refused_as_ray_does() -> None:
    prepared = autoscaler.prepare_config(CLUSTER)
    autoscaler.validate_config(prepared)
    assert prepared["available_node_types"]["head"]["min_workers"] == 0
    with pytest.raises(Exception, match="head_node_type"):
        autoscaler.validate_config(autoscaler.prepare_config({**CLUSTER, "head_node_type": "none"}))


def test_ray_reads_the_provider_keys_that_its_schema_lacks() -> None:
    folder = Path(inspect.getfile(ray)).parent / "autoscaler"
    source = "".join(file.read_text() for file in folder.rglob("*.py"))
    schema = (folder / "ray-schema.json").read_text()
    for key in autoscaler.PROVIDER_KEYS:
        assert key in source and f'"{key}"' not in schema


def test_machines_of_google_are_called_by_the_cluster() -> None:
    folder = Path(inspect.getfile(ray)).parent / "autoscaler/_private"
    assert f'TAG_RAY_NODE_NAME] = "{autoscaler.GOOGLE_HEAD_NAME}".format(' in (folder / "commands.py").read_text()
    assert f'TAG_RAY_NODE_NAME: "{autoscaler.GOOGLE_WORKER_NAME}".format(' in (folder / "node_launcher.py").read_text()
    assert "INSTANCE_NAME_UUID_LEN = 8\n" in (folder / "gcp/node.py").read_text()
    assert len(autoscaler.GOOGLE_NAME_SUFFIX) == len("-") + 8


def test_the_local_provider_has_the_attributes_of_rays() -> None:
    """cluster/local/node_provider.py extends it, and uses these of it."""
    source = inspect.getsource(autoscaler.FakeMultiNodeProvider)
    for name in ("self._nodes", "self._next_node_id", "self._head_node_id", "self.lock", "def _terminate_node"):
        assert name in source
    assert isinstance(autoscaler.FakeMultiNodeProvider.create_node_with_resources_and_labels, FunctionType)


@pytest.mark.slow
def test_ssh_reaches_the_head_as_the_launcher_would(tmp_path: Path) -> None:
    """Of a cluster of machines that exist (provider: local); in a process of its own, as Ray leaves files open."""
    cluster = {
        "cluster_name": "test",
        "provider": {"type": "local", "head_ip": "127.0.0.1", "worker_ips": []},
        "auth": {"ssh_user": "somebody", "ssh_private_key": "~/key"},
    }
    script = (
        "import contextlib, io, json, sys; from app.ray_internals.autoscaler import ssh_command\n"
        "with contextlib.redirect_stdout(io.StringIO()): found = ssh_command(json.loads(sys.argv[1]), 'x.yaml', 7)\n"
        "print(json.dumps(found))"
    )

    def reached() -> Any:
        done = subprocess.run(
            [sys.executable, "-c", script, json.dumps(cluster)],
            cwd=ROOT,
            env={"HOME": str(tmp_path), "RAY_TMPDIR": str(tmp_path), "PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    assert reached() is None, "no head is up"
    (state,) = tmp_path.rglob("cluster-test.state")
    nodes = json.loads(state.read_text() or "{}")
    nodes["127.0.0.1"]["state"] = "running"
    state.write_text(json.dumps(nodes))
    options, target = reached()
    assert target == "somebody@127.0.0.1"
    assert "ConnectTimeout=7s" in options and "~/key" in options
