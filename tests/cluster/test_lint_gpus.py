"""cluster/config/lint.py: rules for replicas that ask for NVIDIA GPUs, and the local cluster's GPU nodes."""

from pathlib import Path

import pytest

from app.ray_internals.core import NvidiaGPUAcceleratorManager
from cluster import ROOT, gpus
from cluster.config import lint as linter
from cluster.config.documents import Key, dotted
from cluster.local import autoscaler_config
from tests.cluster.slips import ACTOR, ARGS, CLUSTER, SCALING, Edit, before, drop, findings_of, line_of, put

GPU_SERVE = (ROOT / "configs/sd14-gpu.yaml").read_text()
PLATFORMS: Key = (*ACTOR, "runtime_env", "env_vars", "JAX_PLATFORMS")
LACK = (
    "advice: {} lack runtime_env.env_vars.JAX_PLATFORMS: cuda,cpu, so JAX falls back to the CPU in silence where CUDA "
)

SLIPS: list[tuple[Edit, Key, str]] = [
    (
        before((*ACTOR, "num_gpus"), "resources: {GPU: 1}"),
        (*ACTOR, "resources", "GPU"),
        "error: {} must be given as num_gpus.",
    ),
    (
        before((*ACTOR, "num_gpus"), "resources: {TPU: 4}"),
        (*ACTOR, "num_gpus"),
        "error: {} must be 0 beside TPU, as a replica computes on one of both, got 1.",
    ),
    (
        put((*ACTOR, "num_gpus"), 0.5),
        (*ACTOR, "num_gpus"),
        "error: {} must be a whole number, as a replica takes the memory of its GPU, got 0.5.",
    ),
    (
        put((*ACTOR, "num_gpus"), 3),
        (*ACTOR, "num_gpus"),
        "advice: {} is 3, of which 2 compute, a power of two: the others idle.",
    ),
    (drop(PLATFORMS), ACTOR, f"{LACK}fails, and always on the local cluster."),
    (put(PLATFORMS, "cpu"), ACTOR, f"{LACK}fails, and always on the local cluster."),
    (
        put((*ARGS, "dtype"), "float32"),
        (*ARGS, "dtype"),
        "advice: {} is float32, which cuDNN's fused attention does not take: with bfloat16 a step takes about half as "
        "long.",
    ),
]


@pytest.mark.parametrize(("edit", "key", "words"), SLIPS, ids=[words.partition("{}")[2][1:40] for _, _, words in SLIPS])
def test_a_slip_in_a_config_for_gpus_is_found(tmp_path: Path, edit: Edit, key: Key, words: str) -> None:
    text = edit(GPU_SERVE)
    message = words.replace("{}", dotted(key), 1)
    assert f"serve.yaml:{line_of(text, key) + 1}: {message}" in findings_of(tmp_path, text)


def test_a_platform_of_the_whole_application_will_do(tmp_path: Path) -> None:
    whole = before((*ACTOR[:2], "import_path"), "runtime_env: {env_vars: {JAX_PLATFORMS: 'cuda,cpu'}}")
    assert findings_of(tmp_path, whole(drop(PLATFORMS)(GPU_SERVE))) == []


def test_gpu_replicas_need_a_cluster_with_gpus_which_the_local_one_has_where_the_machine_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert findings_of(tmp_path, GPU_SERVE) == []
    (finding,) = findings_of(tmp_path, GPU_SERVE, CLUSTER)
    assert "error: " in finding and "ask for CPU 1, GPU 1, which no node type of cluster.yaml has" in finding
    monkeypatch.setattr(linter, "visible_gpus", lambda: 0)
    assert findings_of(tmp_path, GPU_SERVE, CLUSTER, local=True) == [finding]
    monkeypatch.setattr(linter, "visible_gpus", lambda: 2)
    assert findings_of(tmp_path, GPU_SERVE, CLUSTER, local=True) == []
    (finding,) = findings_of(tmp_path, put((*SCALING, "max_replicas"), 3)(GPU_SERVE), CLUSTER, local=True)
    assert finding.endswith("max_replicas is 3, and cluster.yaml's max_workers leave room for 2.")


def test_the_local_cluster_offers_the_machines_gpus_beside_the_nodes_of_the_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpus, "visible_gpus", lambda: 0)
    without = autoscaler_config.read(ROOT / "cluster.yaml")
    monkeypatch.setattr(gpus, "visible_gpus", lambda: 2)
    types = autoscaler_config.read(ROOT / "cluster.yaml")
    added = types.types.pop("local_gpu")
    assert types.types == without.types and types.most_workers == without.most_workers + 1
    assert (added["resources"], added["min_workers"], added["max_workers"]) == ({"CPU": 8, "GPU": 2}, 0, 1)


@pytest.mark.parametrize(("visible", "count"), [(None, 4), ("2,3", 2), ("", 0), ("0,1,2,3,4,5", 4)])
def test_gpus_that_the_environment_hides_are_not_offered(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, count: int
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(NvidiaGPUAcceleratorManager, "get_current_node_num_accelerators", staticmethod(lambda: 4))
    assert gpus.visible_gpus() == count
