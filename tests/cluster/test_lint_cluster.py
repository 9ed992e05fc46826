"""cluster/config/lint.py: rules for cluster files. Each test makes one slip in the shipped file."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from app.ray_internals import autoscaler
from cluster.config.documents import Document, Key, dotted
from tests.cluster.slips import (
    CLUSTER,
    NODE,
    SERVE,
    TPU,
    TYPES,
    Edit,
    before,
    both,
    drop,
    findings_of,
    put,
    rename,
    replace,
)

CLUSTERS: list[tuple[Edit, Key, str]] = [
    (
        rename(("idle_timeout_minutes",), "idle_timeout_minute"),
        ("idle_timeout_minute",),
        "error: {} is not known here, and Ray would refuse it. Did you mean idle_timeout_minutes?",
    ),
    (
        rename((*TPU, "min_workers"), "min_worker"),
        (*TPU, "min_worker"),
        "error: {} is not known here, and Ray would refuse it. Did you mean min_workers?",
    ),
    (
        before(("provider", "region"), "use_internal_ip: true"),
        ("provider", "use_internal_ip"),
        "error: {} is not known here, and Ray would ignore it in silence. Did you mean use_internal_ips?",
    ),
    (
        put((*TPU, "resources", "TPU"), 3.5),
        (*TPU, "resources", "TPU"),
        "error: {} is not valid: 3.5 is not of type 'integer'.",
    ),
    (put(("max_workers",), "many"), ("max_workers",), "error: {} is not valid: 'many' is not of type 'integer'."),
    (
        put(("head_node_type",), "haed"),
        ("head_node_type",),
        "error: {} is refused by Ray: `head_node_type` must be one of `available_node_types`.",
    ),
    (
        put(("max_workers",), 0),
        ("max_workers",),
        "error: {} is refused by Ray: The specified global `max_workers` is smaller than the sum of `min_workers` of "
        "all the available node types.",
    ),
    (
        both(put((*TPU, "min_workers"), 3), put((*TPU, "max_workers"), 2)),
        (*TPU, "min_workers"),
        "error: {} must not be above max_workers, 2, got 3.",
    ),
    (
        put((*TPU, "max_workers"), 9),
        (*TPU, "max_workers"),
        "advice: {} is 9, and max_workers of the whole cluster is 4.",
    ),
    (
        put((*TYPES, "head", "resources", "CPU"), 4),
        (*TYPES, "head", "resources"),
        "advice: {} let Ray place work on the head; CPU: 0 keeps it for the cluster's own processes.",
    ),
    (
        put(("provider", "availability_zone"), "us-west4-a"),
        ("provider", "availability_zone"),
        "error: {} must be one of region us-central1, got us-west4-a.",
    ),
    (
        put(("file_mounts", "~/imagine/app"), "apps"),
        ("file_mounts", "~/imagine/app"),
        "error: {} is apps, which the repository does not have.",
    ),
    (
        put(("file_mounts", "~/imagine/app"), "3"),
        ("file_mounts", "~/imagine/app"),
        "error: {} must be a path, got 3.",
    ),
    (
        replace("requirements/gcp.txt", "requirements/google.txt"),
        ("head_setup_commands", 0),
        "error: {} names ~/imagine/requirements/google.txt, and the repository has no requirements/google.txt.",
    ),
    (
        rename(("setup_commands",), "metadata: {}\nhead_setup_commands"),
        ("setup_commands",),
        "error: {} is left out, so Ray's default installs an old Ray and opens the dashboard.",
    ),
    (
        replace("--autoscaling-config=$HOME/ray_bootstrap_config.yaml", ""),
        ("head_start_ray_commands", 1),
        "error: {} starts a head that adds no node: it needs --autoscaling-config=$HOME/ray_bootstrap_config.yaml.",
    ),
    (
        replace("ray start --address", "ray begin --address"),
        ("worker_start_ray_commands",),
        "error: {} must contain a `ray start`.",
    ),
    (
        replace("--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0"),
        ("head_start_ray_commands", 1),
        "advice: {} opens the dashboard, which can run code, to the network: --dashboard-host=0.0.0.0.",
    ),
    (
        replace("RAY_AUTH_MODE=token ", ""),
        ("head_start_ray_commands",),
        "advice: {} lack RAY_AUTH_MODE=token: whoever reaches a port of the cluster may run code on it.",
    ),
    (
        replace("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=app.api.proxy:guards", ""),
        ("head_start_ray_commands",),
        "advice: {} lack RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=app.api.proxy:guards: nothing then limits what "
        "clients send to Serve's proxy.",
    ),
    (
        replace("app.api.proxy:guards", "app.proxies:guards"),
        ("head_start_ray_commands",),
        "advice: {} name app.proxies:guards as RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH, not app.api.proxy:guards; a "
        "proxy that cannot import it never starts.",
    ),
    (
        replace("RAY_preload_python_modules=cluster.closed_port", ""),
        ("head_start_ray_commands",),
        "advice: {} lack RAY_preload_python_modules=cluster.closed_port: each replica opens a port on all interfaces.",
    ),
    (
        put(("cluster_name",), "Imagine_TPU"),
        ("cluster_name",),
        "error: {} must be 1 to 37 lower-case letters, digits and hyphens, beginning with a letter and not ending with "
        "a hyphen, because machines are named after it (ray-Imagine_TPU-head-...), got Imagine_TPU.",
    ),
    (
        both(drop(("file_mounts", "~/.ray/auth_token")), lambda text: text.replace("~/.ray/auth_token", "~/.ray/x")),
        ("file_mounts",),
        "error: {} require a token that no node gets: mount ~/.ray/auth_token.",
    ),
    (
        rename((*NODE, "acceleratorType"), "accelerator_type"),
        NODE,
        "error: {} must have one of machineType, acceleratorType, acceleratorConfig. Did you mean acceleratorType?",
    ),
    (
        put((*NODE, "acceleratorType"), "banana"),
        (*NODE, "acceleratorType"),
        "error: {} must be a TPU that Ray knows, v2, v3, v4, v5p, v5litepod, v6e, v7x and a size, got banana.",
    ),
    (
        put((*NODE, "acceleratorType"), "v5e-4"),
        (*NODE, "acceleratorType"),
        "error: {} must be a TPU that Ray knows, v2, v3, v4, v5p, v5litepod, v6e, v7x and a size, got v5e-4. "
        "Did you mean v5litepod-4?",
    ),
    (
        put((*NODE, "acceleratorType"), "v5litepod-3"),
        (*NODE, "acceleratorType"),
        "error: {} must be a size that exists, v5litepod-1, v5litepod-4, v5litepod-8, v5litepod-16 and so on, "
        "got v5litepod-3.",
    ),
    (
        replace("acceleratorType: v5litepod-4", "acceleratorConfig: {type: V5LITE_POD, topology: 2xtwo}"),
        (*NODE, "acceleratorConfig"),
        "error: {} must be a TPU that Ray knows, v2, v3, v4, v5p, v5litepod, v6e, v7x and a size, "
        "got {'type': 'V5LITE_POD', 'topology': '2xtwo'}.",
    ),
    (
        put((*NODE, "acceleratorType"), "v5litepod-8"),
        (*TPU, "resources", "TPU"),
        "error: {} must be 8, the chips of a host of v5litepod-8, got 4.",
    ),
    (
        rename((*TPU, "resources", "TPU"), "GPU"),
        (*TPU, "resources"),
        "error: {} must say TPU: 4, or no load ever starts a node of this type.",
    ),
    (
        put((*TPU, "labels", "ray.io/accelerator-type"), "TPU-V6E"),
        (*TPU, "labels", "ray.io/accelerator-type"),
        "error: {} must be TPU-V5LITEPOD, as Ray finds on a v5litepod-4, got TPU-V6E.",
    ),
    (
        drop((*TPU, "labels")),
        (*TPU, "labels"),
        "advice: {} lack ray.io/accelerator-type: TPU-V5LITEPOD, so no request for that label starts a node.",
    ),
    (
        replace("TPU: 4}", "TPU: 4, TPU-v6e-4-head: 1}"),
        (*TPU, "resources", "TPU-v6e-4-head"),
        "error: {} is no resource of a v5litepod-4.",
    ),
    (
        put((*NODE, "acceleratorType"), "v5litepod-16"),
        NODE,
        "advice: {} is 4 hosts, of which the autoscaler sees one: set min_workers and max_workers to one value.",
    ),
    (
        both(
            put((*NODE, "acceleratorType"), "v5litepod-16"),
            replace("{ray.io/accel", "{ray.io/tpu-worker-id: '0', ray.io/accel"),
        ),
        (*TPU, "labels", "ray.io/tpu-worker-id"),
        "error: {} would be the same on all 4 hosts.",
    ),
    (
        put((*NODE, "runtimeVersion"), "v2-alpha-tpuv6e"),
        (*NODE, "runtimeVersion"),
        "advice: {} is v2-alpha-tpuv6e; Google's documents name v2-alpha-tpuv5-lite for v5litepod.",
    ),
    (
        drop((*NODE, "runtimeVersion")),
        (*NODE, "runtimeVersion"),
        "error: {} is missing; for v5litepod it is v2-alpha-tpuv5-lite.",
    ),
]


@pytest.mark.parametrize(
    ("edit", "key", "words"), CLUSTERS, ids=[case[2].partition("{}")[2][1:60] for case in CLUSTERS]
)
def test_a_slip_in_a_cluster_file_is_found(tmp_path: Path, edit: Edit, key: Key, words: str) -> None:
    text = edit(CLUSTER)
    line = Document("", yaml.safe_load(text), yaml.compose(text)).line(key)
    assert f"cluster.yaml:{line}: {words.replace('{}', dotted(key), 1)}" in findings_of(tmp_path, cluster=text)


def test_a_topology_may_stand_in_place_of_an_accelerator_type(tmp_path: Path) -> None:
    config = "acceleratorConfig: {type: V5LITE_POD, topology: 2x2}"
    assert findings_of(tmp_path, SERVE, replace("acceleratorType: v5litepod-4", config)(CLUSTER)) == []


def test_rays_launcher_checks_tpu_types_where_googles_client_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher: Any = ModuleType("ray.autoscaler._private.gcp.config")
    launcher.get_node_type = {}.__getitem__  # raises
    monkeypatch.setattr(autoscaler, "find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, launcher.__name__, launcher)
    (finding,) = findings_of(tmp_path, cluster=CLUSTER)
    assert "must be a TPU that Ray knows" in finding
