"""`python -m rehearsal`: rehearses cluster files, without hosts or with --hosts, and says what happened."""

import contextlib
import logging
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from cluster import ROOT
from cluster.cli import Parser, UserError, run_command
from cluster.remote import leftovers
from rehearsal import faults, full
from rehearsal.calls import Rehearsal, rehearsing
from rehearsal.full import expect

ACTS = {"whole": full.whole, "half": full.first_half, "faults": faults.act}
NODES = 4
LAST_LINES = 30  # of what Ray printed before a failure


def walk(cloud: Rehearsal, source: Path) -> Iterator[str]:
    """Brings a cluster up, scales it and takes it down. Yields what happened; raises UserError where it went wrong."""
    file = cloud.desk.cluster_file(source)
    expect(cloud.up(file) == 0, "`ray up` failed")
    yield f"ray up: {', '.join(entry.partition(' of ')[0] for entry in cloud.books.open_entries())}"
    head = cloud.head()
    errors = head.add("ray_tpu", NODES)
    expect(not errors, f"the autoscaler could not start nodes: {errors}")
    nodes = [name for name, node in head.nodes().items() if node.node_type == "ray_tpu"]
    states = Counter(node["state"] for node in cloud.books.nodes.values())
    expect(states == {"READY": NODES} == {"READY": len(nodes)}, f"the nodes are {states}, Ray counts {len(nodes)}")
    yield f"autoscaler: {NODES} TPU nodes are READY"
    head.install(nodes[0])
    yield f"installer: {nodes[0].rpartition('/')[2]} is {cloud.books.nodes[nodes[0]]['labels']['ray-node-status']}"
    cloud.books.preempt(nodes[1])
    expect(nodes[1] not in head.nodes(), "a preempted node counts as alive")
    expect(not head.remove(nodes[0]), "a node could not be removed")
    yield "autoscaler: one node is removed, one was preempted"
    expect(cloud.down(file) == 0, "`ray down` failed")
    leftovers.clear(file)
    entries = list(cloud.books.open_entries())
    expect(not entries, f"these are left: {entries}")
    methods = Counter(method for method, _ in cloud.books.calls)
    yield f"ray down: nothing is left; {methods.total()} API calls of {len(methods)} methods"


@contextlib.contextmanager
def output_into(log: IO[str]) -> Iterator[None]:
    """Sends what this process and its children print to a file. Ray asks its streams for their file descriptors."""
    sys.stdout.flush()
    kept = [os.dup(number) for number in (1, 2)]
    try:
        for number in (1, 2):
            os.dup2(log.fileno(), number)
        yield
    finally:
        sys.stdout.flush()
        for number, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, number)
            os.close(copy)


def rehearse(source: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as folder, tempfile.TemporaryFile("w+") as log:
        with rehearsing(Path(folder)) as cloud:
            steps = walk(cloud, source)
            try:
                while True:
                    with output_into(log):
                        step = next(steps)
                    print(f"{source.name}: {step}", flush=True)
            except StopIteration:
                return
            except UserError:
                log.seek(0)
                print("".join(log.readlines()[-LAST_LINES:]), end="", file=sys.stderr)
                raise


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="cluster files (default: all of this repository)")
    parser.add_argument("--hosts", choices=ACTS, help="with hosts, which needs root: what is played with each file")
    parser.add_argument("--transcript", type=Path, default=ROOT / ".run/rehearsal.txt", help="with hosts: of commands")
    arguments = parser.parse_args()
    files = arguments.files or [ROOT / "cluster.yaml", *sorted((ROOT / "configs").glob("cluster-*.yaml"))]
    if arguments.hosts:
        full.rehearse(files, arguments.transcript, ACTS[arguments.hosts])
        return
    logging.disable(logging.WARNING)
    for source in files:
        rehearse(source)


if __name__ == "__main__":
    run_command(main)
