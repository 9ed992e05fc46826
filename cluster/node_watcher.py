"""Runs on each TPU node of a cluster on Google Cloud: asks whether Google is about to take the machine away, and if so
drains its Ray node, so that Serve starts replicas elsewhere and those here finish what they have begun.

cluster.yaml starts it after Ray, and it ends when Ray does. It asks the metadata server, which answers a question that
may wait as soon as the answer changes. Knows nothing of Serve and imports no Ray: it drains with `ray drain-node`.
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
from cluster.cli import Parser, UserError, run_command

logger = logging.getLogger(__name__)

METADATA = "http://metadata.google.internal/computeMetadata/v1/instance"
RAY = (sys.executable, "-m", "ray.scripts.scripts")
WAIT_S = 60  # after which the metadata server answers though nothing changed
GRACE_S = 10  # and how much later a silent one counts as gone
PAUSE_S = 1.0  # between questions, and after a failure

nearest = build_opener(ProxyHandler({}))  # the metadata server is the machine's own; no proxy knows it


@dataclass(frozen=True)
class Notice:
    reason: str
    left_s: int  # how long the machine still runs


# What the metadata server may say: key -> value -> what it means. Every other value means nothing to us, such as
# MIGRATE_ON_HOST_MAINTENANCE: no machine with a TPU is moved alive.
# Not read: upcoming-maintenance, by which Google announces a TPU's maintenance up to days ahead. Its pages spell the
# fields in two ways and the absence of any in three, and do not say whether it can be waited for:
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
    """Until Ray ends here. `ray` is the command that drains."""
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


def listen(metadata: str, key: str, tell: Callable[[Notice], None]) -> NoReturn:
    """Tells each notice that a key gives, once for as long as it stands."""
    etag, before, failing = "0", "", False  # no answer has the tag 0, so the first question is answered at once
    while True:
        try:
            value, etag = ask(metadata, key, etag)
        except (OSError, HTTPException) as error:
            if not failing:
                logger.warning("%s cannot be read, and is asked for until it can: %s", key, error)
            failing = True
        else:
            if failing or value != before:
                logger.info("%s is %s", key, value)
            if value != before and (notice := NOTICES[key].get(value)):
                tell(notice)
            before, failing = value, False
        time.sleep(PAUSE_S)  # what changes meanwhile is not missed: the tag tells


def ask(metadata: str, key: str, etag: str) -> tuple[str, str]:
    """A key's value and tag, once the tag is no longer `etag`, or after WAIT_S."""
    query = urlencode({"wait_for_change": "true", "timeout_sec": WAIT_S, "last_etag": etag})
    request = Request(f"{metadata}/{key}?{query}", headers={"Metadata-Flavor": "Google"})
    with nearest.open(request, timeout=WAIT_S + GRACE_S) as answer:
        return answer.read().decode().strip(), answer.headers.get("ETag", "0")


def drain(node: Node, notice: Notice, ray: Sequence[str]) -> None:
    """Tries until the cluster accepts it, the machine is about to go, or Ray has ended here."""
    until = time.monotonic() + notice.left_s
    while (left_s := until - time.monotonic()) > 0 and not processes.dead(node.raylet):
        try:
            done = subprocess.run(
                drain_command(node, notice.reason, left_s, ray), capture_output=True, text=True, timeout=left_s
            )
        except subprocess.TimeoutExpired:
            break
        if done.returncode == 0:
            logger.info("drained: replicas here finish what they have begun, and Serve starts others elsewhere")
            return
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        logger.error("ray drain-node failed, and is tried again: %s", lines[-1] if lines else f"exit {done.returncode}")
        time.sleep(PAUSE_S)
    logger.error("node %s was not drained", node.node_id)


def drain_command(node: Node, reason: str, left_s: float, ray: Sequence[str]) -> list[str]:
    """Of Ray's two reasons, preemption is the one that drains a node at work; idle termination spares it."""
    options = {
        "address": node.gcs_address,
        "node-id": node.node_id,
        "reason": "DRAIN_NODE_REASON_PREEMPTION",
        "reason-message": reason,
        "deadline-remaining-seconds": math.ceil(left_s),
    }
    return [*ray, "drain-node", *(f"--{name}={value}" for name, value in options.items())]


def this_node(pid: int | None) -> Node:
    """From the command line of the raylet, which is the node."""
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
    parser.add_argument("--raylet", type=int, metavar="PID", help="where several run on one machine")
    parser.add_argument("--metadata", default=METADATA, help="where to ask (default: Google's own server)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    watch(this_node(arguments.raylet), arguments.metadata)


if __name__ == "__main__":
    run_command(main)
