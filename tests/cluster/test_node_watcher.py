"""cluster/node_watcher.py with a fake metadata server that speaks HTTP, and a fake raylet that is a process."""

import json
import logging
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import psutil
import pytest
from ray.scripts.scripts import drain_node

from cluster import ROOT, node_watcher
from cluster.cli import UserError

PATIENCE_S = 30.0
# In the place of Ray's command line: hands its arguments to the server below, and fails if that says so.
FAKE_RAY = """
import json, sys, urllib.error, urllib.request
try:
    urllib.request.urlopen(sys.argv[1] + "/drained", json.dumps(sys.argv[2:]).encode()).close()
except urllib.error.HTTPError as error:
    sys.exit("Error: " + error.read().decode())
"""


class Metadata(ThreadingHTTPServer):
    """A fake of Google's metadata server, with a path for FAKE_RAY."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.changed = threading.Condition()
        self.values = {"preempted": "FALSE", "maintenance-event": "NONE"}
        self.tags = dict.fromkeys(self.values, "1")
        self.requests: list[tuple[str, str]] = []  # (key, last_etag)
        self.failures: dict[str, int] = {}  # path -> how often it is still to fail
        self.drained: queue.Queue[str] = queue.Queue()

    def set(self, key: str, value: str) -> None:
        with self.changed:
            self.values[key], self.tags[key] = value, str(int(self.tags[key]) + 1)
            self.changed.notify_all()

    def seen(self, key: str) -> None:
        """Waits until the watcher has the current value of a key, and so asks for a newer one."""
        with self.changed:
            assert self.changed.wait_for(lambda: (key, self.tags[key]) in self.requests, PATIENCE_S)


class Answer(BaseHTTPRequestHandler):
    server: Metadata

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        key, query = url.path.rpartition("/")[2], {name: values[0] for name, values in parse_qs(url.query).items()}
        if self.headers["Metadata-Flavor"] != "Google" or query["wait_for_change"] != "true":
            return self.answer(403, "")
        with self.server.changed:
            self.server.requests.append((key, query["last_etag"]))
            self.server.changed.notify_all()
            if self.fails(key):
                return self.answer(503, "")
            self.server.changed.wait_for(
                lambda: self.server.tags[key] != query["last_etag"], float(query["timeout_sec"])
            )
            self.answer(200, self.server.values[key], self.server.tags[key])

    def do_POST(self) -> None:
        arguments = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if self.fails("drained"):
            return self.answer(409, "The drain request is not accepted: not now")
        self.answer(200, "")
        self.server.drained.put(arguments)

    def fails(self, what: str) -> bool:
        left = self.server.failures.get(what, 0)
        self.server.failures[what] = left - 1
        return left > 0

    def answer(self, status: int, body: str, tag: str = "") -> None:
        self.send_response(status)
        self.send_header("ETag", tag)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    server = Metadata()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[node_watcher.Node]:
    """A process with the name and the arguments of a raylet."""
    (tmp_path / "raylet").symlink_to(Path(sys.executable).resolve())
    program = "print(flush=True); import time; time.sleep(600)"
    command = [str(tmp_path / "raylet"), "-S", "-c", program, "--node_id=abc123", "--gcs-address=10.0.0.2:6379"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline()
        yield node_watcher.this_node(process.pid)
        process.kill()


@pytest.fixture
def watching(
    metadata: Metadata, node: node_watcher.Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], threading.Thread]]:
    """Starts the watcher. At the end the raylet is killed, and the watcher must end too."""
    monkeypatch.setattr(node_watcher, "PAUSE_S", 0.02)
    (tmp_path / "ray.py").write_text(FAKE_RAY)
    ray = [sys.executable, "-S", str(tmp_path / "ray.py"), metadata.address]
    thread = threading.Thread(target=node_watcher.watch, args=(node, metadata.address, ray))

    def start() -> threading.Thread:
        thread.start()
        return thread

    yield start
    node.raylet.kill()
    if thread.ident:
        thread.join(PATIENCE_S)
    assert not thread.is_alive()


def arguments(metadata: Metadata) -> dict[str, str]:
    """The arguments of the next drain."""
    command, *options = json.loads(metadata.drained.get(timeout=PATIENCE_S))
    assert command == "drain-node"
    return {name.removeprefix("--"): value for name, _, value in (option.partition("=") for option in options)}


def test_a_preempted_node_is_drained_within_the_half_minute_that_google_leaves(
    metadata: Metadata, watching: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # the metadata server is never behind one
    monkeypatch.setenv("no_proxy", "127.0.0.1:9")
    watching()
    metadata.seen("preempted")
    monkeypatch.delenv("http_proxy")  # for FAKE_RAY, which tells by HTTP too
    metadata.set("preempted", "TRUE")
    drain = arguments(metadata)
    assert 0 < int(drain.pop("deadline-remaining-seconds")) <= 30
    assert drain == {
        "address": "10.0.0.2:6379",
        "node-id": "abc123",
        "reason": "DRAIN_NODE_REASON_PREEMPTION",
        "reason-message": "Google Cloud takes this spot machine back",
    }


def test_a_machine_that_was_preempted_before_the_watcher_began_is_drained(
    metadata: Metadata, watching: Callable[[], object]
) -> None:
    metadata.set("preempted", "TRUE")
    watching()
    assert arguments(metadata)["node-id"] == "abc123"


def test_maintenance_that_ends_the_machine_drains_and_that_which_moves_it_does_not(
    metadata: Metadata, watching: Callable[[], object]
) -> None:
    watching()
    metadata.set("maintenance-event", "MIGRATE_ON_HOST_MAINTENANCE")
    metadata.seen("maintenance-event")
    assert metadata.drained.empty()
    metadata.set("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")
    drain = arguments(metadata)
    assert 30 < int(drain["deadline-remaining-seconds"]) <= 60
    assert drain["reason-message"] == "Google Cloud stops this machine to maintain it"


def test_a_notice_drains_once_and_a_new_one_again(
    metadata: Metadata, watching: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_watcher, "WAIT_S", 0)  # so the server answers the same again and again
    metadata.set("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")
    watching()
    arguments(metadata)
    with metadata.changed:
        requests = len(metadata.requests)
        assert metadata.changed.wait_for(lambda: len(metadata.requests) > requests + 5, PATIENCE_S)
    assert metadata.drained.empty()
    metadata.set("maintenance-event", "NONE")
    metadata.seen("maintenance-event")
    metadata.set("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")
    arguments(metadata)


def test_a_metadata_server_that_fails_is_asked_until_it_answers(
    metadata: Metadata, watching: Callable[[], object], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "cluster.node_watcher")
    metadata.failures["preempted"] = 3
    metadata.set("preempted", "TRUE")
    watching()
    arguments(metadata)
    messages = [message for message in caplog.messages if message.startswith("preempted ")]
    messages = [
        message for message in messages if "refused" not in message
    ]  # listeners of earlier tests, whose server is gone
    assert messages == [
        "preempted cannot be read. Trying again: HTTP Error 503: Service Unavailable",
        "preempted is TRUE",
    ]


def test_a_drain_that_fails_is_tried_again_and_its_reason_logged(
    metadata: Metadata, watching: Callable[[], object], caplog: pytest.LogCaptureFixture
) -> None:
    metadata.failures["drained"] = 2
    metadata.set("preempted", "TRUE")
    watching()
    arguments(metadata)
    failed = [message for message in caplog.messages if "failed" in message]
    assert failed == ["ray drain-node failed. Trying again: Error: The drain request is not accepted: not now"] * 2


def test_the_watcher_ends_with_ray(
    metadata: Metadata, watching: Callable[[], threading.Thread], node: node_watcher.Node
) -> None:
    thread = watching()
    metadata.seen("preempted")
    assert thread.is_alive()
    node.raylet.kill()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


def test_the_watcher_ends_with_ray_though_it_could_not_drain(
    metadata: Metadata,
    watching: Callable[[], threading.Thread],
    node: node_watcher.Node,
    caplog: pytest.LogCaptureFixture,
) -> None:
    metadata.failures["drained"] = 1000
    metadata.set("preempted", "TRUE")
    thread = watching()
    metadata.seen("preempted")
    node.raylet.kill()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


def test_a_pod_that_leaves_drains_its_node_and_waits_until_ray_has_ended(
    metadata: Metadata, node: node_watcher.Node, tmp_path: Path
) -> None:
    (tmp_path / "ray.py").write_text(FAKE_RAY)
    ray = [sys.executable, "-S", str(tmp_path / "ray.py"), metadata.address]
    thread = threading.Thread(target=node_watcher.leave, args=(node, 150, ray))
    thread.start()
    drain = arguments(metadata)
    assert 120 < int(drain["deadline-remaining-seconds"]) <= 150
    assert drain["reason-message"] == "Kubernetes ends this pod"
    assert thread.is_alive()
    node.raylet.kill()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


def test_the_node_is_read_from_the_raylets_command_line(node: node_watcher.Node) -> None:
    assert (node.node_id, node.gcs_address) == ("abc123", "10.0.0.2:6379")


def test_no_raylet_or_several_is_told_in_a_sentence(node: node_watcher.Node, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="1 is no raylet."):
        node_watcher.this_node(1)
    monkeypatch.setattr(psutil, "process_iter", lambda: iter([]))
    with pytest.raises(UserError, match="No raylet runs here. Start Ray before its watcher."):
        node_watcher.this_node(None)
    monkeypatch.setattr(psutil, "process_iter", lambda: iter([node.raylet, node.raylet]))
    with pytest.raises(UserError, match=r"Several raylets run here \(\d+, \d+\). Name one: --raylet PID"):
        node_watcher.this_node(None)


def test_rays_own_command_line_takes_the_drain(node: node_watcher.Node) -> None:
    command = node_watcher.drain_command(node, "Google Cloud takes this spot machine back", 29.2, node_watcher.RAY)
    assert command[: len(node_watcher.RAY)] == list(node_watcher.RAY) and command[len(node_watcher.RAY)] == "drain-node"
    context = drain_node.make_context("drain-node", command[len(node_watcher.RAY) + 1 :])
    assert context.params["deadline_remaining_seconds"] == 30
    assert context.params["node_id"] == "abc123"


def test_the_module_runs_by_itself_and_says_what_is_wrong_in_one_line() -> None:
    command = [sys.executable, "-m", "cluster.node_watcher", "--raylet", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "1 is no raylet.\n")
