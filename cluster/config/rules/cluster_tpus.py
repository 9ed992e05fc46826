"""Rules for the TPU node types of a cluster file of Google Cloud: resources, labels, hosts of a slice, runtime."""

import re
from collections.abc import Iterator

from cluster.config.cluster_config import ACCELERATOR_LABEL, RUNTIMES, NodeType, Slice
from cluster.config.documents import Finding


def check_resources(node_type: NodeType, tpus: Slice) -> Iterator[Finding]:
    resources = node_type.at("resources")
    if "TPU" not in resources:
        text = f"must say TPU: {tpus.chips_per_host}, or no load ever starts a node of this type."
        yield node_type.error(("resources",), text)
    elif resources["TPU"] != tpus.chips_per_host:
        text = f"must be {tpus.chips_per_host}, the chips of a host of {tpus.name}, got {resources['TPU']}."
        yield node_type.error(("resources", "TPU"), text)
    for name in resources:
        wrong_type = name.startswith("accelerator_type:") and name != f"accelerator_type:{tpus.label}"
        if wrong_type or (re.fullmatch("TPU-.*-head", name) and name != f"TPU-{tpus.name}-head"):
            yield node_type.error(("resources", name), f"is no resource of a {tpus.name}.")


def check_labels(node_type: NodeType, tpus: Slice) -> Iterator[Finding]:
    labels = node_type.labels
    if ACCELERATOR_LABEL not in labels:
        text = f"lack {ACCELERATOR_LABEL}: {tpus.label}, so no request for that label starts a node."
        yield node_type.advice(("labels",), text)
    elif labels[ACCELERATOR_LABEL] != tpus.label:
        text = f"must be {tpus.label}, as Ray finds on a {tpus.name}, got {labels[ACCELERATOR_LABEL]}."
        yield node_type.error(("labels", ACCELERATOR_LABEL), text)
    if tpus.hosts > 1 and "ray.io/tpu-worker-id" in labels:
        text = f"would be the same on all {tpus.hosts} hosts."
        yield node_type.error(("labels", "ray.io/tpu-worker-id"), text)


def check_hosts(node_type: NodeType, tpus: Slice) -> Iterator[Finding]:
    if tpus.hosts > 1 and node_type.at("min_workers") != node_type.at("max_workers"):
        text = f"is {tpus.hosts} hosts, of which the autoscaler sees one: set min_workers and max_workers to one value."
        yield node_type.advice(("node_config",), text)


def check_runtime(node_type: NodeType, tpus: Slice) -> Iterator[Finding]:
    runtime, right = node_type.at("node_config", "runtimeVersion"), RUNTIMES.get(tpus.generation)
    key = ("node_config", "runtimeVersion")
    if not runtime:
        yield node_type.error(key, f"is missing; for {tpus.generation} it is {right}.")
    elif right and runtime != right:
        text = f"is {runtime}; Google's documents name {right} for {tpus.generation}."
        yield node_type.advice(key, text)
