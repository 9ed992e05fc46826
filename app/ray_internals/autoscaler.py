"""Private parts of Ray's autoscaler and cluster launcher (`ray up`)."""

import importlib
import subprocess
from importlib.util import find_spec
from typing import Any

from ray.autoscaler._private import commands
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider
from ray.autoscaler._private.kuberay.utils import gke_tpu_accelerator_to_generation as GKE_ACCELERATORS
from ray.autoscaler._private.providers import _get_node_provider
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.tags import NODE_KIND_HEAD, TAG_RAY_NODE_KIND

__all__ = [
    "GKE_ACCELERATORS",  # Google Kubernetes Engine's label of a TPU -> Ray's name of its generation
    "GOOGLE_HEAD_NAME",
    "GOOGLE_NAME_SUFFIX",
    "GOOGLE_WORKER_NAME",
    "PROVIDER_KEYS",
    "FakeMultiNodeProvider",  # a node provider whose nodes are raylets of one machine
    "check_google_node_type",
    "prepare_config",  # a cluster file with Ray's defaults filled in
    "ssh_command",
    "validate_config",  # raises where `ray up` would refuse a prepared file
]

# Keys of `provider` that Ray reads and its schema does not list (autoscaler/_private/updater.py, constants.py).
PROVIDER_KEYS = (
    *("use_external_head_ip", "disable_launch_config_check", "foreground_node_launch"),
    "worker_liveness_check",
)
# A machine's name on Google Cloud, with the cluster's name in it (autoscaler/_private/gcp/node.py).
GOOGLE_HEAD_NAME, GOOGLE_WORKER_NAME, GOOGLE_NAME_SUFFIX = "ray-{}-head", "ray-{}-worker", "-01234567"


def check_google_node_type(node_config: dict[str, Any]) -> None:
    """Raises where Ray's launcher takes this for no node of Google's. Without Google's client it checks nothing."""
    if find_spec("googleapiclient"):
        importlib.import_module("ray.autoscaler._private.gcp.config").get_node_type(dict(node_config))


def ssh_command(cluster: dict[str, Any], file: str, timeout_s: int) -> tuple[list[str], str] | None:
    """The ssh options and the target by which Ray's launcher reaches a cluster's head, or None if no head is up.

    Raises whatever Ray, Google's client or the network raise.
    """
    prepared = prepare_config(cluster)
    lookup = _get_node_provider(prepared["provider"], prepared["cluster_name"])
    if not lookup.non_terminated_nodes({TAG_RAY_NODE_KIND: NODE_KIND_HEAD}):
        return None  # before Ray makes an account and an SSH key in the user's project, as it does to bootstrap
    config = commands._bootstrap_config(cluster)
    provider = _get_node_provider(config["provider"], config["cluster_name"])
    head = commands._get_running_head_node(config, file, None, _provider=provider, _allow_uninitialized_state=True)
    internal = bool(config["provider"].get("use_internal_ips"))
    runner = provider.get_command_runner("", head, config["auth"], config["cluster_name"], subprocess, internal)
    options = runner.ssh_options.to_ssh_options_list(timeout=timeout_s)
    return options, f"{runner.ssh_user}@{runner._get_ssh_target()}"
