"""The Kubernetes objects: a RayService for KubeRay, and a NetworkPolicy that keeps other pods away.

What runs is the Serve config, word for word. The worker groups are the cluster file's TPU node types. A replica of a
group is one host, so a node pool needs no placement of several hosts.
"""

from dataclasses import dataclass
from typing import Any

import yaml

from app.ray_internals import RAY_VERSION
from app.ray_internals.autoscaler import GKE_ACCELERATORS
from app.ray_internals.core import tpu
from cluster.cli import UserError
from cluster.config.cluster_config import ClusterConfig, NodeType, Slice
from cluster.config.serve_config import ServeConfig
from cluster.gke.image import KEYS_FOLDER, UID, searched

Json = dict[str, Any]
LONGEST_NAME = 47  # of a RayService: KubeRay makes the names of clusters and services from it
AGENT_PORT, GCS_PORT, DASHBOARD_PORT = 52365, 6379, 8265  # Ray's defaults, which KubeRay counts on
HEAD_SIZE = {"cpu": "2", "memory": "8Gi"}  # of an n2-standard-4, beside the autoscaler and Kubernetes' own pods
WORKER_MEMORY = "32Gi"  # a request; the pod has its host to itself
MARGIN_S = 30  # from the end of a drain to SIGKILL
CLIENT = "imagine-client"  # label of the pods that may reach the API


class Literal(str):
    """A text that YAML shows line by line."""


class Dumper(yaml.SafeDumper):
    pass


Dumper.add_representer(Literal, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|"))


def text(objects: list[Json], sources: str) -> str:
    header = f"# `make gke` writes this file from {sources}. Nobody has run it on Kubernetes yet.\n"
    return header + yaml.dump_all(objects, Dumper=Dumper, sort_keys=False, width=10**6)


def objects(
    serve: ServeConfig, config: str, cluster: ClusterConfig, image: str, tpus: Slice | None = None
) -> list[Json]:
    """`config` is the text of the Serve config. `tpus` takes the place of the cluster file's slices."""
    name, pods = service_name(cluster), Pods(service_name(cluster), image, serve.http.port)
    workers = [node for node in cluster.node_types.values() if node.slice and not node.is_head]
    service = {
        "serveConfigV2": Literal(config),
        "upgradeStrategy": {"type": "NewCluster"},  # a new image has a second cluster take over from the first
        "rayClusterConfig": {
            "rayVersion": RAY_VERSION,
            "authOptions": {"mode": "token", "secretName": f"{name}-token"},
            "enableInTreeAutoscaling": True,
            "autoscalerOptions": {"version": "v2", "idleTimeoutSeconds": round(cluster.idle_timeout_minutes * 60)},
            "headGroupSpec": pods.head(cluster.node_types[cluster.head], platforms(cluster, "head")),
            "workerGroupSpecs": [
                pods.workers(node, tpus or node.slice, platforms(cluster, "worker"), drain_s(serve))
                for node in workers
                if node.slice
            ],
        },
    }
    return [
        {"apiVersion": "ray.io/v1", "kind": "RayService", "metadata": {"name": name}, "spec": service},
        network_policy(name, serve.http.port),
    ]


def service_name(cluster: ClusterConfig) -> str:
    name = str(cluster.document.at(("cluster_name",)))
    if len(name) > LONGEST_NAME:
        text = f"must have at most {LONGEST_NAME} characters on Kubernetes, got {len(name)}."
        raise UserError(str(cluster.document.error(("cluster_name",), text)))
    return name


def platforms(cluster: ClusterConfig, role: str) -> str:
    commands = " ".join(cluster.document.at((f"{role}_start_ray_commands",)) or ())
    return searched(r"JAX_PLATFORMS=(\S+)", commands, cluster)


def drain_s(serve: ServeConfig) -> int:
    """How long the slowest deployment may take to finish its requests."""
    timeouts = [
        deployment.option("graceful_shutdown_timeout_s")
        for application in serve.applications
        for deployment in application.deployments
    ]
    return int(max(timeouts))


def selector(tpus: Slice) -> dict[str, str]:
    """GKE's labels of nodes with such a slice, from the tables by which Ray reads these labels. Raises UserError."""
    accelerator = {generation: name for name, generation in GKE_ACCELERATORS.items()}.get(tpus.generation)
    topologies = [
        topology
        for topology in sorted(tpu.VALID_TPU_TOPOLOGY[tpus.generation])
        if tpu.get_num_chips_from_topology(topology) == tpus.chips
    ]
    if not accelerator or not topologies:
        raise UserError(f"GKE has no {tpus.name}. It has {', '.join(sorted(set(GKE_ACCELERATORS.values())))}.")
    if tpus.hosts > 1:
        raise UserError(f"A replica needs one host, and {tpus.name} has {tpus.hosts}. Name a smaller slice.")
    return {"cloud.google.com/gke-tpu-accelerator": accelerator, "cloud.google.com/gke-tpu-topology": topologies[0]}


@dataclass(frozen=True)
class Pods:
    """The pods of a RayService."""

    service: str
    image: str
    port: int  # of the API

    def head(self, node: NodeType, jax_platforms: str) -> Json:
        container = {
            **self.container("ray-head", jax_platforms),
            "ports": [
                {"name": "gcs-server", "containerPort": GCS_PORT},
                {"name": "dashboard", "containerPort": DASHBOARD_PORT},
                {"name": "serve", "containerPort": self.port},  # KubeRay makes a Service for a port of this name
            ],
            "resources": {"requests": HEAD_SIZE, "limits": {"memory": HEAD_SIZE["memory"]}},
            "readinessProbe": probe("/api/healthz", AGENT_PORT, failures=10),
        }
        return {
            "serviceType": "ClusterIP",  # of the Service for the API too: nothing outside of the cluster reaches it
            "rayStartParams": {"dashboard-host": "0.0.0.0"},  # KubeRay deploys through it, from its own pod
            "resources": amounts(node, "CPU"),
            "template": self.template(container),
        }

    def workers(self, node: NodeType, tpus: Slice, jax_platforms: str, drain_s: int) -> Json:
        spot = bool(node.at("node_config", "schedulingConfig", "spot"))
        leave = ["python", "-m", "cluster.node_watcher", "--leave-within", str(drain_s)]
        container = {
            **self.container("ray-worker", jax_platforms),
            "resources": {
                "requests": {"cpu": f"{node.resources['CPU']:g}", "memory": WORKER_MEMORY},
                "limits": {"google.com/tpu": str(tpus.chips)},
            },
            # A pod that is ready gets requests. With proxy_location HeadOnly no worker has a proxy, and none is ready.
            "readinessProbe": probe("/-/healthz", self.port, failures=1),
            "lifecycle": {"preStop": {"exec": {"command": leave}}},
        }
        return {
            "groupName": node.name.replace("_", "-"),  # part of the pods' names
            "numOfHosts": tpus.hosts,
            "replicas": node.min_workers,
            "minReplicas": node.min_workers,
            "maxReplicas": node.max_workers,
            "rayStartParams": {},
            "resources": amounts(node, "CPU") | {"TPU": str(tpus.chips)},
            "labels": {**node.labels, "ray.io/accelerator-type": tpus.label},
            "template": self.template(
                container,
                nodeSelector=selector(tpus) | ({"cloud.google.com/gke-spot": "true"} if spot else {}),
                tolerations=[
                    {"key": key, "operator": "Exists", "effect": "NoSchedule"}
                    for key in ("google.com/tpu", *(["cloud.google.com/gke-spot"] if spot else []))
                ],
                terminationGracePeriodSeconds=drain_s + MARGIN_S,
            ),
        }

    def container(self, name: str, jax_platforms: str) -> Json:
        return {
            "name": name,
            "image": self.image,
            "env": [{"name": "JAX_PLATFORMS", "value": jax_platforms}],
            "volumeMounts": [{"name": "api-keys", "mountPath": str(KEYS_FOLDER), "readOnly": True}],
            "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
            "livenessProbe": probe("/api/healthz", AGENT_PORT, failures=24),
        }

    def template(self, container: Json, **spec: Any) -> Json:
        return {
            "metadata": {"labels": {"app": self.service}},
            "spec": {
                "securityContext": {
                    "runAsNonRoot": True,
                    "runAsUser": UID,
                    "runAsGroup": UID,
                    "seccompProfile": {"type": "RuntimeDefault"},
                },
                "containers": [container],
                "volumes": [{"name": "api-keys", "secret": {"secretName": f"{self.service}-api-keys"}}],
                **spec,
            },
        }


def amounts(node: NodeType, *names: str) -> dict[str, str]:
    """What Ray may place on such a node, whatever Kubernetes gives the pod."""
    return {name: f"{node.resources.get(name, 0):g}" for name in names}


def probe(path: str, port: int, failures: int) -> Json:
    return {
        "httpGet": {"path": path, "port": port},
        "initialDelaySeconds": 10,
        "periodSeconds": 5,
        "timeoutSeconds": 5,
        "failureThreshold": failures,
    }


def network_policy(service: str, port: int) -> Json:
    """Admits the pods of Ray to one another, KubeRay to what it asks, and pods with a label to the API."""
    operator = {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}}}
    ours, clients = ({"podSelector": {"matchLabels": labels}} for labels in ({"app": service}, {CLIENT: "true"}))
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": service},
        "spec": {
            "podSelector": {"matchLabels": {"app": service}},
            "policyTypes": ["Ingress"],
            "ingress": [
                {"from": [ours]},
                {"from": [operator], "ports": tcp(DASHBOARD_PORT, port)},
                {"from": [clients], "ports": tcp(port)},
            ],
        },
    }


def tcp(*ports: int) -> list[Json]:
    return [{"protocol": "TCP", "port": port} for port in ports]
