"""Rules for a cluster file of Google Cloud: its zone, its commands, and who can reach what on its nodes."""

import json
import re
from collections.abc import Iterator

from cluster.config.cluster_config import KEY, START_COMMANDS
from cluster.config.documents import Document, Finding, Key
from cluster.processes import PROXY_CALLBACK, PROXY_GUARDS

CLOSED_PORT = "RAY_preload_python_modules=cluster.closed_port"
# Ray's own, for a key that is left out, install an old nightly build and open the dashboard (gcp/defaults.yaml).
REQUIRED = (KEY, "setup_commands", *START_COMMANDS)
HEAD, _ = START_COMMANDS


def check_zone(document: Document) -> Iterator[Finding]:
    region, zone = (document.at(("provider", name)) for name in ("region", "availability_zone"))
    if not str(zone).startswith(f"{region}-"):
        yield document.error(("provider", "availability_zone"), f"must be one of region {region}, got {zone}.")


def check_commands(document: Document) -> Iterator[Finding]:
    for name in REQUIRED:
        if not document.at((name,)):
            text = "is left out, so Ray's default installs an old Ray and opens the dashboard."
            yield document.error((name,), text)
    starts = ray_starts(document)
    for name in START_COMMANDS:
        if document.at((name,)) and not any(key[0] == name for key in starts):
            yield document.error((name,), "must contain a `ray start`.")
    for key, command in starts.items():
        if key[0] == HEAD and "--autoscaling-config" not in command:
            text = "starts a head that adds no node: it needs --autoscaling-config=$HOME/ray_bootstrap_config.yaml."
            yield document.error(key, text)
        host = re.search(r"--dashboard-host[= ](\S+)", command)
        if host and host[1] not in ("127.0.0.1", "localhost"):
            yield document.advice(key, f"opens the dashboard, which can run code, to the network: {host[0]}.")


def check_security(document: Document) -> Iterator[Finding]:
    """Ray asks callers for a token, Serve's proxy bounds requests, and replicas open no port."""
    if not ray_starts(document):
        return
    text = json.dumps(document.value)
    if "RAY_AUTH_MODE=token" not in text:
        lack = "lack RAY_AUTH_MODE=token: whoever reaches a port of the cluster may run code on it."
        yield document.advice((HEAD,), lack)
    elif "auth_token" not in text.lower():
        yield document.error(("file_mounts",), "require a token that no node gets: mount ~/.ray/auth_token.")
    callbacks = set(re.findall(rf"{PROXY_CALLBACK}=([^\s'\"\\]*)", text))
    if not callbacks:
        lack = f"lack {PROXY_CALLBACK}={PROXY_GUARDS}: nothing then limits what clients send to Serve's proxy."
        yield document.advice((HEAD,), lack)
    for callback in sorted(callbacks - {PROXY_GUARDS}):
        other = f"name {callback} as {PROXY_CALLBACK}, not {PROXY_GUARDS}; a proxy that cannot import it never starts."
        yield document.advice((HEAD,), other)
    if CLOSED_PORT not in text:
        yield document.advice((HEAD,), f"lack {CLOSED_PORT}: each replica opens a port on all interfaces.")


def ray_starts(document: Document) -> dict[Key, str]:
    return {
        (name, i): command
        for name in START_COMMANDS
        for i, command in enumerate(document.at((name,)) or ())
        if "ray start" in command
    }
