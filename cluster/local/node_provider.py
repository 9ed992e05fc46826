"""The node provider of the local cluster: starts and ends nodes on this machine as Ray's autoscaler requests.

It runs in the autoscaler's process. It also imitates Google Cloud's stock-outs and preemptions, with the probabilities
in the autoscaler's config file.

A node is a real raylet with a watcher beside it (cluster/node_watcher.py), as on Google Cloud. All processes inherit
the cluster's mark, so `make down` finds them even if this process has died. Knows nothing of Serve.
"""

import copy
import logging
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml
from ray.autoscaler.tags import (
    NODE_KIND_WORKER,
    STATUS_UP_TO_DATE,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

from app.ray_internals.autoscaler import FakeMultiNodeProvider
from app.ray_internals.core import PROCESS_TYPE_RAYLET, Node, RayParams
from cluster import auth_token
from cluster.local.autoscaler_config import Timings
from cluster.local.metadata_server import Metadata

logger = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 128 << 20  # small, as several nodes share a laptop's memory
NOTICE_S = 30.0  # Google's notice before it preempts a spot machine
GRACE_S = 3.0  # for a node to end by itself
LOOK_S = 1.0


class OutOfStock(Exception):
    """A launch failure. Its message is like Google's, so that the autoscaler reports both alike."""


class LocalNodeProvider(FakeMultiNodeProvider):
    _nodes: dict[str, dict[str, Any]]

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        self.config_file = Path(provider_config["config_file"])
        self.gcs_address = str(provider_config["gcs_address"])
        self._nodes[self._head_node_id]["tags"][TAG_RAY_USER_NODE_TYPE] = provider_config["head_node_type"]
        self.preempted: dict[str, float] = {}  # node -> when it ends; notices come from HTTP threads
        self.preempted_lock = threading.Lock()
        sent, _ = auth_token.of_this_process()
        self.metadata = Metadata(self.workers, self.preempt, sent)
        self.metadata_port = int(provider_config["metadata_port"])
        self.server = self.metadata.serve(self.metadata_port)
        threading.Thread(target=self.preempt_forever, daemon=True).start()

    def timings(self) -> Timings:
        return Timings(**yaml.safe_load(self.config_file.read_text())["provider"]["timings"])

    def workers(self) -> list[str]:
        with self.lock:
            return [node_id for node_id in self._nodes if node_id != self._head_node_id]

    # Called by the autoscaler

    def create_node_with_resources_and_labels(
        self,
        node_config: dict[str, Any],
        tags: dict[str, str],
        count: int,
        resources: dict[str, float],
        labels: dict[str, str],
    ) -> None:
        time.sleep(self.timings().launch_s)
        for _ in range(count):
            if random.random() < self.timings().stock_out:
                raise OutOfStock(f"There is no more capacity for {tags[TAG_RAY_USER_NODE_TYPE]} (STOCK_OUT)")
            self.start(tags, resources, labels)

    def start(self, tags: dict[str, str], resources: dict[str, float], labels: dict[str, str]) -> None:
        # One at a time: raylets that start together on one machine disturb each other.
        with self.lock:
            self._next_node_id += 1
            node_type = tags[TAG_RAY_USER_NODE_TYPE]
            node_id = f"{node_type}-{self._next_node_id}"
            node = Node(
                parameters(node_id, node_type, resources, labels, self.gcs_address),
                shutdown_at_exit=False,
                spawn_reaper=False,
            )
            own = {
                TAG_RAY_NODE_KIND: NODE_KIND_WORKER,
                TAG_RAY_NODE_NAME: node_id,
                TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE,
            }
            self._nodes[node_id] = {"tags": tags | own, "node": node}
            watch(node, f"http://127.0.0.1:{self.metadata_port}/{node_id}")
            logger.info("Started %s", node_id)

    def _terminate_node(self, node: dict[str, Any]) -> None:
        end(node["node"], GRACE_S)

    # What the cloud does by itself

    def preempt_forever(self) -> None:
        while True:
            time.sleep(LOOK_S)
            try:
                self.preempt_some(time.monotonic(), random.random)
            except Exception:
                logger.exception("Preempting nodes failed; trying again")

    def preempt_some(self, now: float, chance: Callable[[], float]) -> None:
        probability = 1 - (1 - self.timings().preemption) ** (LOOK_S / 60)
        for node_id in self.workers():
            if node_id not in self.preempted and chance() < probability:
                self.preempt(node_id)
        for node_id in self.due(now):
            with self.lock:
                if node := self._nodes.pop(node_id, None):  # otherwise the autoscaler has ended it already
                    end(node["node"], grace_s=0)
                    logger.info("Preempted %s", node_id)

    def preempt(self, node_id: str) -> None:
        """Gives a node notice. It ends when the notice has passed."""
        logger.info("Preempting %s in %.0f s", node_id, NOTICE_S)
        with self.preempted_lock:
            self.preempted.setdefault(node_id, time.monotonic() + NOTICE_S)
        self.metadata.take(node_id)

    def due(self, now: float) -> list[str]:
        """Takes out the nodes whose notice has passed."""
        with self.preempted_lock:
            due = [node_id for node_id, when in self.preempted.items() if when <= now]
            for node_id in due:
                del self.preempted[node_id]
        return due


def parameters(
    node_id: str, node_type: str, resources: dict[str, float], labels: dict[str, str], gcs_address: str
) -> RayParams:
    rest = copy.deepcopy(resources)
    return RayParams(
        node_ip_address="127.0.0.1",
        min_worker_port=0,
        max_worker_port=0,
        dashboard_agent_listen_port=0,
        num_cpus=int(rest.pop("CPU", 0)),
        num_gpus=int(rest.pop("GPU", 0)),
        object_store_memory=OBJECT_STORE_BYTES,
        resources=rest,
        labels={**labels, "ray.io/node-group": node_type},  # otherwise the head's, from the environment of this process
        redis_address=gcs_address,
        gcs_address=gcs_address,
        include_log_monitor=False,  # type: ignore[arg-type]  # the head's log monitor reads the same folder
        env_vars={"RAY_CLOUD_INSTANCE_ID": node_id, "RAY_NODE_TYPE_NAME": node_type},
    )


def watch(node: Node, metadata: str) -> None:
    raylet = node.all_processes[PROCESS_TYPE_RAYLET][0].process
    logs = Path(node.get_logs_dir_path())  # type: ignore[no-untyped-call]
    with (logs / "watcher.log").open("a") as log:
        subprocess.Popen(
            [sys.executable, "-m", "cluster.node_watcher", "--raylet", str(raylet.pid), "--metadata", metadata],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ,
        )


def end(node: Node, grace_s: float) -> None:
    """Ends all processes of a node. Without grace they are killed, as if the machine were switched off."""
    processes: list[psutil.Process] = []
    for info in node.all_processes.get(PROCESS_TYPE_RAYLET, ()):
        try:
            raylet = psutil.Process(info.process.pid)
            processes += [raylet, *raylet.children(recursive=True)]
            if grace_s:
                raylet.terminate()  # it ends its workers
        except psutil.NoSuchProcess:
            continue
    _, left = psutil.wait_procs(processes, timeout=grace_s)
    for process in left:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(left, timeout=GRACE_S)
    node.kill_all_processes(check_alive=False, wait=True)
