"""Prints the logs of all replicas, each line with the name of its replica."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

from cluster.cli import Parser, UserError, run_command
from cluster.connection import LOCAL, dashboard_of, isolate
from cluster.dashboard import Dashboard, Details, log_places
from cluster.local.state import RUN_DIR
from cluster.terminal import make_command, say

RESCAN_S = 2.0


def show(dashboard: Dashboard, lines: int) -> None:
    for name, replica in all_replicas(dashboard.details(), dashboard.cluster):
        seen: set[str] = set()
        for place in log_places(replica):
            for line in dashboard.log(place, lines):
                if line not in seen:  # Serve's lines are in both files
                    say(f"{name} | {line}")
                seen.add(line)


def follow(dashboard: Dashboard, lines: int) -> None:
    """Follows all replicas until interrupted, also those that start later."""
    followed: set[str] = set()
    while True:
        for name, replica in all_replicas(dashboard.details(), dashboard.cluster):
            if name not in followed:
                followed.add(name)
                threading.Thread(target=follow_replica, args=(dashboard, name, replica, lines), daemon=True).start()
        time.sleep(RESCAN_S)


def follow_replica(dashboard: Dashboard, name: str, replica: Details, lines: int) -> None:
    for place in list(log_places(replica))[:1]:
        for line in dashboard.log(place, lines, follow=True):
            say(f"{name} | {line}")


def all_replicas(details: Details, cluster: str = LOCAL) -> Iterator[tuple[str, Details]]:
    """All living replicas. Of a deployment without any, those that died last."""
    any_replica = False
    for app in details["applications"].values():
        for deployment, state in app["deployments"].items():
            for replica in state["replicas"] or state.get("recent_dead_replicas") or ():
                any_replica = True
                yield f"{deployment} {replica['replica_id']}", replica
    if not any_replica:
        raise UserError(f"No replica has started, so there are no logs. See: {make_command('status', cluster)}")


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--lines", type=int, default=30, help="of each replica, the last ones")
    parser.add_argument("--follow", action="store_true", help="go on with what comes, until Ctrl-C")
    parser.add_argument("--cluster", default=LOCAL, help="local, or a file for `ray up`")
    parser.add_argument("--run-dir", type=Path, default=RUN_DIR)
    arguments = parser.parse_args()
    run_dir = arguments.run_dir.resolve()
    isolate(arguments.cluster, run_dir)
    with dashboard_of(arguments.cluster, run_dir) as dashboard:
        (follow if arguments.follow else show)(dashboard, arguments.lines)


if __name__ == "__main__":
    run_command(main)
