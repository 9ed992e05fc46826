"""A rehearsal without hosts: Ray's launcher and autoscaler call the simulated Google Cloud, and every host obeys.

Real are the launcher (`ray up`, `ray down`), Ray's node provider, the autoscaler's adapter to it and its installer.
Simulated are Google's APIs, and `ssh` and `rsync`, which succeed without a host. Waits pass at once.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster.remote.launcher import run
from rehearsal.accounts import token_for
from rehearsal.books import Books, Project
from rehearsal.clock import Clock, waits_pass
from rehearsal.cloud import Cloud
from rehearsal.desk import PROJECT, Desk
from rehearsal.ray_parts import FileConfigReader, Instance, NodeProviderAdapter, RayInstaller, node_provider
from rehearsal.server import serving

HEAD_ACCOUNT = f"serviceAccount:ray-autoscaler-sa-v1@{PROJECT}.iam.gserviceaccount.com"


@dataclass
class Rehearsal:
    books: Books
    clock: Clock
    desk: Desk

    def up(self, file: Path) -> int:
        return run(["up", "--yes", "--no-config-cache", str(file), "--log-style=pretty", "--log-color=false"])

    def down(self, file: Path) -> int:
        return run(["down", "--yes", str(file), "--log-style=pretty", "--log-color=false"])

    def head(self) -> "Head":
        return Head(self, yaml.safe_load((self.desk.head / "ray_bootstrap_config.yaml").read_text()))


class Head:
    """Ray's autoscaler as it works on the head: with the file that `ray up` left there, as the head's account."""

    def __init__(self, rehearsal: Rehearsal, config: dict[str, Any]) -> None:
        token = token_for(rehearsal.books, HEAD_ACCOUNT)["access_token"]
        config = copy.deepcopy(config)
        config["provider"]["gcp_credentials"] = {"type": "credentials_token", "credentials": token}
        config["auth"]["ssh_private_key"] = str(rehearsal.desk.head / "ray_bootstrap_key.pem")
        config["file_mounts"] = {}  # Ray reads them where `ray up` copied them to, and here they are nowhere
        self.config = config
        self.file = rehearsal.desk.folder / "head.yaml"
        self.file.write_text(yaml.safe_dump(config))
        self.provider = node_provider(config["provider"], config["cluster_name"])

    def add(self, node_type: str, count: int = 1) -> list[str]:
        """Launches nodes as the autoscaler does. Returns what it logs of failures."""
        adapter = self._adapter()
        adapter._launch_nodes_by_type(node_type, count, "0f0f0f0f")
        return [str(error.__cause__) for error in adapter.poll_errors()]

    def nodes(self) -> dict[str, Any]:
        """Nodes that the autoscaler counts, by their names at Google."""
        return dict(self._adapter().get_non_terminated())

    def install(self, name: str) -> None:
        """Sets a node up: Ray's updater labels it at each stage."""
        config = FileConfigReader(str(self.file)).get_cached_autoscaling_config()
        node_type = self.nodes()[name].node_type
        instance = Instance(cloud_instance_id=name, instance_type=node_type)
        RayInstaller(refreshed(self.provider), config).install_ray(instance, "10.128.0.2")

    def remove(self, *names: str) -> list[str]:
        adapter = self._adapter()
        adapter._do_terminate(list(names), "1f1f1f1f")
        return [str(error.__cause__) for error in adapter.poll_errors()]

    def _adapter(self) -> Any:
        return NodeProviderAdapter(self.provider, FileConfigReader(str(self.file)))


def refreshed(provider: Any) -> Any:
    """The provider, with tags that are fresh, as the autoscaler's loop asks Google for all nodes every few seconds.

    Ray's installer reads a node's tags from the provider's cache just after it changed them. Where the loop does not
    come in between, it takes a node that is ready for one that failed, and starts Ray there again.
    """
    fresh = copy.copy(provider)

    def node_tags(name: str) -> Any:
        provider.non_terminated_nodes({})
        return provider.node_tags(name)

    fresh.node_tags = node_tags
    return fresh


@contextmanager
def rehearsing(folder: Path) -> Iterator[Rehearsal]:
    """A desk and a Google Cloud in a folder. This process is at that desk while the block runs."""
    clock = Clock()
    books = Books(Project(PROJECT), clock.time)
    folder.mkdir(exist_ok=True)
    with serving(Cloud(books), folder) as google:
        desk = Desk(folder / "desk")
        with desk.environment(google), waits_pass(clock):
            yield Rehearsal(books, clock, desk)
