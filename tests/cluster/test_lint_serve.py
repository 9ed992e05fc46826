"""cluster/config/lint.py: rules for Serve configs. Each test makes one slip in the shipped config."""

import re
from pathlib import Path

import pytest
import yaml

from cluster import ROOT
from cluster.config.documents import Document, Key, dotted
from tests.cluster.slips import (
    ACTOR,
    APP,
    ARGS,
    IN_MODEL,
    INGRESS,
    MODEL,
    SCALING,
    SERVE,
    Edit,
    before,
    both,
    drop,
    edited,
    findings_of,
    line_of,
    put,
    rename,
)

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
def test_an_unknown_key_of_any_level_is_an_error_with_a_suggestion(
    tmp_path: Path, key: Key, name: str, words: str
) -> None:
    text = rename(key, name)(SERVE)
    line = line_of(text, (*key[:-1], name)) + 1
    (finding,) = [
        finding for finding in findings_of(tmp_path, text) if f".{name} is" in f".{finding.partition('error: ')[2]}"
    ]
    assert finding.startswith(f"serve.yaml:{line}: error: ") and finding.endswith(words)


def by_serve(edit: Edit) -> Edit:
    """An edit of a config whose number of replicas Serve's own policy decides."""
    return lambda text: edit(re.sub(r" {10}policy:.*?(?= {10}metrics_interval_s)", "", text, flags=re.DOTALL))


ADDED = [
    (
        before((*MODEL, "max_ongoing_requests"), "logging_config: {encodin: JSON}"),
        f"error: {IN_MODEL}.logging_config.encodin is not known here, and would be refused. Did you mean encoding?",
    ),
    (
        by_serve(before((*SCALING, "max_replicas"), "policy: {policy_functio: a.b}")),
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
        "error: route_prefix appears twice in one mapping, and only the last one counts.",
    ),
    (
        before((*ACTOR, "num_cpus"), "runtime_env: {working_dir: .}"),
        f"error: {IN_MODEL}.ray_actor_options.runtime_env is not valid: runtime_envs in the Serve config support only "
        'remote URIs in working_dir and py_modules, or "local://" URIs for directories that already exist on every '
        "node. Got error when parsing URI: Expected URI but received path .",
    ),
]


@pytest.mark.parametrize(("edit", "message"), ADDED, ids=[case[1][:60] for case in ADDED])
def test_keys_of_nested_mappings_are_checked(tmp_path: Path, edit: Edit, message: str) -> None:
    assert any(message in finding for finding in findings_of(tmp_path, edit(SERVE)))


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
        "must be a folder in diffusers layout, a .safetensors file or a Hugging Face repo id, got assets/demo-modle "
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
        by_serve(before((*SCALING, "max_replicas"), "policy: {policy_function: 'app.policies:slots'}")),
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
def test_a_wrong_value_is_an_error_on_its_line(tmp_path: Path, edit: Edit, key: Key, words: str) -> None:
    text = edit(SERVE)
    line = Document("", yaml.safe_load(text), yaml.compose(text)).line(key)
    findings = findings_of(tmp_path, text)
    assert len(findings) == 1
    assert findings[0].startswith(f"serve.yaml:{line}: error: applications[0]" if key[0] == "applications" else "serve")
    assert findings[0].endswith(f"{key[-1] if isinstance(key[-1], str) else ''} {words}")


FIT: list[tuple[Edit, Key, str]] = [
    (
        put((*MODEL, "max_ongoing_requests"), 24),
        (*MODEL, "max_ongoing_requests"),
        "error: {} must be above 24, the most that the ingress sends a replica whose largest bucket is 4, so that "
        "Serve never refuses them and health checks get through, got 24.",
    ),
    (
        put((*MODEL, "max_queued_requests"), -1),
        (*MODEL, "max_queued_requests"),
        "advice: {} is unlimited: while no replica is ready, requests pile up until they time out.",
    ),
    (
        put((*INGRESS, "max_ongoing_requests"), 100),
        (*INGRESS, "max_ongoing_requests"),
        "advice: {} is 100 over all replicas, and 224 may wait and run: under full load Serve refuses in its own words "
        "instead of the API's.",
    ),
    (
        by_serve(put((*SCALING, "target_ongoing_requests"), 24)),
        (*SCALING, "target_ongoing_requests"),
        "error: {} must be below 24, what a replica holds at most, or no load adds a replica, got 24.",
    ),
    (
        by_serve(put((*SCALING, "target_ongoing_requests"), 2)),
        (*SCALING, "target_ongoing_requests"),
        "advice: {} is 2: replicas are added before one replica fills its largest bucket, 4.",
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
        put((*MODEL, "graceful_shutdown_timeout_s"), 5),
        (*MODEL, "graceful_shutdown_timeout_s"),
        "error: {} must be above 5, the seconds in which images leave for other replicas, got 5.",
    ),
    (
        put((*MODEL, "graceful_shutdown_timeout_s"), 25),
        (*MODEL, "graceful_shutdown_timeout_s"),
        "advice: {} is 25: Serve ends a preempted replica so long before its node goes, and starts another one first "
        "only if that is below 25.",
    ),
    (
        put((*INGRESS, "graceful_shutdown_timeout_s"), 20),
        (*INGRESS, "graceful_shutdown_timeout_s"),
        "error: {} must be above limits.timeout_s, 120, or accepted requests are cut off, got 20.",
    ),
    (
        put((*MODEL, "graceful_shutdown_wait_loop_s"), 20),
        (*MODEL, "graceful_shutdown_wait_loop_s"),
        "error: {} must be below graceful_shutdown_timeout_s, 20, or nothing drains, got 20.",
    ),
    (
        before(("http_options", "host"), "request_timeout_s: 60"),
        ("http_options", "request_timeout_s"),
        "error: {} must be above limits.timeout_s, 120, or Serve answers 408 before the API, got 60.",
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
        "advice: {} is EveryNode, and http_options.host 127.0.0.1: only a node itself could reach its proxy.",
    ),
]


@pytest.mark.parametrize(("edit", "key", "words"), FIT, ids=[case[2].partition("{}")[2][1:60] for case in FIT])
def test_numbers_must_fit_together(tmp_path: Path, edit: Edit, key: Key, words: str) -> None:
    text = edit(SERVE)
    assert f"serve.yaml:{line_of(text, key) + 1}: {words.format(dotted(key))}" in findings_of(tmp_path, text)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.2", "::1"])
def test_every_loopback_address_is_accepted(tmp_path: Path, host: str) -> None:
    assert findings_of(tmp_path, edited(SERVE, put(("http_options", "host"), host))) == []


def test_with_api_keys_the_api_may_listen_on_all_interfaces(tmp_path: Path) -> None:
    (tmp_path / "keys.yaml").write_text("[]")
    keyed = put((*ARGS, "api_keys_file"), tmp_path / "keys.yaml")
    assert findings_of(tmp_path, edited(SERVE, keyed, put(("http_options", "host"), "0.0.0.0"))) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read: No such file or directory."),
        ("- {name: alice}", "entry 1 (alice): sha256 is missing; it must be 64 hexadecimal digits in lower case."),
    ],
)
def test_an_api_keys_file_that_cannot_be_used_is_an_error(tmp_path: Path, content: str | None, words: str) -> None:
    file, key = tmp_path / "keys.yaml", (*ARGS, "api_keys_file")
    if content is not None:
        file.write_text(content)
    (finding,) = findings_of(tmp_path, put(key, file)(SERVE))
    line = line_of(SERVE, key) + 1
    assert finding.startswith(f"serve.yaml:{line}: error: {dotted(key)} {file}") and finding.endswith(words)


def test_without_a_host_rays_default_counts_which_is_not_loopback(tmp_path: Path) -> None:
    (finding,) = findings_of(tmp_path, drop(("http_options", "host"))(SERVE))
    assert "error: http_options.host must be loopback" in finding and finding.endswith("got 0.0.0.0.")


def test_rays_defaults_count_where_the_file_leaves_options_out(tmp_path: Path) -> None:
    text = edited(SERVE, drop((*MODEL, "max_ongoing_requests")), drop((*INGRESS, "graceful_shutdown_timeout_s")))
    findings = "\n".join(findings_of(tmp_path, text))
    assert "max_ongoing_requests must be above 24" in findings and "got 5." in findings
    assert "graceful_shutdown_timeout_s must be above limits.timeout_s, 120" in findings and "got 20." in findings


def test_a_custom_policy_need_not_follow_the_rule_for_rays_target(tmp_path: Path) -> None:
    assert findings_of(tmp_path, edited(SERVE, put((*SCALING, "target_ongoing_requests"), 2))) == []
