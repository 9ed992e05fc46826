"""cluster/config/serve_config.py and cluster_config.py: what whoever reads a config gets, and what is refused."""

from pathlib import Path

import pytest

from cluster import ROOT
from cluster.cli import UserError
from cluster.config import cluster_config, serve_config
from tests.cluster.slips import ARGS, CLUSTER, MODEL, NODE, SERVE, TPU, Edit, drop, put, rename, replace


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    return file


def test_a_serve_config_has_rays_defaults_where_the_file_leaves_options_out(tmp_path: Path) -> None:
    config = serve_config.read(written(tmp_path, drop((*MODEL, "max_ongoing_requests"))(SERVE)))
    (application,) = config.applications
    ingress, model = application.deployments
    assert (model.name, model.chips, model.max_replicas, model.option("max_ongoing_requests")) == (
        "StableDiffusion",
        4,
        4,
        5,
    )
    assert (ingress.chips, ingress.max_replicas, ingress.autoscaling) == (0, 1, None)


def test_the_image_applications_are_those_of_the_apps_builder(tmp_path: Path) -> None:
    for import_path, count in (("app.builders:text_to_image", 1), ("app.builders.text_to_image", 1), ("a.b:c", 0)):
        text = replace("app.builders:text_to_image", import_path)(SERVE)
        assert len(serve_config.read(written(tmp_path, text)).image_applications) == count


def test_the_args_are_the_builders_model(tmp_path: Path) -> None:
    (application,) = serve_config.read(written(tmp_path, SERVE)).image_applications
    assert application.image_args().sizes == ["128x128"]
    assert application.args == application.image_args()


@pytest.mark.parametrize(
    ("slip", "message"),
    [
        (put((*ARGS, "sizes"), "[7x7]"), r":\d+: error: applications\[0\].args.sizes is not valid: sizes must be "),
        (rename((*ARGS, "dtype"), "dtyp"), r":\d+: error: applications\[0\].args.dtyp is not known, and would be ref"),
    ],
)
def test_args_that_the_builder_would_refuse_are_an_error(tmp_path: Path, slip: Edit, message: str) -> None:
    (application,) = serve_config.read(written(tmp_path, slip(SERVE))).image_applications
    with pytest.raises(UserError, match=message):
        application.image_args()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (put(("http_options", "port"), "eighty")(SERVE), r"\.yaml:\d+: error: http_options.port is not valid: "),
        (CLUSTER, "has no applications, so it is no Serve config"),
        ("a: [", "it is not YAML"),
        ("- 1", "has no applications"),
    ],
)
def test_what_is_no_serve_config_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        serve_config.read(written(tmp_path, text))


def test_node_types_have_the_resources_that_rays_launcher_adds() -> None:
    config = cluster_config.read(ROOT / "cluster.yaml")
    head, tpu = config.node_types["head"], config.node_types["ray_tpu"]
    assert (head.is_head, head.resources, head.slice) == (True, {"CPU": 0, "node:__internal_head__": 1}, None)
    assert tpu.resources == {"CPU": 8, "TPU": 4, "TPU-v5litepod-4-head": 1}
    assert tpu.slice and (tpu.slice.chips, tpu.slice.hosts, tpu.slice.label) == (4, 1, "TPU-V5LITEPOD")
    assert (config.head, config.max_workers, config.idle_timeout_minutes) == ("head", 4, 10)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (rename((*TPU, "max_workers"), "max_worker")(CLUSTER), r"\.yaml:\d+: error: available_node_types.*max_worker"),
        (put((*NODE, "acceleratorType"), "banana")(CLUSTER), r"must be a TPU that Ray knows, .* got banana\."),
        (put(("head_node_type",), "haed")(CLUSTER), "head_node_type is refused by Ray"),
        (put(("max_workers",), "many")(CLUSTER), "max_workers is not valid: 'many' is not of type 'integer'"),
        (SERVE, "has no available_node_types, so it is no cluster file"),
    ],
)
def test_what_is_no_cluster_file_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        cluster_config.read(written(tmp_path, text))


def test_a_file_that_is_missing_is_named() -> None:
    for read in (serve_config.read, cluster_config.read):
        with pytest.raises(UserError, match=r"nowhere.yaml cannot be read: No such file or directory\."):
            read(Path("nowhere.yaml"))
