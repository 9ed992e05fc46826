"""cluster/gke: its files are held to KubeRay's and Kubernetes' own schemas, and to what Ray's autoscaler reads of them.

The schemas are reduced: tests/make_schemas.py. No Kubernetes has seen the files.
"""

import base64
import copy
import json
import re
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

from cluster import ROOT
from cluster.cli import UserError
from cluster.config import cluster_config
from cluster.config.cluster_config import Slice
from cluster.gke.__main__ import write
from cluster.gke.manifest import selector

Json = dict[str, Any]
CLUSTERS = [ROOT / "cluster.yaml", *sorted((ROOT / "configs").glob("cluster-*.yaml"))]
OPENED = {"host: 127.0.0.1 ": "host: 0.0.0.0 ", "api_keys_file: null ": "api_keys_file: {} "}
IMAGE = "us-central1-docker.pkg.dev/ours/imagine/imagine:7"


def config(folder: Path) -> Path:
    """serve_config.yaml with the API open to callers that have a key."""
    keys = folder / "api_keys.yaml"
    keys.write_text("[]\n")
    text = (ROOT / "serve_config.yaml").read_text()
    for shipped, opened in OPENED.items():
        assert text.count(shipped) == 1
        text = text.replace(shipped, opened.format(keys))
    (folder / "serve_config.yaml").write_text(text)
    return folder / "serve_config.yaml"


def written(folder: Path, cluster: Path = CLUSTERS[0], tpu: str = "") -> tuple[Json, Json]:
    """The RayService and the NetworkPolicy."""
    write(config(folder), cluster, IMAGE, tpu, folder)
    service, policy = yaml.safe_load_all((folder / "rayservice.yaml").read_text())
    return service, policy


def refuses(kind: str, value: Json) -> list[str]:
    schema = json.loads((ROOT / f"tests/cluster/schemas/{kind}.json").read_text())
    return [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(value)]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Json:
    return written(tmp_path_factory.mktemp("gke"))[0]


@pytest.mark.parametrize("cluster", CLUSTERS, ids=[file.stem for file in CLUSTERS])
def test_every_cluster_file_gives_objects_that_kuberay_and_kubernetes_accept(cluster: Path, tmp_path: Path) -> None:
    service, policy = written(tmp_path, cluster)
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    assert not refuses("rayservice", service)
    assert (policy["apiVersion"], policy["kind"]) == ("networking.k8s.io/v1", "NetworkPolicy")
    assert not refuses("networkpolicy", policy)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["headGroupSpec", "template", "spec", "containers", 0, "livenessProb"], {}),
        (["headGroupSpec", "template", "spec", "containers", 0, "env", 0, "value"], 1),
        (["authOptions", "mode"], "password"),
        (["workerGroupSpecs", 0, "maxReplicas"], "4"),
        (["workerGroupSpecs", 0, "template", "spec", "terminationGracePeriodSeconds"], "3 minutes"),
    ],
)
def test_the_schema_refuses_a_slip(service: Json, path: list[Any], value: Any) -> None:
    slip = copy.deepcopy(service)
    place = slip["spec"]["rayClusterConfig"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert refuses("rayservice", slip)


def test_what_runs_is_the_serve_config_word_for_word(tmp_path: Path) -> None:
    service, _ = written(tmp_path)
    assert service["spec"]["serveConfigV2"] == (tmp_path / "serve_config.yaml").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("cluster", CLUSTERS, ids=[file.stem for file in CLUSTERS])
def test_rays_autoscaler_reads_the_node_types_of_the_cluster_file_from_it(cluster: Path, tmp_path: Path) -> None:
    service, _ = written(tmp_path, cluster)
    metadata = {"name": "imagine", "namespace": "default"}
    read = _derive_autoscaling_config_from_ray_cr({"metadata": metadata, "spec": service["spec"]["rayClusterConfig"]})
    config = cluster_config.read(cluster)
    assert read["idle_timeout_minutes"] == config.idle_timeout_minutes
    for node in config.node_types.values():
        group = read["available_node_types"]["headgroup" if node.is_head else node.name.replace("_", "-")]
        limits = {"min_workers": node.min_workers, "max_workers": node.max_workers, "labels": dict(node.labels)}
        assert {name: group[name] for name in limits} == limits
        kept = {name: amount for name, amount in group["resources"].items() if name != "memory"}
        assert kept == {name: amount for name, amount in node.resources.items() if name != "node:__internal_head__"}


def test_a_spot_node_type_asks_for_spot_nodes(tmp_path: Path) -> None:
    service, _ = written(tmp_path, ROOT / "configs/cluster-spot.yaml")
    pod = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert "cloud.google.com/gke-spot" in {toleration["key"] for toleration in pod["tolerations"]}


def test_nothing_outside_of_the_cluster_reaches_it_and_no_file_has_a_secret(service: Json) -> None:
    assert service["spec"]["rayClusterConfig"]["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert not re.search(r"LoadBalancer|NodePort|[iI]ngress", json.dumps(service["spec"]["rayClusterConfig"]))
    assert service["spec"]["rayClusterConfig"]["authOptions"] == {"mode": "token", "secretName": "imagine-token"}


def test_kubernetes_kills_no_pod_before_its_requests_have_ended(service: Json) -> None:
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    drain_s = max(part["graceful_shutdown_timeout_s"] for part in config["applications"][0]["deployments"])
    for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        command = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert command[:3] == ["python", "-m", "cluster.node_watcher"]
        assert pod["terminationGracePeriodSeconds"] > int(command[-1]) >= drain_s


def test_a_tpu_that_only_gke_has_takes_the_place_of_the_cluster_files(tmp_path: Path) -> None:
    service, _ = written(tmp_path, tpu="v7x-8")
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert group["template"]["spec"]["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu7x",
        "cloud.google.com/gke-tpu-topology": "2x2x1",
    }
    assert group["labels"] == {"ray.io/accelerator-type": "TPU-V7X"}
    assert group["template"]["spec"]["containers"][0]["resources"]["limits"] == {"google.com/tpu": "4"}


@pytest.mark.parametrize(
    ("tpu", "sentence"),
    [
        ("v7x-16", "one host, and v7x-16 has 2"),
        ("v3-8", "GKE has no v3-8"),
        ("v6e-8", "is 4, and a host of v6e-8 has 8"),
        ("tpu7x-8", "Did you mean v7x-8?"),
    ],
)
def test_a_tpu_that_no_replica_fits_on_is_refused(tpu: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        written(tmp_path, tpu=tpu)


def test_google_and_ray_agree_on_the_shape_of_a_host() -> None:
    shapes = {
        name: selector(Slice(name))["cloud.google.com/gke-tpu-topology"] for name in ("v5litepod-1", "v6e-8", "v4-8")
    }
    assert shapes == {"v5litepod-1": "1x1", "v6e-8": "2x4", "v4-8": "2x2x1"}


def test_what_the_user_must_set_is_named_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(UserError) as refusal:
        write(ROOT / "serve_config.yaml", ROOT / "cluster.yaml", "", "", tmp_path)
    host, project = str(refusal.value).splitlines()
    assert re.search(r"serve_config.yaml:\d+: error: http_options.host must be 0.0.0.0 on Kubernetes", host)
    assert re.search(r"cluster.yaml:\d+: error: provider.project_id is not set", project)
    assert not list(tmp_path.iterdir())


def test_a_secret_that_no_pod_could_read_is_refused(tmp_path: Path) -> None:
    file, secret = config(tmp_path), tmp_path / "webhooks.txt"
    secret.write_text(f"whsec_{base64.b64encode(bytes(32)).decode()}")
    secret.chmod(0o600)
    file.write_text(file.read_text().replace("webhook_secret_file: null", f"webhook_secret_file: {secret}"))
    with pytest.raises(
        UserError, match=r"serve_config.yaml:\d+: error: .*webhook_secret_file must be null on Kubernetes"
    ):
        write(file, ROOT / "cluster.yaml", IMAGE, "", tmp_path)


def test_the_image_has_the_files_the_packages_and_the_environment_of_the_cluster_file(tmp_path: Path) -> None:
    written(tmp_path)
    dockerfile = (tmp_path / "Dockerfile").read_text()
    cluster = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    mounted = {local for target, local in cluster["file_mounts"].items() if "token" not in target}
    assert set(re.findall(r"^COPY --chown=ray (\S+) /home/ray/imagine/\1$", dockerfile, re.MULTILINE)) == mounted
    assert all((ROOT / local).is_dir() for local in mounted)
    assert "FROM python:3.11-slim" in dockerfile
    assert "--require-hashes -r requirements/tpu.txt" in dockerfile
    (command,) = [text for text in cluster["setup_commands"] if text.startswith("echo 'export ")]
    for assignment in command.partition("export ")[2].partition("'")[0].split():
        assert assignment.replace("$HOME", "/home/ray") in dockerfile
    ignored = (tmp_path / "Dockerfile.dockerignore").read_text().splitlines()
    assert ignored[0] == "*" and {line[1:] for line in ignored if line.startswith("!")} == mounted


def test_the_file_of_api_keys_is_a_mounted_secret_that_the_image_points_to(tmp_path: Path) -> None:
    service, _ = written(tmp_path)
    assert f"ln -s /etc/imagine/api_keys.yaml {tmp_path}/api_keys.yaml" in (tmp_path / "Dockerfile").read_text()
    pod = service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]
    assert pod["volumes"] == [{"name": "api-keys", "secret": {"secretName": "imagine-api-keys"}}]
    assert pod["containers"][0]["volumeMounts"] == [{"name": "api-keys", "mountPath": "/etc/imagine", "readOnly": True}]
