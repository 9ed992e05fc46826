"""The model of a file for `ray up`: its node types as Ray completes them, and the TPU slice of each.

Rules about it stand in cluster/config/rules/. Knows nothing of what will run on the cluster.
"""

import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import ray.autoscaler

from app.ray_internals.autoscaler import check_google_node_type, prepare_config, validate_config
from app.ray_internals.core import tpu
from cluster.config.documents import Document, Finding, Key, Section, did_you_mean, read_with, refuse

logging.getLogger(prepare_config.__module__).setLevel(logging.WARNING)  # else it logs each bound that it fills in

KEY = "available_node_types"  # the key that makes a file a cluster file
SCHEMA = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
ACCELERATOR_LABEL = "ray.io/accelerator-type"
GPU_NODE_TYPE = "local_gpu"
GPU_NODE = {"min_workers": 0, "max_workers": 1, "node_config": {}}
GPU_NODE_CPUS = 8  # that Ray may place work on; it keeps an idle process for each
SETUP_COMMANDS = ("setup_commands", "head_setup_commands", "worker_setup_commands")
START_COMMANDS = ("head_start_ray_commands", "worker_start_ray_commands")
COMMANDS = ("initialization_commands", *SETUP_COMMANDS, *START_COMMANDS)
NODE_KINDS = ("machineType", "acceleratorType", "acceleratorConfig")  # one of them makes a node_config a machine or TPU
# Names of TPU generations in Google's documents that Ray's launcher calls otherwise.
GENERATIONS = {"v5e": "v5litepod", "v5lite": "v5litepod", "v5": "v5p", "tpu7x": "v7x"}
RUNTIMES = {  # the image of the operating system: cloud.google.com/tpu/docs/runtimes
    **dict.fromkeys(("v2", "v3", "v4"), "tpu-ubuntu2204-base"),
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}


@dataclass(frozen=True)
class Slice:
    """A TPU slice, by Google's name for it, such as v5litepod-4."""

    name: str

    @property
    def generation(self) -> str:
        return self.name.partition("-")[0]

    @property
    def chips(self) -> int:
        return tpu.get_total_chips_from_accelerator_type(self.name)

    @property
    def chips_per_host(self) -> int:
        return tpu.get_num_tpu_visible_chips_per_host(self.name)

    @property
    def hosts(self) -> int:
        return max(1, self.chips // self.chips_per_host)

    @property
    def label(self) -> str:
        return f"TPU-{self.generation.upper()}"  # as Ray detects it


@dataclass(frozen=True)
class NodeType(Section):
    """A node type with Ray's defaults, and with the resources that Ray's launcher adds."""

    name: str
    is_head: bool
    resources: Mapping[str, float]
    labels: Mapping[str, str]
    min_workers: int
    max_workers: int
    slice: Slice | None


@dataclass(frozen=True)
class ClusterConfig:
    document: Document
    gpus: int = 0  # of this machine: the local cluster has them as GPU_NODE, beside the file's node types

    @cached_property
    def prepared(self) -> dict[str, Any]:
        prepared: dict[str, Any] = prepare_config(self.document.value)
        return prepared

    @property
    def provider(self) -> str:
        return str(self.document.at(("provider", "type")))

    @property
    def is_google(self) -> bool:
        return self.provider == "gcp"

    @property
    def max_workers(self) -> int:
        return int(self.prepared["max_workers"]) + bool(self.gpus)

    @property
    def head(self) -> str:
        return str(self.prepared["head_node_type"])

    @property
    def idle_timeout_minutes(self) -> float:
        return float(self.document.at(("idle_timeout_minutes",)) or 5)  # 5 is Ray's default

    @cached_property
    def node_types(self) -> dict[str, NodeType]:
        gpu_node = {**GPU_NODE, "resources": {"CPU": GPU_NODE_CPUS, "GPU": self.gpus}}
        added = {GPU_NODE_TYPE: gpu_node} if self.gpus else {}
        return {name: self.node_type(name, node) for name, node in {**self.prepared[KEY], **added}.items()}

    def node_type(self, name: str, node: Mapping[str, Any]) -> NodeType:
        resources, tpus = dict(node["resources"]), slice_of(node["node_config"])
        if name == self.head:
            resources["node:__internal_head__"] = 1
        if tpus and self.is_google:
            resources[f"TPU-{tpus.name}-head"] = 1
        return NodeType(
            self.document,
            (KEY, name),
            name=name,
            is_head=name == self.head,
            resources=resources,
            labels=node.get("labels", {}),
            min_workers=node["min_workers"],
            max_workers=node["max_workers"],
            slice=tpus,
        )


def read(path: Path, gpus: int = 0) -> ClusterConfig:
    """Raises UserError where the file is no cluster file, or Ray could not start its nodes."""
    document = read_with(path, KEY, "cluster file")
    refuse(problems(document, unknown_too=True))
    return ClusterConfig(document, gpus)


def problems(document: Document, unknown_too: bool = False) -> list[Finding]:
    """Values that Ray's schema, Ray's validation or Ray's launcher would refuse."""
    return [*schema_problems(document, unknown_too)] or [*refused_by_ray(document), *wrong_slices(document)]


def schema_problems(document: Document, unknown_too: bool = False) -> Iterator[Finding]:
    """Values that Ray's schema refuses. Unknown keys have a rule of their own, which knows the right ones."""
    for error in jsonschema.Draft7Validator(SCHEMA).iter_errors(document.value):
        if unknown_too or error.validator != "additionalProperties":
            yield document.error(tuple(error.absolute_path), f"is not valid: {error.message}.")


def refused_by_ray(document: Document) -> Iterator[Finding]:
    try:
        prepared = prepare_config(document.value)
        if jsonschema.Draft7Validator(SCHEMA).is_valid(
            document.value
        ):  # else it would repeat what a rule says of unknown keys
            validate_config(prepared)
    except Exception as error:  # asserts, KeyErrors and more: whatever `ray up` would stop with
        quoted = re.findall(r"`(\w+)`", str(error))
        key = next(((name,) for name in quoted if document.has((name,))), ())
        yield document.error(key, f"is refused by Ray: {error or type(error).__name__}")


def wrong_slices(document: Document) -> Iterator[Finding]:
    for name in document.value[KEY] if ClusterConfig(document).is_google else ():
        key: Key = (KEY, name, "node_config")
        node_config = document.at(key)
        kind = next((kind for kind in NODE_KINDS if kind in node_config), None)
        if not kind:
            similar = next(filter(None, (did_you_mean(name, NODE_KINDS) for name in node_config)), "")
            yield document.error(key, f"must have one of {', '.join(NODE_KINDS)}.{similar}")
        elif kind != "machineType" and (problem := wrong_slice(node_config)):
            yield document.error((*key, kind), problem)


def wrong_slice(node_config: Mapping[str, Any]) -> str:
    """What Ray's launcher would refuse. It is called where Google's client is installed, else the functions it uses."""
    value = str(node_config.get("acceleratorType") or node_config.get("acceleratorConfig"))
    try:
        check_google_node_type(dict(node_config))
        tpus = slice_of(node_config)
        if not tpus or not tpu.TPUAcceleratorManager.is_valid_tpu_accelerator_type(tpus.name):
            raise ValueError
        sizes = sizes_of(tpus)
    except (ValueError, KeyError, TypeError, AttributeError):
        generation, dash, size = value.partition("-")
        meant = f" Did you mean {GENERATIONS[generation]}{dash}{size}?" if generation in GENERATIONS else ""
        return f"must be a TPU that Ray knows, {', '.join(tpu.VALID_TPU_TYPES)} and a size, got {value}.{meant}"
    if tpus.chips not in sizes:
        names = [f"{tpus.generation}-{chips * tpu.get_tpu_cores_per_chip(tpus.name)}" for chips in sorted(sizes)]
        return f"must be a size that exists, {', '.join(names[:4])} and so on, got {tpus.name}."
    return ""


def slice_of(node_config: Mapping[str, Any]) -> Slice | None:
    if "acceleratorType" in node_config:
        return Slice(str(node_config["acceleratorType"]))
    if "acceleratorConfig" in node_config:
        config = node_config["acceleratorConfig"]
        generation = str(config["type"]).lower().replace("v5lite_pod", "v5litepod")
        name = tpu.infer_tpu_pod_type_from_topology(str(config["topology"]), generation)
        return Slice(name) if name else None
    return None


def sizes_of(tpus: Slice) -> set[int]:
    """The sizes of slices of a generation, in chips. Ray's tables leave out the single hosts of v2 and v3."""
    topologies = tpu.VALID_TPU_TOPOLOGY[tpus.generation]
    return {tpu.get_num_chips_from_topology(size) for size in topologies} | {tpu.DEFAULT_TPU_NUM_CHIPS_PER_HOST}
