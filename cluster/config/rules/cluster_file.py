"""Rules for any file for `ray up`: unknown keys, folders to mount, bounds on workers."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from app.ray_internals.autoscaler import PROVIDER_KEYS
from cluster import ROOT
from cluster.config.cluster_config import COMMANDS, SCHEMA, ClusterConfig, NodeType
from cluster.config.documents import Document, Finding, Key, did_you_mean


def check_keys(document: Document) -> Iterator[Finding]:
    yield from unknown_keys(document, (), SCHEMA)


def unknown_keys(document: Document, key: Key, schema: Mapping[str, Any]) -> Iterator[Finding]:
    value = document.at(key)
    if not isinstance(value, dict):
        return
    known, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
    for name in value:
        if inner := known.get(name) or patterns.get(".*"):
            yield from unknown_keys(document, (*key, name), inner)
        elif schema.get("additionalProperties") is False:
            text = f"is not known here, and Ray would refuse it.{did_you_mean(name, known)}"
            yield document.error((*key, name), text)
        elif key == ("provider",) and ClusterConfig(document).is_google and name not in PROVIDER_KEYS:
            similar = did_you_mean(name, [*known, *PROVIDER_KEYS])
            yield document.error((*key, name), f"is not known here, and Ray would ignore it in silence.{similar}")


def check_file_mounts(document: Document) -> Iterator[Finding]:
    """What is mounted from the repository exists. What lies elsewhere on the user's machine is not looked at."""
    mounts = {}
    for remote, local in (document.at(("file_mounts",)) or {}).items():
        if not isinstance(local, str):
            yield document.error(("file_mounts", remote), f"must be a path, got {local!r}.")
        elif not local.startswith(("~", "/")):
            mounts[remote] = local
            if not (ROOT / local).exists():
                yield document.error(("file_mounts", remote), f"is {local}, which the repository does not have.")
    for name in COMMANDS:
        for i, command in enumerate(document.at((name,)) or ()):
            for remote, local in mounts.items():
                for path in re.findall(rf"(?<!\S){re.escape(remote)}/([\w./-]+)", command):
                    if not (ROOT / local / path).exists():
                        text = f"names {remote}/{path}, and the repository has no {local}/{path}."
                        yield document.error((name, i), text)


def check_workers(config: ClusterConfig, node_type: NodeType) -> Iterator[Finding]:
    if node_type.min_workers > node_type.max_workers:
        text = f"must not be above max_workers, {node_type.max_workers}, got {node_type.min_workers}."
        yield node_type.error(("min_workers",), text)
    if node_type.max_workers > config.max_workers:
        text = f"is {node_type.max_workers}, and max_workers of the whole cluster is {config.max_workers}."
        yield node_type.advice(("max_workers",), text)
    if node_type.is_head and node_type.resources.get("CPU", 1) > 0:
        text = "let Ray place work on the head; CPU: 0 keeps it for the cluster's own processes."
        yield node_type.advice(("resources",), text)
