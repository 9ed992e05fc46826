"""Shows what is up, deployed and healthy, as Ray reports it and as the API itself answers.

The API is asked because Serve reports an application as running for a while after its proxy or ingress died or hangs.
"""

import json
import time
from collections.abc import Iterator
from http.client import HTTPException
from typing import NamedTuple
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

from cluster import nodes
from cluster.cli import UserError
from cluster.connection import LOCAL, api_of, reach
from cluster.dashboard import Dashboard, Details, serves
from cluster.serve_status import counts, why
from cluster.terminal import make_command, say

ANSWER_S = 8.0  # an ingress without a replica answers after 5 s
STARTING = ("NOT_STARTED", "DEPLOYING", "DELETING")  # states in which an API need not answer yet


class Health(NamedTuple):
    good: bool
    words: str


def status(dashboard: Dashboard, uptime: str) -> None:
    """Raises UserError with all faults if something that is deployed does not serve."""
    details = dashboard.details()
    failure = nodes.failure(nodes.past(dashboard))
    rows = [*nodes.status(dashboard).rows(), *([f"last failure: {failure}"] if failure else [])]
    say(f"Ray    {dashboard.address if dashboard.cluster == LOCAL else dashboard.cluster}  {uptime}")
    say("Nodes  " + "\n       ".join(rows))
    if not details["applications"]:
        say(f"Serve  nothing is deployed. Deploy with: {make_command('deploy', dashboard.cluster)}")
        return
    say(f"Serve  {reach(dashboard)}")
    say("Proxy  " + "\n       ".join(proxy_rows(details)))
    with api_of(dashboard, details) as api:
        healths = {name: health_of(f"{api}{prefix_of(app)}/healthz") for name, app in details["applications"].items()}
    for name, app in details["applications"].items():
        say(f"{name}  {app['status']}, {healths[name].words}")
        for deployment, state in app["deployments"].items():
            say(f"  {deployment}  {state['status']}  {counts(state)}")
        if app["status"] == "DEPLOY_FAILED":
            say(why(name, app))
    if problems := [*faults(details, healths)]:
        raise UserError("\n".join(problems))


def proxy_rows(details: Details) -> list[str]:
    rows = [f"{proxy['status']} on {proxy.get('node_ip', node)}" for node, proxy in details["proxies"].items()]
    return rows or ["none yet"]


def prefix_of(app: Details) -> str:
    return str(app.get("route_prefix") or "/").rstrip("/")


def health_of(url: str) -> Health:
    """An application is healthy unless it answers with a server error: other people's may have no such route."""
    began = time.monotonic()
    try:
        with urlopen(url, timeout=ANSWER_S) as answer:
            answer.read()
    except HTTPError as error:
        if error.code >= 500:
            return Health(False, f"its /healthz answers {error.code}: {message_of(error)}")
    except (URLError, TimeoutError, ConnectionError, HTTPException) as error:
        cause = getattr(error, "reason", error)
        words = f"nothing within {ANSWER_S:g} s" if isinstance(cause, TimeoutError) else cause
        return Health(False, f"its /healthz does not answer: {words}")
    return Health(True, f"answers after {time.monotonic() - began:.2f} s")


def message_of(error: HTTPError) -> str:
    """The message of an error in OpenAI's format, as our API sends it, or the text of a proxy's error."""
    text = error.read(2000).decode(errors="replace")
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return " ".join(text.split())[:200]


def faults(details: Details, healths: dict[str, Health]) -> Iterator[str]:
    if serves(details) and details.get("proxy_location") != "Disabled":
        for node, proxy in details["proxies"].items():
            if proxy["status"] not in ("HEALTHY", "STARTING"):
                yield f"The proxy on {proxy.get('node_ip', node)} is {proxy['status']}."
    for name, app in details["applications"].items():
        if app["status"] in ("DEPLOY_FAILED", "UNHEALTHY"):
            yield f"{name} is {app['status']}."
        if not healths[name].good and app["status"] not in STARTING:
            yield f"{name} does not serve: {healths[name].words}"
