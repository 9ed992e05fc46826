"""A rehearsal with hosts: the verbs of the Makefile, as a user runs them, against the simulated Google Cloud.

Needs root, Linux namespaces, sshd and rsync. All traffic stays in the namespaces, and all of it is removed at the end.
"""

import io
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from PIL import Image

from cluster import ROOT
from cluster.cli import UserError
from rehearsal import image
from rehearsal.books import Books, Fault, Project
from rehearsal.cloud import Cloud
from rehearsal.desk import PROJECT, Desk
from rehearsal.hosts import NAMES, Hosts
from rehearsal.namespaces import GATEWAYS, Network, call_inside
from rehearsal.server import Server, credentials

PROGRAMS = ("ip", "unshare", "ssh-keygen", "/usr/sbin/sshd", "rsync", "ssh", "curl")
NODE_TIMEOUT_S, POLL_S = 300.0, 2.0
NOTICE_S = 30.0  # from Google's notice to the end of a spot machine
DESK_ADDRESS = "203.0.113.250"
# Runs at the user's desk. $1 is its folder; the rest is a command line.
AT_DESK = """set -e
mount --make-rprivate /
mount --bind "$1/hosts" /etc/hosts
mount --bind /dev/null /etc/resolv.conf
mount -t tmpfs tmpfs /run
shift
exec "$@"
"""


def check() -> None:
    if os.geteuid() != 0 or sys.platform != "linux":
        raise UserError("A rehearsal with hosts needs root on Linux; without: make rehearse-calls")
    if missing := [program for program in PROGRAMS if not shutil.which(program)]:
        raise UserError(f"A rehearsal with hosts needs {', '.join(missing)}.")


class Stage:
    """The simulated Google Cloud with hosts, and the desk of the user in front of it."""

    def __init__(self, folder: Path, network: Network, books: Books, hosts: Hosts, log: IO[str]) -> None:
        self.folder, self.network, self.books, self.hosts, self.log = folder, network, books, hosts, log
        self.desk = Desk(folder / "desk")
        self.namespace = network.join("desk", DESK_ADDRESS)
        names = "".join(f"{GATEWAYS[1]} {name}\n" for name in NAMES)
        (folder / "desk/hosts").write_text(f"127.0.0.1 localhost\n{names}")

    def command(self, *arguments: str) -> list[str]:
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "TERM") if name in os.environ}
        environment = kept | {
            "HOME": str(self.folder / "desk/home"),
            "TMPDIR": str(self.folder / "desk/tmp"),
            "GOOGLE_APPLICATION_CREDENTIALS": str(self.folder / "application_default_credentials.json"),
            "GOOGLE_CLOUD_PROJECT": PROJECT,
            "HTTPLIB2_CA_CERTS": str(self.folder / "certificate.pem"),
        }
        assignments = [f"{name}={value}" for name, value in environment.items()]
        enter = ["ip", "netns", "exec", self.namespace, "unshare", "--mount", "bash", "-c", AT_DESK, "desk"]
        return ["env", "-i", *assignments, *enter, str(self.folder / "desk"), *arguments]

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*arguments),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def make(self, verb: str, *variables: str) -> str:
        """Runs `make` at the desk, notes it in the transcript, and returns the output. Raises UserError if it fails."""
        words = " ".join(shlex.quote(word) for word in (verb, *variables)).replace(f"{self.desk.folder}/", "")
        began, calls = time.monotonic(), len(self.books.calls)
        self.log.write(f"\n$ make {words}\n")
        lines = []
        with self.start("make", f"RUN_DIR={self.folder / 'run'}", verb, *variables) as process:
            try:
                for line in self.lines(process):
                    lines.append(line)
            except BaseException:
                os.killpg(process.pid, signal.SIGTERM)
                raise
        seconds, calls = time.monotonic() - began, len(self.books.calls) - calls
        summary = f"make {words}: exit {process.returncode} after {seconds:.0f} s, {calls} API calls"
        self.log.write(f"# {summary}\n")
        print(summary, flush=True)
        if process.returncode:
            raise UserError(f"The rehearsal failed at `make {words}`: {''.join(lines[-3:]).strip()}")
        return "".join(lines)

    def lines(self, process: subprocess.Popen[str]) -> Iterator[str]:
        """What a process prints, which also goes to the transcript."""
        assert process.stdout
        for line in process.stdout:
            self.log.write(line)
            self.log.flush()
            yield line

    def picture(self, file: str, prompt: str) -> tuple[int, int]:
        """Draws a picture through the SSH tunnel of `make dashboard`. Returns its size in pixels."""
        self.log.write("\n$ make dashboard, and curl beside it\n")
        with self.start("make", f"RUN_DIR={self.folder / 'run'}", "dashboard", file) as tunnel:
            try:
                address = next((line for line in self.lines(tunnel) if "the API at" in line), "")
                url = f"{address.partition('the API at ')[2].strip().rstrip('.')}/imagine?seed=1&prompt={prompt}"
                done = subprocess.run(self.command("curl", "-fsS", url), capture_output=True)
                if done.returncode:
                    raise UserError(f"The rehearsal failed: {url} gives no picture: {done.stderr.decode().strip()}")
                size = Image.open(io.BytesIO(done.stdout)).size
            finally:
                os.killpg(tunnel.pid, signal.SIGINT)
        self.say(f"GET /imagine through the tunnel: a picture of {size[0]}x{size[1]}")
        return size

    def say(self, sentence: str) -> None:
        self.log.write(f"# {sentence}\n")
        print(sentence, flush=True)

    def await_node(self, apart_from: str = "") -> str:
        """Waits until the autoscaler has started a TPU node and set it up. Returns its name."""
        until = time.monotonic() + NODE_TIMEOUT_S
        while time.monotonic() < until:
            with self.books.lock:
                for name, node in self.books.nodes.items():
                    if name != apart_from and node["labels"].get("ray-node-status") == "up-to-date":
                        self.say(f"TPU node {name.rpartition('/')[2]} is set up")
                        return name
            time.sleep(POLL_S)
        raise UserError(f"The rehearsal failed: no TPU node was set up within {NODE_TIMEOUT_S:.0f} s.")

    def preempt(self, node: str) -> None:
        """Takes a node away as Google does: a notice, and half a minute later the end."""
        self.say(f"Google announces that it takes {node.rpartition('/')[2]} away")
        self.books.announce_preemption(node)
        time.sleep(NOTICE_S)
        self.books.preempt(node)
        self.say("The node is gone")


CHANGES = {  # of the shipped config: the replica takes the host's chips and computes on its processor, one by one
    "          num_cpus: 1 ": "          runtime_env: {env_vars: {JAX_PLATFORMS: cpu}}\n          num_cpus: 1 ",
    "batch_buckets: [1, 2, 4] ": "batch_buckets: [1] ",
}


def without_tpu(folder: Path) -> Path:
    """serve_config.yaml for hosts without a TPU."""
    text = (ROOT / "serve_config.yaml").read_text()
    for shipped, changed in CHANGES.items():
        assert text.count(shipped) == 1
        text = text.replace(shipped, changed)
    file = folder / "serve_config.yaml"
    file.write_text(text)
    return file


@contextmanager
def stage(log: IO[str]) -> Iterator[Stage]:
    check()
    disk = image.make()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rehearsal-", ignore_cleanup_errors=True)))
        folder.chmod(0o755)
        network = Network()
        stack.callback(network.close)
        books = Books(Project(PROJECT), time.monotonic)
        server = call_inside(network.cloud, lambda: Server(Cloud(books), folder, disk / "wheels", ("0.0.0.0", 443)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        stack.callback(server.server_close)
        stack.callback(server.shutdown)
        credentials(folder, PROJECT)
        hosts = Hosts(books, network, disk, folder)
        stack.callback(hosts.close)
        books.keeper = hosts
        yield Stage(folder, network, books, hosts, log)


def rehearse(source: Path, transcript: Path) -> None:
    """Brings a cluster up, deploys, draws a picture, loses a TPU node to pre-emption, and takes all down."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all is removed
    transcript.parent.mkdir(parents=True, exist_ok=True)
    with transcript.open("w") as log, stage(log) as scene:
        # A label that is changed at once makes Ray's installer read an old one and start Ray again: rehearsal/calls.py.
        scene.books.faults += [
            Fault(f"tpu.projects.locations.nodes.{verb}", takes_s=2.0) for verb in ("create", "patch")
        ]
        file = f"CLUSTER={scene.desk.cluster_file(source)}"
        scene.make("up", file)
        node = scene.await_node()
        config = f"CONFIG={without_tpu(scene.desk.folder)}"
        scene.make("deploy", file, config)
        scene.make("status", file)
        scene.picture(file, "a+red+house")
        scene.preempt(node)
        scene.await_node(apart_from=node)
        scene.make("attach", file, "CMD=ray status")
        scene.make("down", file)
        if entries := list(scene.books.open_entries()):
            raise UserError(f"The rehearsal failed: these are left: {', '.join(entries)}")
    print(f"Nothing is left. The transcript is {transcript}.")
