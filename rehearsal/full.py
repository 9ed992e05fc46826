"""Rehearsals with hosts: what a user does with a cluster file, from `make up` to `make down`, and what Google does.

The first half is for any cluster file. The second has a changed config, load, a stock-out, maintenance, new code and a
preemption. rehearsal/faults.py has another play.
"""

import signal
import sys
from collections.abc import Callable
from pathlib import Path

from cluster import ROOT
from cluster.cli import UserError
from rehearsal.books import Fault, stock_out
from rehearsal.stage import Stage, stage

Act = Callable[[Stage, str, str], None]  # takes CLUSTER=... and CONFIG=... too
CREATE, LIST = "tpu.projects.locations.nodes.create", "tpu.projects.locations.nodes.list"
CREATION_S = 2.0
AUTOSCALER_LOG = "/tmp/ray/session_latest/logs/monitor.log"
SOLD_OUT = "There is no more capacity in the zone"
LOAD = "--duration 120 --settle 400 --field num_inference_steps=30 --no-checks"  # 32 clients: a backlog of 10 s or more
SCALED = "most replicas 2, on nodes 2; in the end 1 on 1"  # of the load test's summary
STEPS = {"num_inference_steps: 20 ": "num_inference_steps: 8 "}
NEW_CODE = {'"Software": "imagine-tpu"': '"Software": "imagine-tpu 2"'}  # in a picture's metadata
# Of the config: a replica takes the host's chips and computes on its processor, one picture at a time. The folder of
# programs is one that the hosts share, so that only the first replica compiles.
CHANGES = {
    "          num_cpus: 1 ": "          runtime_env: {env_vars: {JAX_PLATFORMS: cpu}}\n          num_cpus: 1 ",
    "batch_buckets: [1, 2, 4] ": "batch_buckets: [1] ",
    "programs: .cache/programs ": "programs: /mnt/image/programs ",
    "          max_replicas: 4 ": "          max_replicas: 2 ",
    "          target_ongoing_requests: 8 ": "          target_ongoing_requests: 4 ",
}
IDLE = {"idle_timeout_minutes: 10 ": "idle_timeout_minutes: 0.5 "}  # of the cluster file


def rehearse(files: list[Path], transcript: Path, act: Act) -> None:
    """Plays the act with each cluster file. Raises UserError where it fails or leaves something."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all is removed
    transcript.parent.mkdir(parents=True, exist_ok=True)
    with transcript.open("w") as log:
        for source in files:
            log.write(f"\n# {source.name}\n")
            with stage(log) as scene:
                play(scene, source, act)
    print(f"Nothing is left. The transcript is {transcript}.")


def play(scene: Stage, source: Path, act: Act) -> None:
    scene.books.faults.append(Fault(CREATE, takes_s=CREATION_S))
    cluster = scene.desk.cluster_file(source, scene.project)
    change(cluster, IDLE)
    file, config = f"CLUSTER={cluster}", f"CONFIG={without_tpu(scene.desk.folder)}"
    try:
        act(scene, file, config)
    except UserError:
        scene.make("attach", file, f"CMD=tail -n 200 {AUTOSCALER_LOG}", may_fail=True)  # the reason may be there
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
    expect(started <= set(scene.books.nodes), "the autoscaler replaced a TPU node that was well")


def whole(scene: Stage, file: str, config: str) -> None:
    first_half(scene, file, config)
    scene.first_line("monitor", file, with_text="monitor.log")
    scene.make("logs", file)
    scene.make("job", file, "JOB=fetch_weights", "ARGS=assets/demo-model --out weights/demo")
    scene.make("jobs", file)
    change(Path(config.partition("=")[2]), STEPS)
    scene.make("deploy", file, config)
    expect(scene.picture(file, "a+red+house").info["num_inference_steps"] == "8", "the changed config is not deployed")
    load(scene, file)
    maintenance(scene, file, config)
    new_code(scene, file, config)
    preemption(scene, file, config)
    scene.make("attach", file, "CMD=ray status")
    scene.make("undeploy", file)


def load(scene: Stage, file: str) -> None:
    """Load that one replica does not hold has the autoscaler add a TPU node, at the second try, and remove one after.

    The load test sees both: it ends when replicas and nodes are as before.
    """
    scene.await_nodes(lambda _: len(scene.books.nodes) == 1, "One TPU node is there, as before the deploy")
    sold_out, busy = stock_out(CREATE, 1), Fault(LIST, 2, answer=503)
    with scene.tunnel(file) as (dashboard, api):
        scene.books.faults[:0] = [sold_out, busy]
        arguments = f"ARGS={LOAD} --dashboard {dashboard} --out {scene.folder / 'reports'}"
        output = scene.make("loadtest", "SCENARIO=scale-up", f"URL={api}", arguments)
    expect(SCALED in output, "the load test did not see a second replica and node come and go")
    expect(not sold_out.times and not busy.times, "the autoscaler did not meet the stock-out and Google's 503")
    scene.make("attach", file, f"CMD=grep -o -m 1 '{SOLD_OUT}' {AUTOSCALER_LOG}")


def maintenance(scene: Stage, file: str, config: str) -> None:
    (node,) = scene.nodes()
    scene.maintain(node)
    scene.await_nodes(lambda nodes: nodes and node not in nodes, "Another TPU node has taken its place")
    scene.make("deploy", file, config)  # waits until the replica is ready
    scene.picture(file, "a+blue+boat")


def new_code(scene: Stage, file: str, config: str) -> None:
    """Nodes get changed code when they start, so the cluster starts anew."""
    change(scene.project / "app/serving/image_metadata.py", NEW_CODE)
    scene.make("down", file)
    scene.make("up", file)
    scene.await_nodes(bool, "The autoscaler has set up a TPU node")
    scene.make("deploy", file, config)
    software = scene.picture(file, "a+green+tree").info["Software"]
    expect(software == "imagine-tpu 2", f"the replica runs old code, as its pictures are by {software}")
    scene.say(f"The picture is by {software}: the new code")


def preemption(scene: Stage, file: str, config: str) -> None:
    (node,) = scene.nodes()
    scene.preempt(node)
    scene.await_nodes(lambda nodes: nodes - {node}, "Another TPU node has taken its place")
    scene.make("deploy", file, config)
    scene.picture(file, "a+white+cat")


def expect(condition: object, sentence: str) -> None:
    if not condition:
        raise UserError(f"The rehearsal failed: {sentence}.")


def change(file: Path, lines: dict[str, str]) -> None:
    text = file.read_text()
    for shipped, changed in lines.items():
        assert text.count(shipped) == 1, shipped
        text = text.replace(shipped, changed)
    file.write_text(text)


def without_tpu(folder: Path) -> Path:
    """The config whose delays are seconds, for hosts without a TPU."""
    file = folder / "serve_config.yaml"
    file.write_text((ROOT / "configs/quick-scaling.yaml").read_text())
    change(file, CHANGES)
    return file
