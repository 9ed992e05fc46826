"""rehearsal/metadata.py answers what Ray, Google's client and our watcher ask a machine's metadata server."""

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from cluster.node_watcher import ask
from rehearsal.metadata import Metadata, Server

VALUES = {
    "service-account": "sa@my-project.iam.gserviceaccount.com",
    "instance/attributes/accelerator-type": "v5litepod-4",
}


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(Metadata(VALUES, lambda: {"access_token": "ya29.x"}), ("127.0.0.1", 0))
    yield server
    server.shutdown()
    server.server_close()


def get(server: Server, path: str, flavor: str = "Google") -> tuple[int, str]:
    url = f"http://127.0.0.1:{server.server_port}/computeMetadata/v1/{path}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": flavor} if flavor else {})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_a_machine_learns_its_tpu_and_gets_tokens_of_its_account(server: Server) -> None:
    assert get(server, "instance/attributes/accelerator-type") == (200, "v5litepod-4")
    assert json.loads(get(server, "instance/service-accounts/default/?recursive=true")[1])["email"].startswith("sa@")
    status, text = get(server, "instance/service-accounts/default/token?scopes=x")
    assert (status, json.loads(text)) == (200, {"access_token": "ya29.x"})
    assert get(server, "instance/attributes/nothing")[0] == 404
    assert get(server, "instance/preempted", flavor="")[0] == 403


def test_our_watcher_hears_of_a_preemption_at_once(server: Server) -> None:
    url = f"http://127.0.0.1:{server.server_port}/computeMetadata/v1/instance"
    value, tag = ask(url, "preempted", "0")
    assert value == "FALSE"
    heard: list[str] = []
    listener = threading.Thread(target=lambda: heard.append(ask(url, "preempted", tag)[0]))
    listener.start()
    server.metadata.set("instance/preempted", "TRUE")
    listener.join(10)
    assert heard == ["TRUE"]
