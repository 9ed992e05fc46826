"""Rules that hold a Serve config against a cluster file: replicas fit on nodes, and nodes get the files they need."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from app.serving.replica import StableDiffusion
from cluster.config.cluster_config import ClusterConfig
from cluster.config.documents import Finding
from cluster.config.serve_config import Application, Deployment


def check_named_files(app: Application, cluster: ClusterConfig) -> Iterator[Finding]:
    """The ingress may be placed on any node, so all nodes get the files with the API keys and the webhooks' secret."""
    mounted = (cluster.document.at(("file_mounts",)) or {}).values()
    for key in (("api_keys_file",), ("jobs", "webhook_secret_file")):
        name: object = app.args
        for part in key:
            name = getattr(name, part, None)
        if not isinstance(name, str) or name.startswith(("~", "/")):
            continue
        if not any(Path(name).is_relative_to(local) for local in mounted):
            text = f"is {name}, which {cluster.document.file}'s file_mounts bring to no node."
            yield app.error(("args", *key), text)


def check_capacity(deployment: Deployment, cluster: ClusterConfig) -> Iterator[Finding]:
    """A replica fits on some node, and all replicas fit on as many nodes as max_workers allows."""
    if cluster.provider == "local":  # Ray asks the machines themselves for their resources
        return
    needs, file = needs_of(deployment), cluster.document.file
    fitting = {name: replicas_on(node.resources, needs, deployment) for name, node in cluster.node_types.items()}
    if not any(fitting.values()):
        needed = ", ".join(f"{name} {amount:g}" for name, amount in needs.items() if amount)
        offered = "; ".join(f"{name}: {amounts(node.resources)}" for name, node in cluster.node_types.items())
        text = f"ask for {needed}, which no node type of {file} has ({offered})."
        yield deployment.error(("ray_actor_options",), text)
        return
    workers_left, room = cluster.max_workers, 0.0
    for name in sorted(fitting, key=lambda name: -fitting[name]):
        node = cluster.node_types[name]
        nodes = 1 if node.is_head else min(node.max_workers, workers_left)
        workers_left -= 0 if node.is_head else nodes
        room += fitting[name] * nodes if fitting[name] else 0
    if deployment.max_replicas > room:
        text = f"is {deployment.max_replicas}, and {file}'s max_workers leave room for {room:g}."
        yield deployment.error(deployment.max_replicas_key, text)


def needs_of(deployment: Deployment) -> dict[str, float]:
    """The resources of one replica."""
    actor = deployment.actor
    needs = {"CPU": 1.0 if actor.num_cpus is None else actor.num_cpus, "GPU": actor.num_gpus or 0, **actor.resources}
    if actor.accelerator_type:
        needs[f"accelerator_type:{actor.accelerator_type}"] = 0.001
    return needs


def replicas_on(resources: Mapping[str, float], needs: Mapping[str, float], deployment: Deployment) -> float:
    most = min((resources.get(name, 0) // amount for name, amount in needs.items() if amount), default=math.inf)
    return min(most, deployment.at("max_replicas_per_node") or math.inf)


def amounts(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {amount:g}" for name, amount in resources.items() if ":" not in name and "-" not in name)


def check_model_has_chips(deployment: Deployment, cluster: ClusterConfig) -> Iterator[Finding]:
    if deployment.name != StableDiffusion.__name__:
        return
    file = cluster.document.file
    hosts = {node.slice.name: node.resources.get("TPU", 0) for node in cluster.node_types.values() if node.slice}
    if hosts and not deployment.devices:
        text = f"ask for no TPU, so {deployment.name} computes on the CPU, and {file}'s TPUs idle."
        yield deployment.advice(("ray_actor_options", "resources"), text)
    for name, chips in hosts.items():
        if deployment.chips == 4 and chips == 8:  # Ray sets which chips are visible, but not their bounds
            text = (
                f"ask for 4 of the 8 chips of a {name} in {file}; Ray 2.60 does not tell libtpu which are neighbours."
            )
            yield deployment.advice(("ray_actor_options", "resources"), text)
