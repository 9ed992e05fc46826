"""Edits that put a slip into a shipped config, and the linter's findings about it. Not a test."""

import contextlib
import re
from collections.abc import Callable
from pathlib import Path

import yaml

from cluster import ROOT
from cluster.config.documents import QUICK, Key, child, dotted
from cluster.config.lint import lint

Edit = Callable[[str], str]

APP: Key = ("applications", 0)
ARGS: Key = (*APP, "args")
INGRESS: Key = (*APP, "deployments", 0)
MODEL: Key = (*APP, "deployments", 1)
SCALING: Key = (*MODEL, "autoscaling_config")
ACTOR: Key = (*MODEL, "ray_actor_options")
TYPES: Key = ("available_node_types",)
TPU: Key = (*TYPES, "ray_tpu")
NODE: Key = (*TPU, "node_config")
IN_MODEL = dotted(MODEL)


def line_of(text: str, key: Key) -> int:
    """The index of the line of a key."""
    node, line = yaml.compose(text, Loader=QUICK), 0
    for part in key:
        entry = child(node, part)
        assert entry, key
        line, node = entry
    return line - 1


def put(key: Key, value: object) -> Edit:
    """Gives a key another value. The old value must stand on one line."""

    def edit(text: str) -> str:
        lines, at = text.split("\n"), line_of(text, key)
        name = re.escape(str(key[-1]))
        whole, within = rf"^(\s*(?:- )?{name}:)( [^#]*?)?( +#.*)?$", rf"(\b{name}: )[^,}}]+"
        block = re.match(whole, lines[at])
        lines[at] = f"{block[1]} {value}" if block else re.sub(within, rf"\g<1>{value}", lines[at])
        return "\n".join(lines)

    return edit


def rename(key: Key, name: str) -> Edit:
    def edit(text: str) -> str:
        lines, at = text.split("\n"), line_of(text, key)
        lines[at] = re.sub(rf"\b{re.escape(str(key[-1]))}:", f"{name}:", lines[at])
        return "\n".join(lines)

    return edit


def drop(key: Key) -> Edit:
    """Removes a key. Its value must stand on one line."""

    def edit(text: str) -> str:
        lines = text.split("\n")
        del lines[line_of(text, key)]
        return "\n".join(lines)

    return edit


def before(key: Key, added: str) -> Edit:
    """Adds a line in front of a key, with the same indentation."""

    def edit(text: str) -> str:
        lines, at = text.split("\n"), line_of(text, key)
        lines.insert(at, re.sub(r"\S.*", "", lines[at]) + added)
        return "\n".join(lines)

    return edit


def replace(old: str, new: str) -> Edit:
    def edit(text: str) -> str:
        assert text.count(old) == 1, old
        return text.replace(old, new)

    return edit


def edited(text: str, *edits: Edit) -> str:
    for edit in edits:
        text = edit(text)
    return text


def both(*edits: Edit) -> Edit:
    return lambda text: edited(text, *edits)


# The shipped files, with fixed numbers where messages in the tests contain them.
SERVE = edited(
    (ROOT / "serve_config.yaml").read_text(),
    put((*ARGS, "sizes"), "[128x128]"),
    put((*ARGS, "batch_buckets"), "[1, 2, 4]"),
    put((*ARGS, "max_waiting"), 32),
    put((*ARGS, "limits", "timeout_s"), 120),
    put((*ARGS, "limits", "prompt_characters"), 2000),
    put((*INGRESS, "max_ongoing_requests"), 1024),
    put((*MODEL, "max_ongoing_requests"), 64),
    put((*MODEL, "max_queued_requests"), 64),
    put((*MODEL, "graceful_shutdown_timeout_s"), 20),
    put((*SCALING, "max_replicas"), 4),
)
CLUSTER = (ROOT / "cluster.yaml").read_text()


def findings_of(tmp_path: Path, serve: str | None = None, cluster: str | None = None, local: bool = False) -> list[str]:
    """The findings about these texts as files, which are named serve.yaml and cluster.yaml."""
    texts = {name: text for name, text in (("serve.yaml", serve), ("cluster.yaml", cluster)) if text is not None}
    with contextlib.chdir(tmp_path):
        for name, text in texts.items():
            Path(name).write_text(text)
        return [str(finding) for finding in lint([Path(name) for name in texts], local)]
