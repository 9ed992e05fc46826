"""Checks Serve configs and cluster files for mistakes that Ray would ignore, or would notice only minutes later:

    python -m cluster.config.lint serve_config.yaml cluster.yaml

Each Serve config is also held against each cluster file of the same call. No cluster and no network is asked. The exit
status is 0 without errors, also with advice; 1 with errors; 2 after a wrong call.

To add a rule, see CONTRIBUTING.md. A test refuses a `check_...` that stands in no list.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from app.builders import Args
from cluster.cli import Parser, UsageError, UserError, run_command
from cluster.config import cluster_config, serve_config
from cluster.config.cluster_config import ClusterConfig, NodeType, Slice
from cluster.config.documents import Document, Finding, did_you_mean, read
from cluster.config.rules import (
    checkpoint,
    cluster_file,
    cluster_tpus,
    google_cloud,
    google_names,
    placement,
    serve_builder,
    serve_gpus,
    serve_keys,
    serve_limits,
)
from cluster.config.serve_config import Application, Deployment, ServeConfig
from cluster.gpus import visible_gpus
from cluster.terminal import say

DocumentRule = Callable[[Document], Iterator[Finding]]

# The following get a file of which nothing is known to be valid.
SERVE_KEY_RULES: list[DocumentRule] = [serve_keys.check_keys]
CLUSTER_KEY_RULES: list[DocumentRule] = [cluster_file.check_keys]
BUILDER_RULES: list[Callable[[Application], Iterator[Finding]]] = [serve_builder.check_builder]

# The following get a Serve config whose every value is valid by itself.
SERVE_RULES: list[Callable[[ServeConfig], Iterator[Finding]]] = [serve_limits.check_access]
DEPLOYMENT_RULES: list[Callable[[Deployment], Iterator[Finding]]] = [
    serve_limits.check_chip_count,
    serve_gpus.check_options,
    serve_gpus.check_gpu_count,
    serve_limits.check_shutdown,
    serve_limits.check_window,
]
IMAGE_RULES: list[Callable[[Application, Args], Iterator[Finding]]] = [  # of applications with app.builders' Args
    serve_limits.check_request_limits,
    serve_limits.check_images_at_once,
    serve_limits.check_queues,
    serve_limits.check_target,
    serve_limits.check_chips_are_used,
    serve_limits.check_timeouts,
    serve_limits.check_drain,
    serve_limits.check_health,
    serve_gpus.check_gpu_platform,
    serve_gpus.check_gpu_dtype,
    checkpoint.check_checkpoint,
]

# The following get a cluster file that fits Ray's schema.
CLUSTER_FILE_RULES: list[DocumentRule] = [cluster_file.check_file_mounts]
GOOGLE_RULES: list[DocumentRule] = [
    google_names.check_names,
    google_cloud.check_zone,
    google_cloud.check_commands,
    google_cloud.check_security,
]

# The following get a cluster file whose nodes Ray could start.
NODE_TYPE_RULES: list[Callable[[ClusterConfig, NodeType], Iterator[Finding]]] = [cluster_file.check_workers]
SLICE_RULES: list[Callable[[NodeType, Slice], Iterator[Finding]]] = [  # of TPU node types on Google Cloud
    cluster_tpus.check_resources,
    cluster_tpus.check_labels,
    cluster_tpus.check_hosts,
    cluster_tpus.check_runtime,
]

# The following hold a Serve config against a cluster file.
FILE_PLACEMENT_RULES: list[Callable[[Application, ClusterConfig], Iterator[Finding]]] = [placement.check_named_files]
PLACEMENT_RULES: list[Callable[[Deployment, ClusterConfig], Iterator[Finding]]] = [
    placement.check_capacity,
    placement.check_model_has_chips,
]


def lint(paths: Sequence[Path], local: bool = False) -> list[Finding]:
    """All findings, file by file in the order of their lines. Raises OSError.

    `local` says that all nodes run on this machine, see its files and have its GPUs.
    """
    findings: dict[str, list[Finding]] = {}
    serve_configs: list[ServeConfig] = []
    cluster_configs: list[ClusterConfig] = []
    for path in paths:
        document, findings[str(path)] = read(path)
        if document:
            more, config = check(document)
            findings[str(path)] += more
            if isinstance(config, ServeConfig):
                serve_configs.append(config)
            elif config:
                cluster_configs.append(config)
    for serve in serve_configs:
        for cluster in cluster_configs:
            findings[serve.document.file] += check_together(serve, cluster, local)
    return [finding for file in findings.values() for finding in sorted(file, key=lambda finding: finding.line)]


def refuse_errors(paths: Sequence[Path], local: bool = False, advice: bool = True) -> None:
    """Prints advice, and raises UserError with the errors, for a command that is about to use these files."""
    try:
        findings = lint(paths, local)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}.") from None
    for finding in findings:
        if advice and not finding.error:
            say(str(finding))
    if errors := [str(finding) for finding in findings if finding.error]:
        raise UserError("\n".join([*errors, "Nothing was started. Correct this, and run the same command again."]))


def check(document: Document) -> tuple[list[Finding], ServeConfig | ClusterConfig | None]:
    """The findings of one file, and its model if the file is sound enough to be held against others."""
    keys = document.value if isinstance(document.value, dict) else {}
    if serve_config.KEY in keys:
        return check_serve(document)
    if cluster_config.KEY in keys or "provider" in keys:
        return check_cluster(document)
    known = (serve_config.KEY, cluster_config.KEY, "provider")
    similar = next(filter(None, (did_you_mean(name, known) for name in keys)), "")
    text = f"it has neither {serve_config.KEY}, as a Serve config, nor {cluster_config.KEY}, as a cluster file."
    return [document.error((), f"{text}{similar}")], None


def check_serve(document: Document) -> tuple[list[Finding], ServeConfig | None]:
    config = ServeConfig(document)
    findings = [finding for rule in SERVE_KEY_RULES for finding in rule(document)]
    invalid = serve_config.problems(document)
    invalid += [finding for app in config.applications for rule in BUILDER_RULES for finding in rule(app)]
    findings += dict.fromkeys(invalid)
    if has_errors(invalid):
        return findings, None
    findings += (finding for rule in SERVE_RULES for finding in rule(config))
    for app in config.applications:
        for deployment in app.deployments:
            findings += (finding for rule in DEPLOYMENT_RULES for finding in rule(deployment))
        if isinstance(app.args, Args):
            findings += (finding for rule in IMAGE_RULES for finding in rule(app, app.args))
    return findings, config


def check_cluster(document: Document) -> tuple[list[Finding], ClusterConfig | None]:
    config = ClusterConfig(document)
    findings = [finding for rule in CLUSTER_KEY_RULES for finding in rule(document)]
    if invalid := [*cluster_config.schema_problems(document)]:
        return findings + invalid, None
    rules = CLUSTER_FILE_RULES + (GOOGLE_RULES if config.is_google else [])
    findings += (finding for rule in rules for finding in rule(document))
    if invalid := cluster_config.problems(document):
        return findings + invalid, None
    for node_type in config.node_types.values():
        findings += (finding for rule in NODE_TYPE_RULES for finding in rule(config, node_type))
        if config.is_google and node_type.slice:
            findings += (finding for rule in SLICE_RULES for finding in rule(node_type, node_type.slice))
    return findings, config


def check_together(serve: ServeConfig, cluster: ClusterConfig, local: bool) -> Iterator[Finding]:
    if local:
        cluster = replace(cluster, gpus=visible_gpus())
    for app in serve.applications:
        if not local:
            yield from (finding for rule in FILE_PLACEMENT_RULES for finding in rule(app, cluster))
        for deployment in app.deployments:
            yield from (finding for rule in PLACEMENT_RULES for finding in rule(deployment, cluster))


def has_errors(findings: Iterable[Finding]) -> bool:
    return any(finding.error for finding in findings)


def main() -> int:
    description = (__doc__ or "").partition("\nTo add a rule")[0]
    parser = Parser(description, hint="For example: python -m cluster.config.lint serve_config.yaml cluster.yaml")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    files: list[Path] = parser.parse_args().files
    try:
        findings = lint(files)
    except OSError as error:
        raise UsageError(f"{error.filename} cannot be read: {error.strerror}.") from None
    for finding in findings:
        say(str(finding))
    errors = sum(finding.error for finding in findings)
    counts = f"{errors or 'no'} error{'' if errors == 1 else 's'}, {len(findings) - errors or 'no'} advice"
    say(f"Checked {', '.join(map(str, files))}: {counts}.")
    return int(bool(errors))


if __name__ == "__main__":
    run_command(main)
