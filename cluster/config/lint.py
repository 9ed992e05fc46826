"""Lints serve configs and cluster files, because Ray takes much of what is wrong in them without a word:

    python -m cluster.config.lint serve_config.yaml cluster.yaml

Its content says which of the two a file is. Each serve config is held against each cluster file that is named with it.
No cluster and no network is asked. The exit status is 0, also with advice, 1 with errors, 2 after a wrong call.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from app.serving.replica import StableDiffusion
from cluster.cli import Parser, UsageError, UserError, run_command
from cluster.config.documents import Document, Finding, nearest, read
from cluster.config.lint_checkpoint import check_checkpoints
from cluster.config.lint_cluster import check_cluster, most_workers, node_types
from cluster.config.lint_models import check_keys, check_values
from cluster.config.lint_serve import App, Deployment, apps, check_fit
from cluster.terminal import say

SERVE, CLUSTER = "applications", ("available_node_types", "provider")  # the keys that tell the two apart


def lint(paths: Sequence[Path], twin: bool = False) -> list[Finding]:
    """All that is to be said about these files, in their order; `twin`: where the clusters' nodes are all this machine.
    Raises OSError."""
    found: dict[str, list[Finding]] = {}
    serves: list[Document] = []
    clusters: list[Document] = []
    for path in paths:
        document, found[str(path)] = read(path)
        if document:
            said, sound = check(document)
            found[str(path)] += said
            if sound:
                (serves if SERVE in document.value else clusters).append(document)
    for serve in serves:
        for cluster in clusters:
            found[serve.file] += check_together(serve, cluster, twin)
    return [one for file in found.values() for one in sorted(file, key=lambda finding: finding.line)]


def refuse_errors(paths: Sequence[Path], twin: bool = False) -> None:
    """Tells what is advice, and raises UserError where there are errors."""
    try:
        found = lint(paths, twin)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}.") from None
    for advice in (finding for finding in found if not finding.error):
        say(str(advice))
    if errors := [str(finding) for finding in found if finding.error]:
        raise UserError("\n".join([*errors, "Nothing was begun. Put that right, and run the same again."]))


def check(document: Document) -> tuple[list[Finding], bool]:
    """What is to be said about a file by itself, and whether it is sound enough to be held against others."""
    keys = document.value if isinstance(document.value, dict) else {}
    if SERVE in keys:
        found, wrong = [*check_keys(document)], [*check_values(document)]
        broken = any(finding.error for finding in wrong)
        fits = () if broken else (*check_fit(document), *check_checkpoints(document))
        return [*found, *wrong, *fits], not broken
    if any(name in keys for name in CLUSTER):
        return check_cluster(document)
    near = next(filter(None, (nearest(name, (SERVE, *CLUSTER)) for name in keys)), "")
    text = f"it has neither {SERVE}, as a serve config, nor {CLUSTER[0]}, as a cluster file.{near}"
    return [document.error((), text)], False


def check_together(serve: Document, cluster: Document, twin: bool) -> Iterator[Finding]:
    for app in apps(serve):
        if not twin:  # whose nodes all see this machine's files
            yield from check_mount(serve, cluster, app)
        for deployment in app.deployments:
            yield from check_room(serve, cluster, deployment)
            if deployment.name == StableDiffusion.__name__:
                yield from check_chips(serve, cluster, deployment)


def check_mount(serve: Document, cluster: Document, app: App) -> Iterator[Finding]:
    """Whether the nodes get the file with the API's keys: the ingress may be placed on any."""
    name = getattr(app.args, "api_keys_file", None)
    if name is None or name.startswith(("~", "/")):
        return
    mounted = (cluster.at(("file_mounts",)) or {}).values()
    if not any(Path(name).is_relative_to(local) for local in mounted):
        text = f"is {name}, which {cluster.file}'s file_mounts bring to no node."
        yield serve.error((*app.key, "args", "api_keys_file"), text)


def check_room(serve: Document, cluster: Document, deployment: Deployment) -> Iterator[Finding]:
    """Whether a replica fits on a node, and all replicas on as many nodes as there may be."""
    needs, types = needs_of(deployment), node_types(cluster)
    if cluster.at(("provider", "type")) == "local":  # Ray asks the machines themselves what they have
        return
    fitting = {name: replicas_on(needs, one["resources"], deployment) for name, one in types.items()}
    if not any(fitting.values()):
        asked = ", ".join(f"{name} {amount:g}" for name, amount in needs.items() if amount)
        has = "; ".join(f"{name}: {amounts(one['resources'])}" for name, one in types.items())
        text = f"ask for {asked}, which no node type of {cluster.file} has ({has})."
        yield serve.error((*deployment.key, "ray_actor_options"), text)
        return
    head, left, room = cluster.value.get("head_node_type"), most_workers(cluster), 0.0
    for name in sorted(fitting, key=lambda name: -fitting[name]):
        nodes = 1 if name == head else min(types[name]["max_workers"], left)
        left -= 0 if name == head else nodes
        room += fitting[name] * nodes if fitting[name] else 0
    if deployment.most_replicas > room:
        text = f"is {deployment.most_replicas}, and {cluster.file}'s max_workers leave room for {room:g}."
        yield serve.error(deployment.most_replicas_key, text)


def needs_of(deployment: Deployment) -> dict[str, float]:
    actor = deployment.actor
    needs = {"CPU": 1.0 if actor.num_cpus is None else actor.num_cpus, "GPU": actor.num_gpus or 0, **actor.resources}
    if actor.accelerator_type:
        needs[f"accelerator_type:{actor.accelerator_type}"] = 0.001
    return needs


def replicas_on(needs: dict[str, float], has: dict[str, float], deployment: Deployment) -> float:
    most = min((has.get(name, 0) // amount for name, amount in needs.items() if amount), default=math.inf)
    return min(most, deployment.said.get("max_replicas_per_node") or math.inf)


def amounts(resources: dict[str, float]) -> str:
    return ", ".join(f"{name} {amount:g}" for name, amount in resources.items() if ":" not in name and "-" not in name)


def check_chips(serve: Document, cluster: Document, model: Deployment) -> Iterator[Finding]:
    hosts = {one["slice"].name: one["resources"].get("TPU", 0) for one in node_types(cluster).values() if one["slice"]}
    key = (*model.key, "ray_actor_options", "resources")
    if hosts and not model.chips:
        yield serve.advice(key, f"ask for no TPU, so {model.name} computes on the CPU, and {cluster.file}'s TPUs idle.")
    for name, chips in hosts.items():
        if model.chips == 4 and chips == 8:  # Ray sets which chips are visible, but not their bounds
            text = (
                f"ask for 4 of the 8 chips of a {name} in {cluster.file}; Ray 2.60 does not tell libtpu how they lie."
            )
            yield serve.advice(key, text)


def main() -> int:
    parser = Parser(__doc__, hint="For example: python -m cluster.config.lint serve_config.yaml cluster.yaml")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    files: list[Path] = parser.parse_args().files
    try:
        found = lint(files)
    except OSError as error:
        raise UsageError(f"{error.filename} cannot be read: {error.strerror}.") from None
    for finding in found:
        say(str(finding))
    errors = sum(finding.error for finding in found)
    counts = f"{errors or 'no'} error{'' if errors == 1 else 's'}, {len(found) - errors or 'no'} advice"
    say(f"Checked {', '.join(map(str, files))}: {counts}.")
    return int(bool(errors))


if __name__ == "__main__":
    run_command(main)
