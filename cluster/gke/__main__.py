"""`python -m cluster.gke`, which is what `make gke` runs: writes what Google Kubernetes Engine needs into a folder.

The RayService is for KubeRay 1.7. Nothing is sent anywhere.
"""

from collections.abc import Iterator
from pathlib import Path

from cluster import ROOT
from cluster.cli import Parser, UserError, path, run_command
from cluster.config import cluster_config, lint, serve_config
from cluster.config.cluster_config import ClusterConfig, Slice, wrong_slice
from cluster.config.documents import refuse
from cluster.config.serve_config import ServeConfig
from cluster.gke import image, manifest
from cluster.terminal import say


def write(config: Path, cluster: Path, name: str, tpu: str, folder: Path) -> None:
    for file in (
        config,
        cluster,
    ):  # each by itself: Kubernetes mounts the file of API keys, and the cluster file need not
        lint.refuse_errors([file])
    serve, nodes = serve_config.read(config), cluster_config.read(cluster)
    if missing := [*lacks_access(serve), *([] if name else lacks_project(nodes))]:
        raise UserError("\n".join(missing))
    tpus = slice_named(tpu) if tpu else None
    check_replicas(serve, nodes, tpus)
    name = name or default_name(nodes)
    container = image.of(nodes, serve)
    objects = manifest.objects(serve, config.read_text("utf-8"), nodes, name, tpus)
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "Dockerfile": image.dockerfile(container, folder / "Dockerfile"),
        "Dockerfile.dockerignore": image.dockerignore(container),
        "rayservice.yaml": manifest.text(objects, f"{config.name} and {cluster.name}"),
    }
    for file_name, content in files.items():
        (folder / file_name).write_text(content)
    say(f"{folder} has {', '.join(files)}. Next, as docs/deploy-google-cloud.md says:")
    say(next_steps(folder, name, serve, nodes))


def lacks_access(serve: ServeConfig) -> Iterator[str]:
    """KubeRay asks the proxy from another pod whether it is healthy, and has its Service lead to those that answer."""
    if serve.http.host != "0.0.0.0":
        text = f"must be 0.0.0.0 on Kubernetes, where other pods ask the API, got {serve.http.host}."
        finding = serve.document.error(("http_options", "host"), f"{text} This needs API keys: docs/opening-the-api.md")
        yield str(finding)


def lacks_project(cluster: ClusterConfig) -> Iterator[str]:
    if not cluster.document.at(("provider", "project_id")):
        text = "is not set, so the image has no name. Set it, or name the image: make gke IMAGE=REGISTRY/imagine:1"
        yield str(cluster.document.error(("provider", "project_id"), text))


def default_name(cluster: ClusterConfig) -> str:
    """The image's name in the Artifact Registry of the cluster file's project."""
    project, region = (cluster.document.at(("provider", key)) for key in ("project_id", "region"))
    return f"{region}-docker.pkg.dev/{project}/imagine/imagine:1"


def slice_named(name: str) -> Slice:
    if wrong := wrong_slice({"acceleratorType": name}):
        raise UserError(f"TPU {wrong}")
    tpus = Slice(name)
    manifest.selector(tpus)
    return tpus


def check_replicas(serve: ServeConfig, cluster: ClusterConfig, tpus: Slice | None) -> None:
    """Every replica fits on some node of the cluster file, or else on a host of the TPU that takes their place."""
    for application in serve.applications:
        for deployment in application.deployments:
            if tpus and deployment.chips not in (0, tpus.chips):
                text = f"is {deployment.chips}, and a host of {tpus.name} has {tpus.chips}."
                raise UserError(str(deployment.error(deployment.devices_key, text)))
            if not tpus:
                refuse(finding for rule in lint.PLACEMENT_RULES for finding in rule(deployment, cluster))


def next_steps(folder: Path, name: str, serve: ServeConfig, cluster: ClusterConfig) -> str:
    service, keys = manifest.service_name(cluster), image.keys_file(serve)
    return "\n".join(
        [
            f"  docker build -f {folder / 'Dockerfile'} -t {name} . && docker push {name}",
            f"  kubectl create secret generic {service}-token --from-file=auth_token=$HOME/.ray/auth_token",
            f"  kubectl create secret generic {service}-api-keys --from-file={keys}",
            f"  kubectl apply -f {folder / 'rayservice.yaml'}",
        ]
    )


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--config", type=path, default=ROOT / "serve_config.yaml", help="what runs")
    parser.add_argument("--cluster", type=path, default=ROOT / "cluster.yaml", help="on which node types")
    parser.add_argument("--image", default="", help="its name (default: in the project's Artifact Registry)")
    parser.add_argument("--tpu", default="", help="takes the place of the cluster file's TPU, such as v7x-8")
    parser.add_argument("--folder", type=path, default=Path("outputs/gke"), help="for the files")
    arguments = parser.parse_args()
    write(arguments.config, arguments.cluster, arguments.image, arguments.tpu, arguments.folder)


if __name__ == "__main__":
    run_command(main)
