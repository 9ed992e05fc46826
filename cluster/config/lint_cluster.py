"""What is wrong, or could be better, in a file for `ray up`: by Ray's schema and its own validation, neither of which
needs a network, by the TPU types that Ray knows, and by what Ray would do on Google Cloud without a word.

Knows nothing of what will run there.
"""

import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import ray.autoscaler

from app.ray_internals.autoscaler import PROVIDER_KEYS, check_google_node_type, prepare_config, validate_config
from app.ray_internals.core import tpu
from cluster import ROOT
from cluster.config.documents import Document, Finding, Key, nearest
from cluster.config.google_names import check_names
from cluster.processes import PROXY_CALLBACK, PROXY_GUARDS

logging.getLogger(prepare_config.__module__).setLevel(logging.WARNING)  # else it tells each bound that it fills in

SCHEMA = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
ACCELERATOR_LABEL = "ray.io/accelerator-type"
CLOSED_PORT = "RAY_preload_python_modules=cluster.closed_port"
# Left out, Ray takes its own, which install an old nightly build and open the dashboard (autoscaler/gcp/defaults.yaml).
COMMANDS = ("setup_commands", "head_start_ray_commands", "worker_start_ray_commands")
# What Google's documents call a generation, and Ray's launcher calls otherwise.
GENERATIONS = {"v5e": "v5litepod", "v5lite": "v5litepod", "v5": "v5p", "tpu7x": "v7x"}
RUNTIMES = {  # cloud.google.com/tpu/docs/runtimes
    **dict.fromkeys(("v2", "v3", "v4"), "tpu-ubuntu2204-base"),
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}


@dataclass(frozen=True)
class Slice:
    """A TPU as Google sells it, by a name such as v5litepod-4."""

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
    def label(self) -> str:
        return f"TPU-{self.generation.upper()}"  # as Ray detects it


def check_cluster(document: Document) -> tuple[list[Finding], bool]:
    """What is to be said, and whether the file is sound enough for more to be asked of it."""
    unknown, wrong = [*unknown_keys(document, (), SCHEMA)], [*wrong_values(document)]
    if wrong:
        return unknown + wrong, False
    found = [*unknown, *check_file_mounts(document)]
    if google(document):
        found += [*check_names(document), *check_zone(document), *check_commands(document)]
    broken = [*check_as_ray_does(document, schema_too=not unknown), *check_slices(document)]
    if broken:
        return found + broken, False
    return [*found, *check_workers(document), *check_tpus(document)], True


def google(document: Document) -> bool:
    return bool(document.at(("provider", "type")) == "gcp")


# Ray's own rules


def unknown_keys(document: Document, key: Key, schema: Mapping[str, Any]) -> Iterator[Finding]:
    value = document.at(key)
    if not isinstance(value, dict):
        return
    known, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
    for name in value:
        if inner := known.get(name) or patterns.get(".*"):
            yield from unknown_keys(document, (*key, name), inner)
        elif schema.get("additionalProperties") is False:
            yield document.error((*key, name), f"is not known here, and Ray would refuse it.{nearest(name, known)}")
        elif key == ("provider",) and google(document) and name not in PROVIDER_KEYS:
            text = f"is not known here, and Ray would ignore it in silence.{nearest(name, [*known, *PROVIDER_KEYS])}"
            yield document.error((*key, name), text)


def wrong_values(document: Document) -> Iterator[Finding]:
    for error in jsonschema.Draft7Validator(SCHEMA).iter_errors(document.value):
        if error.validator != "additionalProperties":  # unknown_keys tells it, with the right one
            yield document.error(tuple(error.absolute_path), f"is not valid: {error.message}.")


def check_as_ray_does(document: Document, schema_too: bool) -> Iterator[Finding]:
    try:
        prepared = prepare_config(document.value)
        if schema_too:
            validate_config(prepared)
    except Exception as error:  # asserts, KeyErrors and more: whatever `ray up` would stop with
        named = re.findall(r"`(\w+)`", str(error))
        key = next(((name,) for name in named if document.has((name,))), ())
        yield document.error(key, f"is refused by Ray: {error or type(error).__name__}")


# What Ray's rules leave open


def node_types(document: Document) -> dict[str, dict[str, Any]]:
    """As Ray completes them: bounds, and what the launcher adds to a node's resources by itself."""
    prepared = prepare_config(document.value)
    found = {}
    for name, one in prepared["available_node_types"].items():
        resources = dict(one["resources"])
        if name == prepared["head_node_type"]:
            resources["node:__internal_head__"] = 1
        if (tpus := slice_of(one["node_config"])) is not None and prepared["provider"]["type"] == "gcp":
            resources[f"TPU-{tpus.name}-head"] = 1
        found[name] = one | {"resources": resources, "slice": tpus, "labels": one.get("labels", {})}
    return found


def most_workers(document: Document) -> int:
    return int(prepare_config(document.value)["max_workers"])


def check_workers(document: Document) -> Iterator[Finding]:
    for name, one in node_types(document).items():
        key: Key = ("available_node_types", name)
        if one["min_workers"] > one["max_workers"]:
            text = f"must not be above max_workers, {one['max_workers']}, got {one['min_workers']}."
            yield document.error((*key, "min_workers"), text)
        if one["max_workers"] > most_workers(document):
            text = f"is {one['max_workers']}, and max_workers of the whole cluster is {most_workers(document)}."
            yield document.advice((*key, "max_workers"), text)
        if name == document.at(("head_node_type",)) and one["resources"].get("CPU", 1) > 0:
            text = "let Ray place work on the head; CPU: 0 keeps it for the cluster's own."
            yield document.advice((*key, "resources"), text)


def check_file_mounts(document: Document) -> Iterator[Finding]:
    mounts = {}  # those from the repository; what is elsewhere on the user's machine is the user's
    for remote, local in (document.at(("file_mounts",)) or {}).items():
        if not isinstance(local, str):
            yield document.error(("file_mounts", remote), f"must be a path, got {local!r}.")
        elif not local.startswith(("~", "/")):
            mounts[remote] = local
            if not (ROOT / local).exists():
                yield document.error(("file_mounts", remote), f"is {local}, which the repository does not have.")
    for name in (*COMMANDS, "head_setup_commands", "worker_setup_commands", "initialization_commands"):
        for i, command in enumerate(document.at((name,)) or ()):
            for remote, local in mounts.items():
                for path in re.findall(rf"(?<!\S){re.escape(remote)}/([\w./-]+)", command):
                    if not (ROOT / local / path).exists():
                        text = f"names {remote}/{path}, and the repository has no {local}/{path}."
                        yield document.error((name, i), text)


# Google Cloud


def check_zone(document: Document) -> Iterator[Finding]:
    region, zone = (document.at(("provider", name)) for name in ("region", "availability_zone"))
    if not str(zone).startswith(f"{region}-"):
        yield document.error(("provider", "availability_zone"), f"must be one of region {region}, got {zone}.")


def check_commands(document: Document) -> Iterator[Finding]:
    for name in ("available_node_types", *COMMANDS):
        if not document.at((name,)):
            yield document.error((name,), "is left out, so Ray takes its own, for an old Ray and an open dashboard.")
    starts = {
        (name, i): command
        for name in COMMANDS[1:]
        for i, command in enumerate(document.at((name,)) or ())
        if "ray start" in command
    }
    for name in COMMANDS[1:]:
        if document.at((name,)) and not any(key[0] == name for key in starts):
            yield document.error((name,), "must hold a `ray start`.")
    for key, command in starts.items():
        if key[0] == "head_start_ray_commands" and "--autoscaling-config" not in command:
            text = "starts a head that adds no node: it needs --autoscaling-config=$HOME/ray_bootstrap_config.yaml."
            yield document.error(key, text)
        host = re.search(r"--dashboard-host[= ](\S+)", command)
        if host and host[1] not in ("127.0.0.1", "localhost"):
            yield document.advice(key, f"opens the dashboard, which can run code, to the network: {host[0]}.")
    everything = json.dumps(document.value)
    if starts and "RAY_AUTH_MODE=token" not in everything:
        text = "lack RAY_AUTH_MODE=token: whoever reaches a port of the cluster may run code on it."
        yield document.advice(("head_start_ray_commands",), text)
    elif starts and "auth_token" not in everything.lower():
        text = "ask for a token that no node gets: mount ~/.ray/auth_token."
        yield document.error(("file_mounts",), text)
    callbacks = set(re.findall(rf"{PROXY_CALLBACK}=([^\s'\"\\]*)", everything))
    if starts and not callbacks:
        text = f"lack {PROXY_CALLBACK}={PROXY_GUARDS}: nothing then bounds what strangers send to Serve's proxy."
        yield document.advice(("head_start_ray_commands",), text)
    for callback in sorted(callbacks - {PROXY_GUARDS}):
        text = f"name {callback} as {PROXY_CALLBACK}, not {PROXY_GUARDS}; a proxy that cannot import it never starts."
        yield document.advice(("head_start_ray_commands",), text)
    if starts and CLOSED_PORT not in everything:
        text = f"lack {CLOSED_PORT}: each replica opens a port on all interfaces."
        yield document.advice(("head_start_ray_commands",), text)


def check_slices(document: Document) -> Iterator[Finding]:
    for name in document.value["available_node_types"] if google(document) else ():
        key: Key = ("available_node_types", name, "node_config")
        node_config = document.at(key)
        kinds = ("machineType", "acceleratorType", "acceleratorConfig")
        given = next((kind for kind in kinds if kind in node_config), None)
        if not given:
            near = next(filter(None, (nearest(name, kinds) for name in node_config)), "")
            yield document.error(key, f"must have one of {', '.join(kinds)}.{near}")
        elif given != "machineType" and (problem := wrong_slice(node_config)):
            yield document.error((*key, given), problem)


def check_tpus(document: Document) -> Iterator[Finding]:
    for name, one in node_types(document).items() if google(document) else ():
        if one["slice"]:
            yield from check_tpu_resources(document, ("available_node_types", name), one["slice"])
            yield from check_runtime(document, ("available_node_types", name, "node_config"), one["slice"])


def wrong_slice(node_config: Mapping[str, Any]) -> str:
    """By Ray's launcher itself where Google's client is installed, and else by the functions that it calls."""
    given = str(node_config.get("acceleratorType") or node_config.get("acceleratorConfig"))
    try:
        check_google_node_type(dict(node_config))
        tpus = slice_of(node_config)
        if not tpus or not tpu.TPUAcceleratorManager.is_valid_tpu_accelerator_type(tpus.name):
            raise ValueError
        sizes = sizes_of(tpus)
    except (ValueError, KeyError, TypeError, AttributeError):
        generation, dash, size = given.partition("-")
        near = f" Did you mean {GENERATIONS[generation]}{dash}{size}?" if generation in GENERATIONS else ""
        return f"must be a TPU that Ray knows, {', '.join(tpu.VALID_TPU_TYPES)} and a size, got {given}.{near}"
    if tpus.chips not in sizes:
        names = [f"{tpus.generation}-{chips * tpu.get_tpu_cores_per_chip(tpus.name)}" for chips in sorted(sizes)]
        return f"must be a size that there is, {', '.join(names[:4])} and so on, got {tpus.name}."
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
    """In chips. Ray's tables leave out the single hosts of v2 and v3."""
    topologies = tpu.VALID_TPU_TOPOLOGY[tpus.generation]
    return {tpu.get_num_chips_from_topology(one) for one in topologies} | {tpu.DEFAULT_TPU_NUM_CHIPS_PER_HOST}


def check_tpu_resources(document: Document, key: Key, tpus: Slice) -> Iterator[Finding]:
    resources, labels = document.at((*key, "resources")), document.at((*key, "labels")) or {}
    if "TPU" not in resources:
        text = f"must say TPU: {tpus.chips_per_host}, or no load ever starts a node of this type."
        yield document.error((*key, "resources"), text)
    elif resources["TPU"] != tpus.chips_per_host:
        text = f"must be {tpus.chips_per_host}, the chips of a host of {tpus.name}, got {resources['TPU']}."
        yield document.error((*key, "resources", "TPU"), text)
    if ACCELERATOR_LABEL not in labels:
        text = f"lack {ACCELERATOR_LABEL}: {tpus.label}, so no request for that label starts a node."
        yield document.advice((*key, "labels"), text)
    elif labels[ACCELERATOR_LABEL] != tpus.label:
        text = f"must be {tpus.label}, as Ray finds on a {tpus.name}, got {labels[ACCELERATOR_LABEL]}."
        yield document.error((*key, "labels", ACCELERATOR_LABEL), text)
    for name in resources:
        wrong_type = name.startswith("accelerator_type:") and name != f"accelerator_type:{tpus.label}"
        if wrong_type or (re.fullmatch("TPU-.*-head", name) and name != f"TPU-{tpus.name}-head"):
            yield document.error((*key, "resources", name), f"is not what a {tpus.name} has.")
    if tpus.chips > tpus.chips_per_host:
        hosts = tpus.chips // tpus.chips_per_host
        if "ray.io/tpu-worker-id" in labels:
            yield document.error((*key, "labels", "ray.io/tpu-worker-id"), f"would be the same on all {hosts} hosts.")
        bounds = [document.at((*key, name)) for name in ("min_workers", "max_workers")]
        if bounds[0] != bounds[1]:
            text = f"is {hosts} hosts, of which the autoscaler sees one: set min_workers and max_workers alike."
            yield document.advice((*key, "node_config"), text)


def check_runtime(document: Document, key: Key, tpus: Slice) -> Iterator[Finding]:
    runtime, right = document.at((*key, "runtimeVersion")), RUNTIMES.get(tpus.generation)
    if not runtime:
        yield document.error((*key, "runtimeVersion"), f"is missing; for {tpus.generation} it is {right}.")
    elif right and runtime != right:
        text = f"is {runtime}; Google's documents name {right} for {tpus.generation}."
        yield document.advice((*key, "runtimeVersion"), text)
