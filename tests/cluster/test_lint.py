"""cluster/config/lint.py: for each rule the shipped files with one slip in them, and that the shipped files have
none."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from app import builders
from app.ray_internals import autoscaler
from cluster import ROOT
from cluster.cli import run_command
from cluster.config import lint_cluster
from cluster.config.documents import Document, Key, child, dotted
from cluster.config.lint import lint, main

SHIPPED = [ROOT / "serve_config.yaml", ROOT / "cluster.yaml", *sorted((ROOT / "configs").glob("*.yaml"))]
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
    """The index of the line that a key stands on."""
    node, line = yaml.compose(text), 0
    for part in key:
        found = child(node, part)
        assert found, key
        line, node = found
    return line - 1


def put(key: Key, value: object) -> Edit:
    """Another value, of a key whose value is one line."""

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
    """A key whose value is one line."""

    def edit(text: str) -> str:
        lines = text.split("\n")
        del lines[line_of(text, key)]
        return "\n".join(lines)

    return edit


def before(key: Key, added: str) -> Edit:
    """A line in front of a key, as far indented."""

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


# The shipped files, with those numbers fixed that messages below contain.
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
    put((*MODEL, "graceful_shutdown_timeout_s"), 150),
    put((*SCALING, "max_replicas"), 4),
)
CLUSTER = (ROOT / "cluster.yaml").read_text()


def said(tmp_path: Path, serve: str | None = None, cluster: str | None = None) -> list[str]:
    files = {"serve.yaml": serve, "cluster.yaml": cluster}
    for name, text in files.items():
        if text is not None:
            (tmp_path / name).write_text(text)
    return [str(finding) for finding in lint([Path(name) for name, text in files.items() if text is not None])]


@pytest.fixture(autouse=True)
def short_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Files are named in messages as they were given."""
    monkeypatch.chdir(tmp_path)


# The shipped files


def test_the_shipped_files_give_neither_errors_nor_advice() -> None:
    assert [str(finding) for finding in lint(SHIPPED)] == []


def test_the_files_that_the_slips_are_made_in_have_none_themselves(tmp_path: Path) -> None:
    assert said(tmp_path, SERVE, CLUSTER) == []


# Serve configs


UNKNOWN: list[tuple[Key, str, str]] = [
    (("proxy_location",), "proxy_locations", "Ray would ignore it in silence. Did you mean proxy_location?"),
    (("http_options", "host"), "hosts", "Ray would ignore it in silence. Did you mean host?"),
    ((*APP, "route_prefix"), "route", "Ray would ignore it in silence. Did you mean route_prefix?"),
    ((*ARGS, "max_waiting"), "max_waitng", "would be refused. Did you mean max_waiting?"),
    ((*ARGS, "limits", "timeout_s"), "timeout", "would be refused. Did you mean timeout_s?"),
    ((*ARGS, "max_waiting"), "timeout_s", "would be refused. It belongs in args.limits."),
    ((*MODEL, "max_ongoing_requests"), "max_concurrent_queries", "It is called max_ongoing_requests now."),
    ((*MODEL, "max_queued_requests"), "max_replicas", "It belongs in autoscaling_config."),
    ((*MODEL, "health_check_period_s"), "num_cpus", "It belongs in ray_actor_options."),
    ((*ACTOR, "num_cpus"), "num_cpu", "Ray would ignore it in silence. Did you mean num_cpus?"),
    (
        (*SCALING, "target_ongoing_requests"),
        "target_num_ongoing_requests_per_replica",
        "It is called target_ongoing_requests now.",
    ),
    ((*MODEL, "backpressure_config", "status_code"), "status", "would be refused. Did you mean status_code?"),
]


@pytest.mark.parametrize(("key", "name", "words"), UNKNOWN, ids=[f"{case[0][-1]}->{case[1]}" for case in UNKNOWN])
def test_an_unknown_key_is_told_at_every_level_with_the_right_one(
    tmp_path: Path, key: Key, name: str, words: str
) -> None:
    text = rename(key, name)(SERVE)
    line = line_of(text, (*key[:-1], name)) + 1
    (found,) = [one for one in said(tmp_path, text) if f".{name} is" in f".{one.partition('error: ')[2]}"]
    assert found.startswith(f"serve.yaml:{line}: error: ") and found.endswith(words)


ADDED = [
    (
        before((*MODEL, "max_ongoing_requests"), "logging_config: {encodin: JSON}"),
        f"error: {IN_MODEL}.logging_config.encodin is not known here, and would be refused. Did you mean encoding?",
    ),
    (
        before((*SCALING, "max_replicas"), "policy: {policy_functio: a.b}"),
        f"error: {IN_MODEL}.autoscaling_config.policy.policy_functio is not known here, and Ray would ignore it in "
        "silence. Did you mean policy_function?",
    ),
    (
        before((*ACTOR, "num_cpus"), "runtime_env: {env_var: {A: b}}"),
        f"error: {IN_MODEL}.ray_actor_options.runtime_env.env_var is not known here, and Ray would ignore it in "
        "silence. Did you mean env_vars?",
    ),
    (
        before((*SCALING, "max_replicas"), "upscale_smoothing_factor: 0.5"),
        f"advice: {IN_MODEL}.autoscaling_config.upscale_smoothing_factor is deprecated: use upscaling_factor.",
    ),
    (
        before((*APP, "import_path"), "route_prefix: /v2"),
        "error: route_prefix stands twice in one mapping, and only the last counts.",
    ),
    (
        before((*ACTOR, "num_cpus"), "runtime_env: {working_dir: .}"),
        f"error: {IN_MODEL}.ray_actor_options.runtime_env is not valid: runtime_envs in the Serve config support only "
        'remote URIs in working_dir and py_modules, or "local://" URIs for directories that already exist on every '
        "node. Got error when parsing URI: Expected URI but received path .",
    ),
]


@pytest.mark.parametrize(("edit", "message"), ADDED, ids=[case[1][:60] for case in ADDED])
def test_keys_that_are_added_are_looked_at_to_the_bottom(tmp_path: Path, edit: Edit, message: str) -> None:
    assert any(message in found for found in said(tmp_path, edit(SERVE)))


VALUES: list[tuple[Edit, Key, str]] = [
    (
        put(("http_options", "port"), "eighty"),
        ("http_options", "port"),
        "is not valid: Input should be a valid integer, unable to parse string as an integer, got 'eighty'.",
    ),
    (drop((*APP, "import_path")), (*APP, "import_path"), "is missing."),
    (
        put((*APP, "import_path"), "app.builder:text_to_image"),
        (*APP, "import_path"),
        "cannot be imported: ModuleNotFoundError: No module named 'app.builder'",
    ),
    (
        put((*ARGS, "dtype"), "float16"),
        (*ARGS, "dtype"),
        "is not valid: Input should be 'float32' or 'bfloat16', got 'float16'.",
    ),
    (
        put((*ARGS, "sizes"), "[128x127]"),
        (*ARGS, "sizes"),
        "is not valid: sizes must be WIDTHxHEIGHT in multiples of 8, such as 512x512, got 128x127.",
    ),
    (
        put((*ARGS, "defaults", "num_inference_steps"), 500),
        ARGS,
        "is not valid: defaults.num_inference_steps must be within limits.num_inference_steps, 1 to 100, got 500.",
    ),
    (
        both(put((*ARGS, "batch_buckets"), "[1]"), put((*ARGS, "decode_buckets"), "[4]")),
        ARGS,
        "is not valid: decode_buckets must be at most 2, twice the largest of batch_buckets, got 4.",
    ),
    (
        put((*ARGS, "model"), "assets/demo-modle"),
        (*ARGS, "model"),
        "must be a folder in diffusers layout or a Hugging Face repo id, got assets/demo-modle "
        f"({ROOT / 'assets/demo-modle'}).",
    ),
    (
        put((*MODEL, "name"), "StableDifusion"),
        (*MODEL, "name"),
        "must be one that the builder makes, StableDiffusion or APIIngress, got StableDifusion. "
        "Did you mean StableDiffusion?",
    ),
    (
        put((*SCALING, "max_replicas"), 0),
        (*SCALING, "max_replicas"),
        "is not valid: Input should be greater than 0, got 0.",
    ),
    (
        put((*SCALING, "min_replicas"), 9),
        SCALING,
        "is not valid: max_replicas (4) must be greater than or equal to min_replicas (9)!",
    ),
    (
        before((*SCALING, "max_replicas"), "policy: {policy_function: 'app.policies:slots'}"),
        SCALING,
        "is not valid: No module named 'app.policies'",
    ),
    (
        both(put((*SCALING, "look_back_period_s"), 1), put((*SCALING, "metrics_interval_s"), 2)),
        (*SCALING, "look_back_period_s"),
        "must be above metrics_interval_s, 2, got 1.",
    ),
    (
        put((*ACTOR, "resources", "TPU"), "four"),
        (*ACTOR, "resources", "TPU"),
        "must be a number and not negative, got 'four'.",
    ),
    (
        put((*MODEL, "max_queued_requests"), 2.5),
        (*MODEL, "max_queued_requests"),
        "is not valid: Input should be a valid integer, got 2.5.",
    ),
]


@pytest.mark.parametrize(("edit", "key", "words"), VALUES, ids=[case[2][:60] for case in VALUES])
def test_a_wrong_value_is_told_with_its_line(tmp_path: Path, edit: Edit, key: Key, words: str) -> None:
    text = edit(SERVE)
    line = Document("", yaml.safe_load(text), yaml.compose(text)).line(key)
    found = said(tmp_path, text)
    assert len(found) == 1
    assert found[0].startswith(f"serve.yaml:{line}: error: applications[0]" if key[0] == "applications" else "serve")
    assert found[0].endswith(f"{key[-1] if isinstance(key[-1], str) else ''} {words}")


FIT: list[tuple[Edit, Key, str]] = [
    (
        put((*MODEL, "max_ongoing_requests"), 40),
        (*MODEL, "max_ongoing_requests"),
        "error: {} must be above 40, the 8 slots of a replica and its max_waiting, so that the engine's queue answers "
        "before Serve's does and health questions get through, got 40.",
    ),
    (
        put((*ARGS, "sizes"), "[128x128, 64x64, 128x64, 64x128]"),
        (*MODEL, "max_ongoing_requests"),
        "error: {} must be above 64, the 32 slots of a replica and its max_waiting, so that the engine's queue answers "
        "before Serve's does and health questions get through, got 64.",
    ),
    (
        put((*MODEL, "max_queued_requests"), -1),
        (*MODEL, "max_queued_requests"),
        "advice: {} is without limit, so while no replica is ready requests pile up until they time out.",
    ),
    (
        put((*INGRESS, "max_ongoing_requests"), 100),
        (*INGRESS, "max_ongoing_requests"),
        "advice: {} is 100 over all replicas, and StableDiffusion holds 320: under full load Serve refuses in its own "
        "words instead of the API's.",
    ),
    (
        put((*SCALING, "target_ongoing_requests"), 40),
        (*SCALING, "target_ongoing_requests"),
        "error: {} must be below 40, what a replica holds at most, or no load adds a replica, got 40.",
    ),
    (
        put((*SCALING, "target_ongoing_requests"), 2),
        (*SCALING, "target_ongoing_requests"),
        "advice: {} is 2: replicas are added before one fills its largest bucket, 4.",
    ),
    (
        put((*ACTOR, "resources", "TPU"), 3),
        (*ACTOR, "resources", "TPU"),
        "error: {} must be one of 1, 2, 4, 8, got 3.",
    ),
    (
        put((*ARGS, "batch_buckets"), "[1]"),
        (*ACTOR, "resources", "TPU"),
        "advice: {} is 4, and the largest of batch_buckets, 1, is 2 rows: the other chips idle.",
    ),
    (
        put((*ARGS, "batch_buckets"), "[1, 3]"),
        (*ARGS, "batch_buckets"),
        "advice: {} hold 3, whose 6 rows are divided among 2 of 4 chips: the others idle.",
    ),
    (
        put((*ARGS, "images_at_once"), 5),
        (*ARGS, "images_at_once"),
        "advice: {} is 5, and the largest of batch_buckets, 4, is the most.",
    ),
    (
        put((*ARGS, "limits", "query_bytes"), 24000),
        (*ARGS, "limits", "query_bytes"),
        "error: {} must be above 24000, what one prompt of prompt_characters can take, got 24000.",
    ),
    (
        put((*ARGS, "limits", "body_bytes"), 48000),
        (*ARGS, "limits", "body_bytes"),
        "error: {} must be above 48000, what two prompts of prompt_characters can take, got 48000.",
    ),
    (
        put((*MODEL, "graceful_shutdown_timeout_s"), 120),
        (*MODEL, "graceful_shutdown_timeout_s"),
        "error: {} must be above limits.timeout_s, 120, or accepted requests are cut off, got 120.",
    ),
    (
        put((*INGRESS, "graceful_shutdown_timeout_s"), 20),
        (*INGRESS, "graceful_shutdown_timeout_s"),
        "error: {} must be above limits.timeout_s, 120, or accepted requests are cut off, got 20.",
    ),
    (
        put((*MODEL, "graceful_shutdown_wait_loop_s"), 150),
        (*MODEL, "graceful_shutdown_wait_loop_s"),
        "error: {} must be below graceful_shutdown_timeout_s, 150, or nothing drains, got 150.",
    ),
    (
        before(("http_options", "host"), "request_timeout_s: 60"),
        ("http_options", "request_timeout_s"),
        "error: {} must be above limits.timeout_s, 120, or Serve's 408 comes before our answer, got 60.",
    ),
    (
        put((*MODEL, "health_check_period_s"), 40),
        (*MODEL, "health_check_period_s"),
        "advice: {} is 40: a replica that hangs is replaced after 3 failed checks, 150 s, and by then all that wait "
        "for it have reached limits.timeout_s, 120.",
    ),
    (
        put((*INGRESS, "health_check_timeout_s"), 60),
        (*INGRESS, "health_check_timeout_s"),
        "advice: {} is 60: a replica that hangs is replaced after 3 failed checks, 183 s, and by then all that wait "
        "for it have reached limits.timeout_s, 120.",
    ),
    (
        put(("http_options", "host"), "0.0.0.0"),
        ("http_options", "host"),
        "error: {} must be loopback, 127.0.0.1, unless every application has args.api_keys_file, got 0.0.0.0.",
    ),
    (
        put(("proxy_location",), "EveryNode"),
        ("proxy_location",),
        "advice: {} is EveryNode, and http_options.host 127.0.0.1: only the node itself could reach its door.",
    ),
]


@pytest.mark.parametrize(("edit", "key", "words"), FIT, ids=[case[2].partition("{}")[2][1:60] for case in FIT])
def test_numbers_that_do_not_fit_together_are_told(tmp_path: Path, edit: Edit, key: Key, words: str) -> None:
    text = edit(SERVE)
    assert f"serve.yaml:{line_of(text, key) + 1}: {words.format(dotted(key))}" in said(tmp_path, text)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.2", "::1"])
def test_every_loopback_address_is_one(tmp_path: Path, host: str) -> None:
    assert said(tmp_path, edited(SERVE, put(("http_options", "host"), host))) == []


def test_with_keys_the_door_may_be_open(tmp_path: Path) -> None:
    (tmp_path / "keys.yaml").write_text("[]")
    keyed = put((*ARGS, "api_keys_file"), tmp_path / "keys.yaml")
    assert said(tmp_path, edited(SERVE, keyed, put(("http_options", "host"), "0.0.0.0"))) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read: No such file or directory."),
        ("- {name: alice}", "entry 1 (alice): sha256 is missing; it must be 64 hexadecimal digits in lower case."),
    ],
)
def test_a_keys_file_that_cannot_be_used_is_told(tmp_path: Path, content: str | None, words: str) -> None:
    file, key = tmp_path / "keys.yaml", (*ARGS, "api_keys_file")
    if content is not None:
        file.write_text(content)
    (found,) = said(tmp_path, put(key, file)(SERVE))
    line = line_of(SERVE, key) + 1
    assert found.startswith(f"serve.yaml:{line}: error: {dotted(key)} {file}") and found.endswith(words)


def test_a_host_that_the_file_leaves_out_is_rays_which_is_open(tmp_path: Path) -> None:
    (found,) = said(tmp_path, drop(("http_options", "host"))(SERVE))
    assert "error: http_options.host must be loopback" in found and found.endswith("got 0.0.0.0.")


def test_what_ray_takes_by_default_counts_where_the_file_says_nothing(tmp_path: Path) -> None:
    text = edited(SERVE, drop((*MODEL, "max_ongoing_requests")), drop((*MODEL, "graceful_shutdown_timeout_s")))
    found = "\n".join(said(tmp_path, text))
    assert "max_ongoing_requests must be above 40" in found and "got 5." in found
    assert "graceful_shutdown_timeout_s must be above limits.timeout_s, 120" in found and "got 20." in found


def test_a_custom_policy_is_not_held_to_the_target_of_rays(tmp_path: Path) -> None:
    policy = before((*SCALING, "max_replicas"), "policy: {policy_function: 'cluster.processes:free'}")
    assert said(tmp_path, edited(SERVE, policy, put((*SCALING, "target_ongoing_requests"), 2))) == []


# Cluster files


CLUSTERS: list[tuple[Edit, Key, str]] = [
    (
        rename(("idle_timeout_minutes",), "idle_timeout_minute"),
        ("idle_timeout_minute",),
        "error: {} is not known here, and Ray would refuse it. Did you mean idle_timeout_minutes?",
    ),
    (
        rename((*TPU, "min_workers"), "min_worker"),
        (*TPU, "min_worker"),
        "error: {} is not known here, and Ray would refuse it. Did you mean min_workers?",
    ),
    (
        before(("provider", "region"), "use_internal_ip: true"),
        ("provider", "use_internal_ip"),
        "error: {} is not known here, and Ray would ignore it in silence. Did you mean use_internal_ips?",
    ),
    (
        put((*TPU, "resources", "TPU"), 3.5),
        (*TPU, "resources", "TPU"),
        "error: {} is not valid: 3.5 is not of type 'integer'.",
    ),
    (put(("max_workers",), "many"), ("max_workers",), "error: {} is not valid: 'many' is not of type 'integer'."),
    (
        put(("head_node_type",), "haed"),
        ("head_node_type",),
        "error: {} is refused by Ray: `head_node_type` must be one of `available_node_types`.",
    ),
    (
        put(("max_workers",), 0),
        ("max_workers",),
        "error: {} is refused by Ray: The specified global `max_workers` is smaller than the sum of `min_workers` of "
        "all the available node types.",
    ),
    (
        both(put((*TPU, "min_workers"), 3), put((*TPU, "max_workers"), 2)),
        (*TPU, "min_workers"),
        "error: {} must not be above max_workers, 2, got 3.",
    ),
    (
        put((*TPU, "max_workers"), 9),
        (*TPU, "max_workers"),
        "advice: {} is 9, and max_workers of the whole cluster is 4.",
    ),
    (
        put((*TYPES, "head", "resources", "CPU"), 4),
        (*TYPES, "head", "resources"),
        "advice: {} let Ray place work on the head; CPU: 0 keeps it for the cluster's own.",
    ),
    (
        put(("provider", "availability_zone"), "us-west4-a"),
        ("provider", "availability_zone"),
        "error: {} must be one of region us-central1, got us-west4-a.",
    ),
    (
        put(("file_mounts", "~/imagine/app"), "apps"),
        ("file_mounts", "~/imagine/app"),
        "error: {} is apps, which the repository does not have.",
    ),
    (
        put(("file_mounts", "~/imagine/app"), "3"),
        ("file_mounts", "~/imagine/app"),
        "error: {} must be a path, got 3.",
    ),
    (
        replace("requirements/gcp.txt", "requirements/google.txt"),
        ("head_setup_commands", 0),
        "error: {} names ~/imagine/requirements/google.txt, and the repository has no requirements/google.txt.",
    ),
    (
        rename(("setup_commands",), "metadata: {}\nhead_setup_commands"),
        ("setup_commands",),
        "error: {} is left out, so Ray takes its own, for an old Ray and an open dashboard.",
    ),
    (
        replace("--autoscaling-config=$HOME/ray_bootstrap_config.yaml", ""),
        ("head_start_ray_commands", 1),
        "error: {} starts a head that adds no node: it needs --autoscaling-config=$HOME/ray_bootstrap_config.yaml.",
    ),
    (
        replace("ray start --address", "ray begin --address"),
        ("worker_start_ray_commands",),
        "error: {} must hold a `ray start`.",
    ),
    (
        replace("--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0"),
        ("head_start_ray_commands", 1),
        "advice: {} opens the dashboard, which can run code, to the network: --dashboard-host=0.0.0.0.",
    ),
    (
        replace("RAY_AUTH_MODE=token ", ""),
        ("head_start_ray_commands",),
        "advice: {} lack RAY_AUTH_MODE=token: whoever reaches a port of the cluster may run code on it.",
    ),
    (
        replace("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=app.api.proxy:guards", ""),
        ("head_start_ray_commands",),
        "advice: {} lack RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=app.api.proxy:guards: nothing then bounds what "
        "strangers send to Serve's proxy.",
    ),
    (
        replace("app.api.proxy:guards", "app.proxies:guards"),
        ("head_start_ray_commands",),
        "advice: {} name app.proxies:guards as RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH, not app.api.proxy:guards; a "
        "proxy that cannot import it never starts.",
    ),
    (
        replace("RAY_preload_python_modules=cluster.closed_port", ""),
        ("head_start_ray_commands",),
        "advice: {} lack RAY_preload_python_modules=cluster.closed_port: each replica opens a port on all interfaces.",
    ),
    (
        put(("cluster_name",), "Imagine_TPU"),
        ("cluster_name",),
        "error: {} must be 1 to 37 lower-case letters, digits and hyphens, beginning with a letter and not ending with "
        "a hyphen, as machines are called by it (ray-Imagine_TPU-head-...), got Imagine_TPU.",
    ),
    (
        both(drop(("file_mounts", "~/.ray/auth_token")), lambda text: text.replace("~/.ray/auth_token", "~/.ray/x")),
        ("file_mounts",),
        "error: {} ask for a token that no node gets: mount ~/.ray/auth_token.",
    ),
    (
        rename((*NODE, "acceleratorType"), "accelerator_type"),
        NODE,
        "error: {} must have one of machineType, acceleratorType, acceleratorConfig. Did you mean acceleratorType?",
    ),
    (
        put((*NODE, "acceleratorType"), "banana"),
        (*NODE, "acceleratorType"),
        "error: {} must be a TPU that Ray knows, v2, v3, v4, v5p, v5litepod, v6e, v7x and a size, got banana.",
    ),
    (
        put((*NODE, "acceleratorType"), "v5e-4"),
        (*NODE, "acceleratorType"),
        "error: {} must be a TPU that Ray knows, v2, v3, v4, v5p, v5litepod, v6e, v7x and a size, got v5e-4. "
        "Did you mean v5litepod-4?",
    ),
    (
        put((*NODE, "acceleratorType"), "v5litepod-3"),
        (*NODE, "acceleratorType"),
        "error: {} must be a size that there is, v5litepod-1, v5litepod-4, v5litepod-8, v5litepod-16 and so on, "
        "got v5litepod-3.",
    ),
    (
        replace("acceleratorType: v5litepod-4", "acceleratorConfig: {type: V5LITE_POD, topology: 2xtwo}"),
        (*NODE, "acceleratorConfig"),
        "error: {} must be a TPU that Ray knows, v2, v3, v4, v5p, v5litepod, v6e, v7x and a size, "
        "got {'type': 'V5LITE_POD', 'topology': '2xtwo'}.",
    ),
    (
        put((*NODE, "acceleratorType"), "v5litepod-8"),
        (*TPU, "resources", "TPU"),
        "error: {} must be 8, the chips of a host of v5litepod-8, got 4.",
    ),
    (
        rename((*TPU, "resources", "TPU"), "GPU"),
        (*TPU, "resources"),
        "error: {} must say TPU: 4, or no load ever starts a node of this type.",
    ),
    (
        put((*TPU, "labels", "ray.io/accelerator-type"), "TPU-V6E"),
        (*TPU, "labels", "ray.io/accelerator-type"),
        "error: {} must be TPU-V5LITEPOD, as Ray finds on a v5litepod-4, got TPU-V6E.",
    ),
    (
        drop((*TPU, "labels")),
        (*TPU, "labels"),
        "advice: {} lack ray.io/accelerator-type: TPU-V5LITEPOD, so no request for that label starts a node.",
    ),
    (
        replace("TPU: 4}", "TPU: 4, TPU-v6e-4-head: 1}"),
        (*TPU, "resources", "TPU-v6e-4-head"),
        "error: {} is not what a v5litepod-4 has.",
    ),
    (
        put((*NODE, "acceleratorType"), "v5litepod-16"),
        NODE,
        "advice: {} is 4 hosts, of which the autoscaler sees one: set min_workers and max_workers alike.",
    ),
    (
        both(
            put((*NODE, "acceleratorType"), "v5litepod-16"),
            replace("{ray.io/accel", "{ray.io/tpu-worker-id: '0', ray.io/accel"),
        ),
        (*TPU, "labels", "ray.io/tpu-worker-id"),
        "error: {} would be the same on all 4 hosts.",
    ),
    (
        put((*NODE, "runtimeVersion"), "v2-alpha-tpuv6e"),
        (*NODE, "runtimeVersion"),
        "advice: {} is v2-alpha-tpuv6e; Google's documents name v2-alpha-tpuv5-lite for v5litepod.",
    ),
    (
        drop((*NODE, "runtimeVersion")),
        (*NODE, "runtimeVersion"),
        "error: {} is missing; for v5litepod it is v2-alpha-tpuv5-lite.",
    ),
]


@pytest.mark.parametrize(
    ("edit", "key", "words"), CLUSTERS, ids=[case[2].partition("{}")[2][1:60] for case in CLUSTERS]
)
def test_what_is_wrong_with_a_cluster_is_told(tmp_path: Path, edit: Edit, key: Key, words: str) -> None:
    text = edit(CLUSTER)
    line = Document("", yaml.safe_load(text), yaml.compose(text)).line(key)
    assert f"cluster.yaml:{line}: {words.replace('{}', dotted(key), 1)}" in said(tmp_path, cluster=text)


def test_a_topology_says_what_an_accelerator_type_says(tmp_path: Path) -> None:
    config = "acceleratorConfig: {type: V5LITE_POD, topology: 2x2}"
    assert said(tmp_path, SERVE, replace("acceleratorType: v5litepod-4", config)(CLUSTER)) == []


def test_rays_launcher_is_asked_about_tpu_types_where_googles_client_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher: Any = ModuleType("ray.autoscaler._private.gcp.config")
    launcher.get_node_type = {}.__getitem__  # raises
    monkeypatch.setattr(autoscaler, "find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, launcher.__name__, launcher)
    (found,) = said(tmp_path, cluster=CLUSTER)
    assert "must be a TPU that Ray knows" in found


# Both together


TOGETHER: list[tuple[Edit, Edit, Key, str]] = [
    (
        put((*ACTOR, "resources", "TPU"), 8),
        both(),
        ACTOR,
        "error: {} ask for CPU 1, TPU 8, which no node type of cluster.yaml has (head: CPU 0; ray_tpu: CPU 8, TPU 4).",
    ),
    (
        put((*ACTOR, "num_cpus"), 9),
        both(),
        ACTOR,
        "error: {} ask for CPU 9, TPU 4, which no node type of cluster.yaml has (head: CPU 0; ray_tpu: CPU 8, TPU 4).",
    ),
    (
        before((*ACTOR, "num_cpus"), "accelerator_type: TPU-V5LITEPOD"),
        both(),
        ACTOR,
        "error: {} ask for CPU 1, TPU 4, accelerator_type:TPU-V5LITEPOD 0.001, which no node type of cluster.yaml has "
        "(head: CPU 0; ray_tpu: CPU 8, TPU 4).",
    ),
    (
        put((*SCALING, "max_replicas"), 5),
        both(),
        (*SCALING, "max_replicas"),
        "error: {} is 5, and cluster.yaml's max_workers leave room for 4.",
    ),
    (
        both(),
        put((*TPU, "max_workers"), 3),
        (*SCALING, "max_replicas"),
        "error: {} is 4, and cluster.yaml's max_workers leave room for 3.",
    ),
    (
        put((*ACTOR, "resources", "TPU"), 0),
        both(),
        (*ACTOR, "resources"),
        "advice: {} ask for no TPU, so StableDiffusion computes on the CPU, and cluster.yaml's TPUs idle.",
    ),
    (
        both(),
        both(put((*NODE, "acceleratorType"), "v5litepod-8"), put((*TPU, "resources", "TPU"), 8)),
        (*ACTOR, "resources"),
        "advice: {} ask for 4 of the 8 chips of a v5litepod-8 in cluster.yaml; Ray 2.60 does not tell libtpu how they "
        "lie.",
    ),
]


@pytest.mark.parametrize(
    ("serve", "cluster", "key", "words"), TOGETHER, ids=[case[3].partition("{}")[2][1:60] for case in TOGETHER]
)
def test_a_config_that_its_cluster_cannot_run_is_told(
    tmp_path: Path, serve: Edit, cluster: Edit, key: Key, words: str
) -> None:
    text = serve(SERVE)
    found = said(tmp_path, text, cluster(CLUSTER))
    assert f"serve.yaml:{line_of(text, key) + 1}: {words.replace('{}', dotted(key), 1)}" in found


def test_a_keys_file_that_no_node_would_get_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builders, "ROOT", tmp_path)
    monkeypatch.setattr(lint_cluster, "ROOT", tmp_path)
    for folder in ("app", "assets", "cluster", "jobs", "requirements"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / "keys.yaml").write_text("[]")
    key = (*ARGS, "api_keys_file")
    serve = put(key, "keys.yaml")(SERVE)
    message = f"serve.yaml:{line_of(serve, key) + 1}: error: {dotted(key)} is keys.yaml, which cluster.yaml's "
    assert said(tmp_path, serve, CLUSTER) == [f"{message}file_mounts bring to no node."]
    mounted = before(("file_mounts", "~/imagine/app"), "~/imagine/keys.yaml: keys.yaml")
    assert said(tmp_path, serve, mounted(CLUSTER)) == []
    elsewhere = put(key, tmp_path / "keys.yaml")(SERVE)
    assert said(tmp_path, elsewhere, CLUSTER) == [], "what is not in the repository comes by another way"
    assert said(tmp_path, serve, CLUSTER) != []
    assert lint([Path("serve.yaml"), Path("cluster.yaml")], twin=True) == [], "a twin's nodes have it"


def test_several_replicas_share_a_node_where_it_has_room(tmp_path: Path) -> None:
    small = both(put((*ACTOR, "resources", "TPU"), 1), put((*SCALING, "max_replicas"), 16))
    serve = both(small, put((*INGRESS, "max_ongoing_requests"), 4096))
    assert said(tmp_path, serve(SERVE), CLUSTER) == []
    alone = before((*MODEL, "max_ongoing_requests"), "max_replicas_per_node: 1")
    (found,) = said(tmp_path, both(serve, alone)(SERVE), CLUSTER)
    assert found.endswith("is 16, and cluster.yaml's max_workers leave room for 4.")


def test_a_resource_of_every_head_puts_a_deployment_there(tmp_path: Path) -> None:
    assert said(tmp_path, SERVE, CLUSTER) == []
    (found,) = said(tmp_path, replace("node:__internal_head__", "node:elsewhere")(SERVE), CLUSTER)
    assert "ask for node:elsewhere 0.001, which no node type of cluster.yaml has" in found


def test_a_file_that_is_broken_by_itself_is_not_held_against_others(tmp_path: Path) -> None:
    broken = put((*NODE, "acceleratorType"), "banana")(CLUSTER)
    (found,) = said(tmp_path, put((*ACTOR, "resources", "TPU"), 8)(SERVE), broken)
    assert "banana" in found


# Files and the command


NEITHER = "it has neither applications, as a serve config, nor available_node_types, as a cluster file."


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("applications: [\n", "2: error: it is not YAML: expected the node content, but found '<stream end>'."),
        ("applicatons: []\n", f"1: error: {NEITHER} Did you mean applications?"),
        ("", f"1: error: {NEITHER}"),
        ("- applications\n", f"1: error: {NEITHER}"),
        ("applications: 3\n", "1: error: applications is not valid: Input should be a valid list, got 3."),
        ("available_node_types: 3\n", "1: error: available_node_types is not valid: 3 is not of type 'object'."),
    ],
)
def test_a_file_that_is_neither_kind_is_told(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "slip.yaml").write_text(text)
    assert f"slip.yaml:{message}" in [str(finding) for finding in lint([Path("slip.yaml")])]


def test_a_file_that_is_not_text_is_told(tmp_path: Path) -> None:
    (tmp_path / "slip.yaml").write_bytes(b"\xff\xfe\x00")
    (found,) = lint([tmp_path / "slip.yaml"])
    assert "it is not text in UTF-8" in found.text


def test_every_problem_is_told_in_the_order_of_the_lines(tmp_path: Path) -> None:
    slips = [rename(("http_options", "port"), "prt"), put((*MODEL, "max_ongoing_requests"), 9)]
    slips += [rename((*ACTOR, "num_cpus"), "cpus"), put((*SCALING, "max_replicas"), 7)]
    found = said(tmp_path, edited(SERVE, *slips), CLUSTER)
    lines = [int(one.split(":")[1]) for one in found]
    assert len(found) == 4 and lines == sorted(lines)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["cluster.config.lint", *arguments])
    with pytest.raises(SystemExit) as caught:
        run_command(main)
    return int(caught.value.code or 0)


def test_advice_leaves_the_exit_status_at_0_and_errors_make_it_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    serve = tmp_path / "serve.yaml"
    serve.write_text(put(("proxy_location",), "EveryNode")(SERVE))
    assert run(monkeypatch, "serve.yaml") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "Checked serve.yaml: no errors, 1 advice."
    serve.write_text(rename(("http_options", "port"), "prt")(SERVE))
    assert run(monkeypatch, "serve.yaml") == 1
    assert capsys.readouterr().out.splitlines()[-1] == "Checked serve.yaml: 1 error, no advice."


def test_a_wrong_call_is_one_line_and_exit_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in ([], ["--fix"], ["nowhere.yaml"]):
        assert run(monkeypatch, *arguments) == 2
        told = capsys.readouterr()
        assert told.out == "" and len(told.err.splitlines()) == 1
    assert told.err == "nowhere.yaml cannot be read: No such file or directory.\n"


def test_it_runs_by_itself_on_the_shipped_files() -> None:
    command = [sys.executable, "-m", "cluster.config.lint", "serve_config.yaml", "cluster.yaml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "Checked serve_config.yaml, cluster.yaml: no errors, no advice.\n")
