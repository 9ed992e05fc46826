"""A rollout without room: old replicas hold what a new one needs, and no node is coming.

Where a new config wants more replicas than run, Serve starts the first new one before it stops an old one. On nodes
that the old ones fill it would wait for ever. One old replica then has to go first, which Serve does where
`rolling_update_percentage` says so.
"""

import copy
import time
from collections.abc import Callable, Iterator

from cluster import nodes
from cluster.dashboard import Dashboard, Details, Late
from cluster.serve_status import name_of
from cluster.terminal import say

PATIENCE_S = 60.0  # Ray's autoscaler has asked for a node by then, if it may
UNPLACED = "to be scheduled"  # Serve's words for replicas that no node has taken for 30 s


class Room:
    """Looks at a deployment as it goes on, and makes room once."""

    def __init__(
        self,
        dashboard: Dashboard,
        wanted: Details,
        put: Callable[[Dashboard, Details], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.dashboard, self.wanted, self.put, self.clock = dashboard, wanted, put, clock
        self.since: float | None = None
        self.made = False

    def look(self, details: Details) -> None:
        if self.made:
            return
        places = dict(crowded(details))
        try:
            coming = places and nodes.status(self.dashboard).pending
        except Late:  # a busy head; it is asked again
            return
        if not places or coming:
            self.since = None
            return
        now = self.clock()
        self.since = now if self.since is None else self.since
        if now - self.since >= PATIENCE_S:
            self.made = True
            names = ", ".join(f"{app}/{deployment}" for app, deployment in places)
            say(f"No node has room for a new replica of {names} beside the old ones, so an old one ends first.")
            self.put(self.dashboard, with_room(self.wanted, places))

    def restore(self) -> None:
        """The config as it was wanted, once it serves."""
        if self.made:
            self.put(self.dashboard, self.wanted)


def crowded(details: Details) -> Iterator[tuple[tuple[str, str], float]]:
    """Deployments whose new replicas have no place while old ones run, and the share that has to be updated at once."""
    for name, app in details["applications"].items():
        for deployment, state in app["deployments"].items():
            running = sum(replica["state"] == "RUNNING" for replica in state["replicas"])
            target = state["target_num_replicas"]
            if state["status"] == "UPDATING" and UNPLACED in state["message"] and running and running < target:
                yield (name, deployment), min(1.0, (target - running + 1.5) / target)


def with_room(wanted: Details, places: dict[tuple[str, str], float]) -> Details:
    config = copy.deepcopy(wanted)
    for app in config["applications"]:
        for (name, deployment), share in places.items():
            if name == name_of(app):
                options = app.setdefault("deployments", [])
                if all(option["name"] != deployment for option in options):
                    options.append({"name": deployment})
                for option in options:
                    if option["name"] == deployment:
                        option["rolling_update_percentage"] = share
    return config
