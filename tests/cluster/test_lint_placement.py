"""cluster/config/lint.py: rules that hold a Serve config against a cluster file."""

from pathlib import Path

import pytest

from app import builders
from cluster import ROOT
from cluster.config.documents import Key, dotted
from cluster.config.rules import cluster_file
from tests.cluster.slips import (
    ACTOR,
    ARGS,
    CLUSTER,
    INGRESS,
    MODEL,
    NODE,
    SCALING,
    SERVE,
    TPU,
    Edit,
    before,
    both,
    findings_of,
    line_of,
    put,
    replace,
)

TOGETHER: list[tuple[Edit, Edit, Key, str]] = [
    (
        put((*ACTOR, "resources", "TPU"), 8),
        both(),
        ACTOR,
        "error: {} ask for CPU 1, TPU 8, which no node type of cluster.yaml has (head: CPU 0; ray_tpu: CPU 8, TPU 4).",
    ),
    (
        put((*ACTOR, "num_cpus"), 9),
        both(),
        ACTOR,
        "error: {} ask for CPU 9, TPU 4, which no node type of cluster.yaml has (head: CPU 0; ray_tpu: CPU 8, TPU 4).",
    ),
    (
        before((*ACTOR, "num_cpus"), "accelerator_type: TPU-V5LITEPOD"),
        both(),
        ACTOR,
        "error: {} ask for CPU 1, TPU 4, accelerator_type:TPU-V5LITEPOD 0.001, which no node type of cluster.yaml has "
        "(head: CPU 0; ray_tpu: CPU 8, TPU 4).",
    ),
    (
        put((*SCALING, "max_replicas"), 5),
        both(),
        (*SCALING, "max_replicas"),
        "error: {} is 5, and cluster.yaml's max_workers leave room for 4.",
    ),
    (
        both(),
        put((*TPU, "max_workers"), 3),
        (*SCALING, "max_replicas"),
        "error: {} is 4, and cluster.yaml's max_workers leave room for 3.",
    ),
    (
        put((*ACTOR, "resources", "TPU"), 0),
        both(),
        (*ACTOR, "resources"),
        "advice: {} ask for no TPU, so StableDiffusion computes on the CPU, and cluster.yaml's TPUs idle.",
    ),
    (
        both(),
        both(put((*NODE, "acceleratorType"), "v5litepod-8"), put((*TPU, "resources", "TPU"), 8)),
        (*ACTOR, "resources"),
        "advice: {} ask for 4 of the 8 chips of a v5litepod-8 in cluster.yaml; Ray 2.60 does not tell libtpu which "
        "are neighbours.",
    ),
]


@pytest.mark.parametrize(
    ("serve", "cluster", "key", "words"), TOGETHER, ids=[case[3].partition("{}")[2][1:60] for case in TOGETHER]
)
def test_a_config_that_its_cluster_cannot_run_is_found(
    tmp_path: Path, serve: Edit, cluster: Edit, key: Key, words: str
) -> None:
    text = serve(SERVE)
    findings = findings_of(tmp_path, text, cluster(CLUSTER))
    assert f"serve.yaml:{line_of(text, key) + 1}: {words.replace('{}', dotted(key), 1)}" in findings


@pytest.mark.parametrize(
    ("key", "content"),
    [((*ARGS, "api_keys_file"), "[]"), ((*ARGS, "jobs", "webhook_secret_file"), f"whsec_{'a' * 40}")],
)
def test_a_file_that_the_ingress_reads_must_be_mounted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: Key, content: str
) -> None:
    monkeypatch.setattr(builders, "ROOT", tmp_path)
    monkeypatch.setattr(cluster_file, "ROOT", tmp_path)
    for folder in ("app", "assets", "cluster", "jobs", "requirements"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / "keys.yaml").write_text(content)
    (tmp_path / "keys.yaml").chmod(0o600)
    serve = put(key, "keys.yaml")(SERVE)
    message = f"serve.yaml:{line_of(serve, key) + 1}: error: {dotted(key)} is keys.yaml, which cluster.yaml's "
    assert findings_of(tmp_path, serve, CLUSTER) == [f"{message}file_mounts bring to no node."]
    mounted = before(("file_mounts", "~/imagine/app"), "~/imagine/keys.yaml: keys.yaml")
    assert findings_of(tmp_path, serve, mounted(CLUSTER)) == []
    elsewhere = put(key, tmp_path / "keys.yaml")(SERVE)
    assert findings_of(tmp_path, elsewhere, CLUSTER) == [], "what is not in the repository comes by another way"
    assert findings_of(tmp_path, serve, CLUSTER) != []
    assert findings_of(tmp_path, serve, CLUSTER, local=True) == [], "nodes of this machine have it"


def test_several_replicas_share_a_node_where_it_has_room(tmp_path: Path) -> None:
    small = both(put((*ACTOR, "resources", "TPU"), 1), put((*SCALING, "max_replicas"), 16))
    serve = both(small, put((*INGRESS, "max_ongoing_requests"), 4096))
    assert findings_of(tmp_path, serve(SERVE), CLUSTER) == []
    alone = before((*MODEL, "max_ongoing_requests"), "max_replicas_per_node: 1")
    (finding,) = findings_of(tmp_path, both(serve, alone)(SERVE), CLUSTER)
    assert finding.endswith("is 16, and cluster.yaml's max_workers leave room for 4.")


def test_the_resource_of_the_head_is_known(tmp_path: Path) -> None:
    assert findings_of(tmp_path, SERVE, CLUSTER) == []
    (finding,) = findings_of(tmp_path, replace("node:__internal_head__", "node:elsewhere")(SERVE), CLUSTER)
    assert "ask for node:elsewhere 0.001, which no node type of cluster.yaml has" in finding


def test_an_invalid_file_is_not_held_against_others(tmp_path: Path) -> None:
    broken = put((*NODE, "acceleratorType"), "banana")(CLUSTER)
    (finding,) = findings_of(tmp_path, put((*ACTOR, "resources", "TPU"), 8)(SERVE), broken)
    assert "banana" in finding
