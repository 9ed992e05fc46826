"""Drains a TPU node on Google Cloud before its machine is preempted or stopped for maintenance.

Serve then starts replicas on other nodes, and the node's replicas hand their requests over. cluster.yaml starts this
watcher after Ray on each TPU node; it ends when Ray ends. It waits for changes at Google's metadata server, and drains
with `ray drain-node`. Knows nothing of Serve and imports no Ray.
"""

import logging
import math
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from typing import NoReturn
from urllib.parse import urlencode
from urllib.request import ProxyHandler, Request, build_opener

import psutil

from cluster import processes
from cluster.cli import Parser, UserError, integer_between, run_command

logger = logging.getLogger(__name__)

METADATA = "http://metadata.google.internal/computeMetadata/v1/instance"
RAY = (sys.executable, "-m", "ray.scripts.scripts")
WAIT_S = 60  # the metadata server then answers even if nothing changed
GRACE_S = 10  # beyond WAIT_S, until a server that is silent counts as gone
PAUSE_S = 1.0  # between requests, and after a failure

nearest = build_opener(ProxyHandler({}))  # no proxy reaches the metadata server


@dataclass(frozen=True)
class Notice:
    reason: str
    left_s: int  # until the machine ends


# Keys and values of the metadata server that end a machine. Other values are ignored, such as
# MIGRATE_ON_HOST_MAINTENANCE: no machine with a TPU is migrated live.
# The key upcoming-maintenance, which announces maintenance up to days ahead, is not read. Google's pages spell its
# fields in two ways and their absence in three, and do not say whether a request can wait for it:
# cloud.google.com/tpu/docs/view-maintenance-notifications, .../docs/instances/monitor-plan-host-maintenance-event
# cloud.google.com/compute/docs/instances/preemptible, .../docs/metadata/getting-live-migration-notice
NOTICES = {
    "preempted": {"TRUE": Notice("Google Cloud takes this spot machine back", 30)},
    "maintenance-event": {
        "TERMINATE_ON_HOST_MAINTENANCE": Notice("Google Cloud stops this machine to maintain it", 60)
    },
}


@dataclass(frozen=True)
class Node:
    """Ray on this machine."""

    raylet: psutil.Process
    node_id: str
    gcs_address: str


def watch(node: Node, metadata: str = METADATA, ray: Sequence[str] = RAY) -> None:
    """Watches until Ray ends on this machine. `ray` is the command line of Ray."""
    news: queue.Queue[Notice] = queue.Queue()
    for key in NOTICES:
        threading.Thread(target=listen, args=(metadata, key, news.put), daemon=True).start()
    logger.info("watching %s for node %s", " and ".join(NOTICES), node.node_id)
    while not processes.dead(node.raylet):
        try:
            notice = news.get(timeout=PAUSE_S)
        except queue.Empty:
            continue
        logger.warning("%s in %d s: draining node %s", notice.reason, notice.left_s, node.node_id)
        drain(node, notice, ray)
    logger.info("Ray has ended on this machine, so this ends too")


def listen(metadata: str, key: str, receive: Callable[[Notice], None]) -> NoReturn:
    """Passes on each notice of a key once, for as long as its value stays."""
    etag, before, failing = "0", "", False  # no value has the tag 0, so the first request is answered at once
    while True:
        try:
            value, etag = ask(metadata, key, etag)
        except (OSError, HTTPException) as error:
            if not failing:
                logger.warning("%s cannot be read. Trying again: %s", key, error)
            failing = True
        else:
            if failing or value != before:
                logger.info("%s is %s", key, value)
            if value != before and (notice := NOTICES[key].get(value)):
                receive(notice)
            before, failing = value, False
        time.sleep(PAUSE_S)  # no change is missed, as its tag differs


def ask(metadata: str, key: str, etag: str) -> tuple[str, str]:
    """A key's value and tag, once the tag differs from `etag`, or after WAIT_S."""
    query = urlencode({"wait_for_change": "true", "timeout_sec": WAIT_S, "last_etag": etag})
    request = Request(f"{metadata}/{key}?{query}", headers={"Metadata-Flavor": "Google"})
    with nearest.open(request, timeout=WAIT_S + GRACE_S) as answer:
        return answer.read().decode().strip(), answer.headers.get("ETag", "0")


def drain(node: Node, notice: Notice, ray: Sequence[str]) -> None:
    """Tries until the cluster accepts it, the machine's time is over, or Ray has ended on this machine."""
    until = time.monotonic() + notice.left_s
    while (left_s := until - time.monotonic()) > 0 and not processes.dead(node.raylet):
        try:
            done = subprocess.run(
                drain_command(node, notice.reason, left_s, ray), capture_output=True, text=True, timeout=left_s
            )
        except subprocess.TimeoutExpired:
            break
        if done.returncode == 0:
            logger.info("drained: Serve starts replicas on other nodes, and this one's hand their requests over")
            return
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        logger.error("ray drain-node failed. Trying again: %s", lines[-1] if lines else f"exit {done.returncode}")
        time.sleep(PAUSE_S)
    logger.error("node %s was not drained", node.node_id)


def leave(node: Node, within_s: int, ray: Sequence[str] = RAY) -> None:
    """Drains the node and waits until Ray has ended on it: what a pod does before Kubernetes ends it."""
    until = time.monotonic() + within_s
    drain(node, Notice("Kubernetes ends this pod", within_s), ray)
    psutil.wait_procs([node.raylet], timeout=max(0.0, until - time.monotonic()))


def drain_command(node: Node, reason: str, left_s: float, ray: Sequence[str]) -> list[str]:
    """The reason is preemption: Ray's other one, idle termination, does not drain a busy node."""
    options = {
        "address": node.gcs_address,
        "node-id": node.node_id,
        "reason": "DRAIN_NODE_REASON_PREEMPTION",
        "reason-message": reason,
        "deadline-remaining-seconds": math.ceil(left_s),
    }
    return [*ray, "drain-node", *(f"--{name}={value}" for name, value in options.items())]


def this_node(pid: int | None) -> Node:
    """Reads the node's ids from the command line of its raylet."""
    raylets = [
        process
        for process in psutil.process_iter()
        if processes.name_of(process) == "raylet" and pid in (None, process.pid)
    ]
    if not raylets:
        raise UserError("No raylet runs here. Start Ray before its watcher." if pid is None else f"{pid} is no raylet.")
    if len(raylets) > 1:
        pids = ", ".join(str(process.pid) for process in raylets)
        raise UserError(f"Several raylets run here ({pids}). Name one: --raylet PID")
    arguments = raylets[0].cmdline()
    node_id, gcs_address = (value_of(option, arguments) for option in ("--node_id", "--gcs-address"))
    return Node(raylets[0], node_id, gcs_address)


def value_of(option: str, arguments: Sequence[str]) -> str:
    for argument in arguments:
        if argument.startswith(f"{option}="):
            return argument.partition("=")[2]
    raise UserError(f"The raylet was started without {option}. cluster/node_watcher.py was written for Ray 2.60.")


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--raylet", type=int, metavar="PID", help="needed if several run on this machine")
    parser.add_argument("--metadata", default=METADATA, help="URL of the metadata server (default: Google's)")
    seconds = integer_between(1, 86_400)
    parser.add_argument("--leave-within", type=seconds, metavar="S", help="drain now, and end once Ray has ended here")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    node = this_node(arguments.raylet)
    if arguments.leave_within:
        leave(node, arguments.leave_within)
    else:
        watch(node, arguments.metadata)


if __name__ == "__main__":
    run_command(main)
