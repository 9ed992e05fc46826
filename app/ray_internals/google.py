"""Google Cloud as Ray's launcher uses it: its errors as sentences, and all machines of a cluster in any state.

Ray's own lists leave out machines that are stopping, stopped or preempted.
"""

import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from ray.autoscaler._private.providers import _get_node_provider
from ray.autoscaler._private.util import prepare_config
from ray.autoscaler.tags import TAG_RAY_CLUSTER_NAME

TRIES = 5  # after the first, of what may be asked twice: about half a minute, as each pause is twice as long
LEAVING = ("DELETING", "STOPPING")
NETWORK = (ConnectionError, TimeoutError, socket.gaierror, ssl.SSLError)


@dataclass(frozen=True)
class Machine:
    name: str  # of a TPU node: a path
    state: str
    is_tpu: bool

    @property
    def leaving(self) -> bool:
        return self.state in LEAVING

    def __str__(self) -> str:
        return f"{self.name.rpartition('/')[2]} ({self.state})"


def retry_reads_and_deletes() -> None:
    """Has Google's client repeat a GET or DELETE that is answered 429 or 5xx. Ray's launcher never does.

    A POST is not repeated: the first may have started a machine.
    """
    if not find_spec("googleapiclient"):  # a cluster elsewhere does without Google's client
        return
    from googleapiclient.http import HttpRequest

    execute = HttpRequest.execute
    if getattr(execute, "retries", False):
        return

    def patient(request: Any, http: Any = None, num_retries: int = 0) -> Any:
        retries = TRIES if request.method in ("GET", "DELETE") else num_retries
        return execute(request, http=http, num_retries=retries)

    vars(patient)["retries"] = True
    HttpRequest.execute = patient


def sentence(error: BaseException) -> str:
    """What Google or the way to it refuses, in one line; empty for an error of another kind."""
    if not find_spec("googleapiclient"):
        return ""
    from google.auth.exceptions import GoogleAuthError
    from googleapiclient.errors import HttpError

    if isinstance(error, HttpError):
        advice = " Run the same command again later." if error.resp.status >= 429 else ""
        return f"Google Cloud answers {error.resp.status}: {line(error.reason)}{advice}"
    if isinstance(error, GoogleAuthError):
        return f"Google's credentials do not work ({line(error)}): gcloud auth application-default login"
    if isinstance(error, NETWORK) or type(error).__module__.startswith("httplib2"):
        return f"Google Cloud cannot be reached: {line(error)}"
    if error.args and isinstance(error.args[0], dict):  # Ray raises the error of an operation as it is
        details = error.args[0].get("errors") or [error.args[0]]
        texts = [f"{detail.get('code', '')} {detail.get('message', '')}".strip() for detail in details]
        return f"Google Cloud could not do it: {line(' '.join(texts))}"
    return ""


def line(text: object) -> str:
    words = " ".join(str(text).split())
    return words if words.endswith(".") else f"{words}."


class Machines:
    """All machines that Google lists with the name of a cluster, in its zone."""

    def __init__(self, cluster: dict[str, Any]) -> None:
        config = prepare_config(cluster)
        place, self.cluster_name = config["provider"], config["cluster_name"]
        self.provider = _get_node_provider({**place, "_has_tpus": True}, self.cluster_name)
        self.project, self.zone = place["project_id"], place["availability_zone"]

    def __iter__(self) -> Iterator[Machine]:
        from ray.autoscaler._private.gcp.node import GCPNodeType

        resources = self.provider.resources
        instances = resources[GCPNodeType.COMPUTE].resource.instances()
        request = instances.list(
            project=self.project, zone=self.zone, filter=f"(labels.{TAG_RAY_CLUSTER_NAME} = {self.cluster_name})"
        )
        while request:
            page = request.execute()
            yield from (Machine(item["name"], item["status"], False) for item in page.get("items", ()))
            request = instances.list_next(request, page)
        nodes = resources[GCPNodeType.TPU].resource.projects().locations().nodes()
        request = nodes.list(parent=f"projects/{self.project}/locations/{self.zone}")
        while request:
            page = request.execute()
            for item in page.get("nodes", ()):
                if item.get("labels", {}).get(TAG_RAY_CLUSTER_NAME) == self.cluster_name:
                    yield Machine(item["name"], item["state"], True)
            request = nodes.list_next(request, page)

    def delete(self, machine: Machine) -> None:
        """Asks Google to delete it, and does not wait."""
        from ray.autoscaler._private.gcp.node import GCPNodeType

        kind = GCPNodeType.TPU if machine.is_tpu else GCPNodeType.COMPUTE
        self.provider.resources[kind].delete_instance(machine.name, wait_for_operation=False)
