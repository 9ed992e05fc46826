"""cluster/config/rules/google_names.py: what Google Cloud would refuse is refused before anything is started."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import ROOT
from cluster.config.documents import read
from cluster.config.rules.google_names import check_names

TPU = ("available_node_types", "ray_tpu", "node_config")
HEAD = ("available_node_types", "head", "node_config")
NAME = "lower-case letters, digits and hyphens, beginning with a letter and not ending with a hyphen"


def findings_of(tmp_path: Path, key: tuple[str, ...], value: object) -> list[str]:
    """The findings about cluster.yaml with another value for one key."""
    content: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    inner = content
    for part in key[:-1]:
        inner = inner[part]
    inner[key[-1]] = value
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump(content, allow_unicode=True))
    document, findings = read(file)
    assert document and not findings
    return [finding.text for finding in check_names(document)]


@pytest.mark.parametrize("name", ["Imagine_TPU", "imagine_tpu", "imagine.tpu", "1imagine", "imagine-", "", "a" * 38, 3])
def test_a_cluster_name_must_be_the_beginning_of_machine_names(tmp_path: Path, name: object) -> None:
    assert findings_of(tmp_path, ("cluster_name",), name) == [
        f"cluster_name must be 1 to 37 {NAME}, because machines are named after it (ray-{name}-head-...), got {name}."
    ]


@pytest.mark.parametrize("name", ["a", "imagine-v4-8", "a" * 37])
def test_a_cluster_name_that_google_takes_is_taken(tmp_path: Path, name: str) -> None:
    assert findings_of(tmp_path, ("cluster_name",), name) == []


def test_where_workers_are_machines_without_a_tpu_their_names_are_longer(tmp_path: Path) -> None:
    text = (ROOT / "cluster.yaml").read_text().replace("cluster_name: imagine ", f"cluster_name: {'a' * 36} ")
    file = tmp_path / "cluster.yaml"
    for content, most in ((text, 37), (text.replace("acceleratorType: v5litepod-4", "machineType: n2-standard-4"), 35)):
        file.write_text(content)
        document, _ = read(file)
        assert document
        texts = [finding.text for finding in check_names(document)]
        assert texts == [] if most == 37 else f"must be 1 to {most} " in texts[0]


def test_names_fit_those_that_ray_makes_of_them() -> None:
    """Ray adds the rest of a machine's name, and asserts its length."""
    pytest.importorskip("googleapiclient", reason="needs Google's client: make gcp")
    from ray.autoscaler._private.gcp.node import _generate_node_name

    name = _generate_node_name({"ray-node-name": f"ray-{'a' * 37}-head"}, "compute")
    assert len(name) == 63


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        (("provider", "region"), "US-Central", "a region, such as us-central1"),
        (("provider", "region"), "us-central1-a", "a region, such as us-central1"),
        (("provider", "availability_zone"), "us-central1", "a zone, such as us-central1-a"),
        (("provider", "availability_zone"), "us-central1_a", "a zone, such as us-central1-a"),
        (("provider", "project_id"), "My Project", f"the project's id, not its name: 6 to 30 {NAME}"),
        (("provider", "project_id"), "short", f"the project's id, not its name: 6 to 30 {NAME}"),
        (("provider", "project_id"), "1234567890", f"the project's id, not its name: 6 to 30 {NAME}"),
        (("provider", "project_id"), "a" * 31, f"the project's id, not its name: 6 to 30 {NAME}"),
    ],
)
def test_a_region_a_zone_and_a_project_must_have_googles_form(
    tmp_path: Path, key: tuple[str, ...], value: str, words: str
) -> None:
    assert f"{'.'.join(key)} must be {words}, got {value}." in findings_of(tmp_path, key, value)


@pytest.mark.parametrize("zone", ["europe-west4-b", "northamerica-northeast1-a", "us-south1-ai1b"])
def test_every_zone_of_google_is_accepted(tmp_path: Path, zone: str) -> None:
    assert findings_of(tmp_path, ("provider", "availability_zone"), zone) == []


@pytest.mark.parametrize("project", ["my-project-123", "example.com:my-project", None])
def test_a_project_of_a_domain_is_accepted_and_none_is_no_matter_of_names(tmp_path: Path, project: str | None) -> None:
    assert findings_of(tmp_path, ("provider", "project_id"), project) == []


@pytest.mark.parametrize("tag", ["Imagine", "imagine_tpu", "-imagine", "imagine-", "a" * 64, 7])
def test_a_tag_of_a_machine_and_of_a_tpu_must_be_a_name(tmp_path: Path, tag: object) -> None:
    place = "available_node_types.ray_tpu.node_config.tags[1]"
    assert findings_of(tmp_path, (*TPU, "tags"), ["ok", tag]) == [f"{place} must be 1 to 63 {NAME}, got {tag}."]
    place = "available_node_types.head.node_config.tags.items[0]"
    assert findings_of(tmp_path, (*HEAD, "tags"), {"items": [tag]}) == [f"{place} must be 1 to 63 {NAME}, got {tag}."]


def test_labels_follow_the_rules_for_keys_and_for_values(tmp_path: Path) -> None:
    place = "available_node_types.ray_tpu.node_config.labels"
    good = {"team": "", "team-1_x": "a_b-c", "straße": "größe", "団体": "東京", "a" * 63: "b" * 63}
    assert findings_of(tmp_path, (*TPU, "labels"), good) == []
    for bad in ("Team", "1team", "", "team.x", "a" * 64):
        (finding,) = findings_of(tmp_path, (*TPU, "labels"), {bad: "x"})
        assert finding.startswith(f"{place}.{bad} must be named with 1 to 63 lower-case letters, digits, hyphens and")
    for value in ("Team", "a.b", "b" * 64, 3, None):
        (finding,) = findings_of(tmp_path, (*TPU, "labels"), {"team": value})
        words = "a text of at most 63 lower-case letters, digits, hyphens and underscores"
        assert finding == f"{place}.team must be {words}, got {value}."


def test_a_machine_has_at_most_64_tags_and_64_labels(tmp_path: Path) -> None:
    assert findings_of(tmp_path, (*TPU, "tags"), [f"t{i}" for i in range(65)])[0].endswith(
        "must be at most 64, got 65."
    )
    assert findings_of(tmp_path, (*TPU, "labels"), {f"t{i}": "" for i in range(65)})[0].endswith("at most 64, got 65.")


def test_a_node_types_name_must_be_valid_as_a_label(tmp_path: Path) -> None:
    content = yaml.safe_load((ROOT / "cluster.yaml").read_text())["available_node_types"]
    (finding,) = findings_of(
        tmp_path, ("available_node_types",), {"head": content["head"], "TPU.big": content["ray_tpu"]}
    )
    assert finding.startswith("available_node_types.TPU.big must be a valid value of a label, because Ray labels")


@pytest.mark.parametrize(("network", "good"), [("Default", False), ("my_net", False), ("projects/x/global/n/ok", True)])
def test_a_network_must_be_a_name_or_a_path_that_ends_with_one(tmp_path: Path, network: str, good: bool) -> None:
    for key, value in (
        ((*TPU, "networkConfig"), {"network": network}),
        ((*HEAD, "networkInterfaces"), [{"network": network}]),
    ):
        assert (findings_of(tmp_path, key, value) == []) is good
