"""Interprets the application states that the dashboard reports: whether all serve, and if not, why."""

from collections.abc import Iterator

from cluster.cli import UserError
from cluster.dashboard import Details, reason


class Failed(UserError):
    """An application failed to start; the message is the reason."""


def ready(details: Details, names: list[str]) -> bool:
    """Whether all of these applications serve. Raises Failed if one has failed."""
    apps = {name: details["applications"].get(name) for name in names}
    for name, app in apps.items():
        if app and app["status"] == "DEPLOY_FAILED":
            raise Failed(why(name, app))
    if not all(app and app["status"] == "RUNNING" for app in apps.values()):
        return False
    healthy_proxies = [proxy["status"] == "HEALTHY" for proxy in details["proxies"].values()]
    reachable = bool(healthy_proxies and all(healthy_proxies)) or details["proxy_location"] == "Disabled"
    return reachable and all(
        settled(deployment) for app in apps.values() if app for deployment in app["deployments"].values()
    )


def settled(deployment: Details) -> bool:
    """Whether it has the replicas that its config wants. Replicas that the autoscaler adds are not waited for."""
    return bool(deployment["status"] == "HEALTHY" or deployment["status_trigger"] == "AUTOSCALING")


def why(name: str, app: Details) -> str:
    failed = {
        n: deployment["message"]
        for n, deployment in app["deployments"].items()
        if deployment["status"] == "DEPLOY_FAILED"
    }
    messages = {f"{name}/{n}": message for n, message in failed.items() if message} or {name: app["message"]}
    return "\n".join(f"{place} did not start: {reason(message)}" for place, message in messages.items())


def counts(deployment: Details) -> str:
    states = [replica["state"] for replica in deployment["replicas"]]
    others = {state: states.count(state) for state in sorted(set(states) - {"RUNNING"})}
    ready_count = [f"{states.count('RUNNING')} of {deployment['target_num_replicas']} ready"]
    return ", ".join(ready_count + [f"{count} {state.lower().replace('_', ' ')}" for state, count in others.items()])


def replicas(app: Details, state: str, deployment: str | None = None) -> Iterator[Details]:
    for name, deployment_details in app["deployments"].items():
        for replica in deployment_details["replicas"]:
            if replica["state"] == state and deployment in (None, name):
                yield replica


def name_of(app: Details) -> str:
    return str(app.get("name", "default"))
