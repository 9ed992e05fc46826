"""A rehearsal with hosts: what a user does with a cluster file, from `make up` to `make down`, and what Google does.

The first half is for any cluster file; the second has a job and a pre-emption.
"""

import signal
import sys
from pathlib import Path

from cluster import ROOT
from cluster.cli import UserError
from rehearsal.books import Fault
from rehearsal.stage import Stage, stage

CREATE = "tpu.projects.locations.nodes.create"
CREATION_S = 2.0
MONITOR_LOG = "/tmp/ray/session_latest/logs/monitor.log"  # of the autoscaler
CHANGES = {  # of the config: the replica takes the host's chips and computes on its processor, one picture at a time
    "          num_cpus: 1 ": "          runtime_env: {env_vars: {JAX_PLATFORMS: cpu}}\n          num_cpus: 1 ",
    "batch_buckets: [1, 2, 4] ": "batch_buckets: [1] ",
    "          target_ongoing_requests: 8 ": "          target_ongoing_requests: 4 ",
}


def rehearse(files: list[Path], transcript: Path) -> None:
    """Rehearses each cluster file: the first one whole, and the first half of the others."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all is removed
    transcript.parent.mkdir(parents=True, exist_ok=True)
    with transcript.open("w") as log:
        for source in files:
            log.write(f"\n# {source.name}\n")
            with stage(log) as scene:
                play(scene, source, whole=source == files[0])
    print(f"Nothing is left. The transcript is {transcript}.")


def play(scene: Stage, source: Path, whole: bool) -> None:
    scene.books.faults.append(Fault(CREATE, takes_s=CREATION_S))
    cluster = scene.desk.cluster_file(source, scene.project)
    file, config = f"CLUSTER={cluster}", f"CONFIG={without_tpu(scene.desk.folder)}"
    try:
        first_half(scene, file, config)
        if whole:
            second_half(scene, file)
    except UserError:
        scene.make("attach", file, f"CMD=tail -n 200 {MONITOR_LOG}", may_fail=True)  # the reason may be there
        raise
    scene.make("down", file)
    if entries := list(scene.books.open_entries()):
        raise UserError(f"The rehearsal failed: these are left: {', '.join(entries)}")
    scene.say("The books are empty: no machine, TPU node, address, disk or operation is left")


def first_half(scene: Stage, file: str, config: str) -> None:
    scene.make("up", file)
    started = scene.await_nodes(bool, "The autoscaler has set up a TPU node")
    scene.make("deploy", file, config)
    scene.make("status", file)
    scene.picture(file, "a+red+house")
    if gone := started - set(scene.books.nodes):
        raise UserError(f"The rehearsal failed: the autoscaler replaced TPU nodes that were well: {', '.join(gone)}")


def second_half(scene: Stage, file: str) -> None:
    scene.first_line("monitor", file, with_text="monitor.log")
    scene.make("job", file, "JOB=fetch_weights", "ARGS=assets/demo-model --out weights/demo")
    (node,) = scene.await_nodes(bool, "The TPU node is as it was")
    scene.preempt(node)
    scene.await_nodes(lambda nodes: bool(nodes - {node}), "Another TPU node takes its place")
    scene.make("attach", file, "CMD=ray status")


def change(file: Path, lines: dict[str, str]) -> None:
    text = file.read_text()
    for shipped, changed in lines.items():
        assert text.count(shipped) == 1, shipped
        text = text.replace(shipped, changed)
    file.write_text(text)


def without_tpu(folder: Path) -> Path:
    """serve_config.yaml for hosts without a TPU."""
    file = folder / "serve_config.yaml"
    file.write_text((ROOT / "serve_config.yaml").read_text())
    change(file, CHANGES)
    return file
