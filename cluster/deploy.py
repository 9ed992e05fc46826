"""Deploys a Serve config and waits until it serves; shows its status; removes it.

The request is the one that `serve deploy CONFIG` sends, through Ray's own client. This module adds:

- the linter, before anything is sent;
- a wait until all applications serve, and the reason if one fails;
- a rollback to the previous applications if the new config fails;
- a retry of a config that failed before, which Serve alone would ignore as unchanged.

Only cluster/connection.py knows where the cluster is.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from cluster import processes
from cluster.cli import Parser, UserError, run_command
from cluster.config.documents import load_yaml
from cluster.connection import LOCAL, dashboard_of, isolate, reach
from cluster.dashboard import Dashboard, Details, Late, log_places, reason, serves
from cluster.local.state import CLUSTER_FILE, RUN_DIR, Cluster, running
from cluster.local.verbs import port
from cluster.rollout import Room
from cluster.serve_status import Failed, counts, name_of, ready, replicas
from cluster.status import status
from cluster.terminal import Progress, format_duration, make_command, say

if TYPE_CHECKING:
    from ray.serve.schema import ServeDeploySchema

POLL_S = 0.5
LATE_ANSWERS = 6  # in a row, each after the timeout of 30 s
FAILED = ("DEPLOY_FAILED", "UNHEALTHY")


def deploy(dashboard: Dashboard, config: "ServeDeploySchema", path: Path, timeout_s: float) -> None:
    say(f"Deploying {path}" + (f" to {dashboard.cluster}" if dashboard.cluster != LOCAL else ""))
    wanted: Details = json.loads(json.dumps(config.model_dump(exclude_unset=True)))
    before = dashboard.details()
    check_http_options(before, config, path, dashboard.cluster)
    if same := unchanged(before, wanted):
        say(f"{', '.join(same)} already runs this config. To load changed code: {reload(dashboard.cluster)}")
    if again := stuck(before, wanted):
        say(f"{', '.join(sorted(again))} has failed before and is removed first: Serve does not retry by itself.")
        put(dashboard, {**wanted, "applications": [app for app in wanted["applications"] if name_of(app) not in again]})
        wait(dashboard, lambda details: not again & set(details["applications"]), timeout_s)
    put(dashboard, wanted)
    room = Room(dashboard, wanted, put)

    def done(details: Details) -> bool:
        room.look(details)
        return ready(details, names_of(wanted))

    try:
        took = wait(dashboard, done, timeout_s)
        room.restore()
    except Failed as failure:
        put_back(dashboard, before, wanted, path, str(failure), timeout_s)
    except KeyboardInterrupt:
        say(f"Serve keeps deploying {path}; see: {make_command('status', dashboard.cluster)}")
        raise
    say(f"{', '.join(names_of(wanted))} is ready after {format_duration(took)}: {reach(dashboard)}")


def put_back(
    dashboard: Dashboard, before: Details, failed: Details, path: Path, failure: str, timeout_s: float
) -> NoReturn:
    """Rolls back: deploys the previous applications again, which the failed config has replaced by nothing."""
    previous = running_config(before, failed)
    if previous is None:
        raise UserError(failure)
    names = ", ".join(names_of(previous))
    say(f"{path} failed. Rolling back to what ran before: {names}.")
    sound = [name for name in names_of(previous) if before["applications"][name]["status"] == "RUNNING"]
    try:
        put(dashboard, previous)
        took = wait(dashboard, lambda details: ready(details, sound or names_of(previous)), timeout_s)
    except UserError as second:
        raise UserError(f"{failure}\n{path} failed, and the rollback failed too. {second}") from None
    except KeyboardInterrupt:
        say(f"Serve keeps rolling back to {names}; see: {make_command('status', dashboard.cluster)}")
        raise
    raise UserError(
        f"{failure}\n{path} is not deployed. {names} serves as before, since {format_duration(took)} after the failure."
    )


def running_config(before: Details, failed: Details) -> Details | None:
    """The config of the applications that ran before, or None if no config had deployed any.

    Serve's own options are the same in both configs. The result includes applications that the failed config leaves
    out: a config that works would have removed them.
    """
    apps = [
        app["deployed_app_config"]
        for app in before["applications"].values()
        if app["status"] in ("RUNNING", "UNHEALTHY") and app.get("deployed_app_config")
    ]
    common = {name: value for name, value in failed.items() if name != "target_capacity"}
    capacity = {} if before.get("target_capacity") is None else {"target_capacity": before["target_capacity"]}
    return {**common, **capacity, "applications": apps} if apps else None


def names_of(config: Details) -> list[str]:
    return [name_of(app) for app in config["applications"]]


def lint_first(path: Path, cluster: str, run_dir: Path) -> None:
    """Lints a config together with its cluster file. Prints advice; raises UserError for errors."""
    from cluster.config.lint import refuse_errors  # imports the app and all of Ray's schemas, which takes seconds

    if cluster != LOCAL:
        refuse_errors([path, Path(cluster)])
        return
    up = Cluster.load(run_dir)
    refuse_errors([path, Path(os.path.relpath(up.file if up else CLUSTER_FILE))], local=True)


def reload(cluster: str) -> str:
    """The command that loads changed code. A remote head gets code at `make up`, a TPU node when it starts."""
    return make_command("undeploy deploy") if cluster == LOCAL else make_command("down up deploy", cluster)


def read(path: Path, serve_port: int | None) -> "ServeDeploySchema":
    content = load_yaml(path, f"There is no file {path}. Name the config with: make deploy CONFIG=...")
    if not isinstance(content, dict) or not content.get("applications"):
        raise UserError(f"{path} must have a list `applications`, as Ray Serve's config files do.")
    if serve_port and isinstance(content.setdefault("http_options", {}), dict):
        content["http_options"]["port"] = serve_port

    from pydantic import ValidationError  # Ray takes a second and more to import, so mistakes above come quicker
    from ray.serve.schema import ServeDeploySchema

    try:
        return ServeDeploySchema.model_validate(content)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()]
        raise UserError(f"{path} is not a Serve config. {'; '.join(problems)}.") from None
    except (ImportError, ValueError) as error:
        raise UserError(f"{path} is not a Serve config. {error}") from None


def check_http_options(before: Details, config: "ServeDeploySchema", path: Path, cluster: str) -> None:
    wanted = config.http_options.model_dump()
    if serves(before):  # Serve silently ignores a changed value
        for option, value in wanted.items():
            if (current := before["http_options"].get(option, value)) != value:
                keep = (
                    f", or keep it: {make_command(f'deploy SERVE_PORT={current}', cluster)}" if option == "port" else ""
                )
                raise UserError(
                    f"http_options.{option} is {current} while Serve runs, and {path} wants {value}. "
                    f"Stop Serve first: {make_command('undeploy', cluster)}{keep}"
                )
    elif cluster == LOCAL and not processes.free(wanted["port"]):  # a remote head has its own ports
        raise UserError(
            f"Port {wanted['port']} (http_options.port in {path}) is taken by {processes.listener(wanted['port'])}. "
            f"Choose another one: make deploy SERVE_PORT={wanted['port'] + 1}"
        )
    if wanted["host"] in ("0.0.0.0", "::"):
        say(f"Note: others on the network can reach this. For this machine alone, set http_options.host in {path}.")


def unchanged(before: Details, wanted: Details) -> list[str]:
    """The running applications whose config does not change."""
    running = {n: app["deployed_app_config"] for n, app in before["applications"].items() if app["status"] == "RUNNING"}
    return [name_of(app) for app in wanted["applications"] if running.get(name_of(app)) == app]


def stuck(before: Details, wanted: Details) -> set[str]:
    """Failed applications to remove first: Serve would not retry them, or they have no running replica to lose."""
    apps = {name_of(app): app for app in wanted["applications"]}
    return {
        name
        for name, app in before["applications"].items()
        if name in apps
        and app["status"] in FAILED
        and (app["deployed_app_config"] == apps[name] or not list(replicas(app, "RUNNING")))
    }


def put(dashboard: Dashboard, config: Details) -> None:
    try:
        client(dashboard).deploy_applications(config)
    except (RuntimeError, ConnectionError) as error:
        raise UserError(f"Serve refuses the config. {reason(str(error))}") from None


def client(dashboard: Dashboard) -> Any:
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

    return ServeSubmissionClient(dashboard.address)


def wait(dashboard: Dashboard, done: Callable[[Details], bool], timeout_s: float) -> float:
    """Shows progress until `done` is true of the details. Returns the seconds that it took."""
    news: dict[str, list[str]] = {}  # replica -> last lines of its log
    with Progress() as progress:
        while not done(details := patient(dashboard, progress)):
            if progress.elapsed > timeout_s:
                see = ", ".join(make_command(verb, dashboard.cluster) for verb in ("status", "logs"))
                raise UserError(f"Not ready after {format_duration(timeout_s)}. Serve keeps trying; see: {see}")
            progress.show(dict(rows(dashboard, details, news)))
            time.sleep(POLL_S)
        return progress.elapsed


def patient(dashboard: Dashboard, progress: Progress) -> Details:
    """The details, from a dashboard that may be late several times: a head is busy while replicas start."""
    for _ in range(LATE_ANSWERS):
        try:
            return dashboard.details()
        except Late as late:
            progress.show({"dashboard": ("late", str(late))})
    return dashboard.details()


def rows(dashboard: Dashboard, details: Details, news: dict[str, list[str]]) -> Iterator[tuple[str, tuple[str, str]]]:
    for name, app in details["applications"].items():
        if not app["deployments"]:
            yield name, (app["status"].lower().replace("_", " "), "")
        for deployment, state in app["deployments"].items():
            detail = reason(state["message"]).partition("\n")[0]
            if not detail or detail.endswith(
                "to initialize."
            ):  # "has taken more than 30s to initialize.": the log says why
                for replica in replicas(app, "STARTING", deployment):
                    detail = latest(dashboard, replica, news)
            yield f"{name}/{deployment}", (counts(state), detail)
    if not details["applications"]:
        yield "Serve", ("starting", "")


def latest(dashboard: Dashboard, replica: Details, news: dict[str, list[str]]) -> str:
    """The newest line that a replica wrote to its log or to stderr."""
    known = news.setdefault(replica["replica_id"], [])
    for place in log_places(replica):
        for line in dashboard.log(place, lines=1):
            if (words := line.rpartition(" -- ")[2].strip()) not in known[-2:]:
                known.append(words)
    return known[-1] if known else ""


def undeploy(dashboard: Dashboard, timeout_s: float) -> None:
    details = dashboard.details()
    if not serves(details):
        say("Nothing is deployed, so nothing to remove.")
        return
    elsewhere = dashboard.cluster != LOCAL
    client(dashboard).delete_applications()
    serve_port = details["http_options"]["port"]
    wait(dashboard, lambda details: not serves(details) and (elsewhere or processes.free(serve_port)), timeout_s)
    say(f"Removed {', '.join(details['applications']) or 'Serve'}; the cluster is still up.")


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("verb", choices=["deploy", "status", "undeploy"])
    parser.add_argument("--cluster", default=LOCAL, help="local, or a file for `ray up`")
    parser.add_argument("--config", type=Path, default=Path("serve_config.yaml"))
    parser.add_argument("--serve-port", default="", help="instead of the config's http_options.port")
    parser.add_argument("--timeout-s", type=float, default=1800.0)
    parser.add_argument("--run-dir", type=Path, default=RUN_DIR)
    arguments = parser.parse_args()
    cluster, run_dir, timeout_s = arguments.cluster, arguments.run_dir.resolve(), arguments.timeout_s
    isolate(cluster, run_dir)
    if arguments.verb == "deploy":
        serve_port = port(arguments.serve_port) if arguments.serve_port else None
        config = read(arguments.config, serve_port)
        lint_first(arguments.config, cluster, run_dir)
    with dashboard_of(cluster, run_dir) as dashboard:
        match arguments.verb:
            case "deploy":
                deploy(dashboard, config, arguments.config, timeout_s)
            case "status":
                status(dashboard, f"up {format_duration(running(run_dir).uptime_s)}" if cluster == LOCAL else "answers")
            case "undeploy":
                undeploy(dashboard, timeout_s)


if __name__ == "__main__":
    run_command(main)
