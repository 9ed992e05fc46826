"""The simulated Google Cloud with hosts, and a user's desk in front of it, whose every `make` is noted in a transcript.

Needs root, Linux namespaces, sshd and rsync. All traffic stays in the namespaces, and all of it is removed at the end.
"""

import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from PIL import Image

from cluster import ROOT
from cluster.cli import UserError
from rehearsal import image
from rehearsal.books import Books, Project
from rehearsal.cloud import Cloud
from rehearsal.desk import PROJECT, Desk
from rehearsal.hosts import NAMES, Hosts
from rehearsal.namespaces import GATEWAYS, Network, call_inside
from rehearsal.server import Server, credentials

PROGRAMS = ("ip", "unshare", "ssh-keygen", "/usr/sbin/sshd", "rsync", "ssh", "curl")
NODE_TIMEOUT_S, POLL_S = 600.0, 2.0
NOTICE_S = 30.0  # from Google's notice to the end of a spot machine
GRACE_S = 20.0  # from Ctrl-C to SIGKILL
STATUS_LABEL = "ray-node-status"
DESK_ADDRESS = "203.0.113.250"
MOUNTED = ("app", "assets", "jobs", "cluster", "requirements")
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
        self.project = folder / "project"  # what cluster files mount; a rehearsal changes it
        for name in MOUNTED:
            shutil.copytree(ROOT / name, self.project / name, ignore=shutil.ignore_patterns("__pycache__"))
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

    def start(self, output: int, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*arguments),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def make(self, verb: str, *variables: str, may_fail: bool = False) -> str:
        """Runs `make` at the desk, notes it in the transcript, and returns the output. Raises UserError if it fails."""
        words = self.note(verb, *variables)
        began, calls = time.monotonic(), len(self.books.calls)
        # Not through a pipe, as Ray's SSH connections stay for a while and would hold it open.
        before = os.fstat(self.log.fileno()).st_size
        with self.running(verb, *variables, output=self.log.fileno()) as process:
            process.wait()
        output = Path(self.log.name).read_bytes()[before:].decode(errors="replace")
        seconds, calls = time.monotonic() - began, len(self.books.calls) - calls
        self.say(f"make {words}: exit {process.returncode} after {seconds:.0f} s, {calls} API calls")
        if process.returncode and not may_fail:
            raise UserError(f"The rehearsal failed at `make {words}`: {' '.join(output.splitlines()[-3:])}")
        return output

    def note(self, verb: str, *variables: str) -> str:
        """Writes a command line into the transcript, as a user would type it."""
        words = " ".join(shlex.quote(word) for word in (verb, *variables)).replace(f"{self.desk.folder}/", "")
        self.log.write(f"\n$ make {words}\n")
        self.log.flush()
        return words

    @contextmanager
    def running(self, verb: str, *variables: str, output: int = subprocess.PIPE) -> Iterator[subprocess.Popen[str]]:
        """A `make` that runs while the block does, and ends with Ctrl-C if it has not ended by then."""
        with self.start(output, "make", f"RUN_DIR={self.folder / 'run'}", verb, *variables) as process:
            try:
                yield process
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGINT)
                    try:
                        process.wait(GRACE_S)
                    except subprocess.TimeoutExpired:
                        os.killpg(process.pid, signal.SIGKILL)

    def lines(self, process: subprocess.Popen[str]) -> Iterator[str]:
        """What a process prints, which also goes to the transcript."""
        assert process.stdout
        for line in process.stdout:
            self.log.write(line)
            self.log.flush()
            yield line

    @contextmanager
    def tunnel(self, file: str) -> Iterator[tuple[str, str]]:
        """The addresses of the dashboard and of the API at the ends of `make dashboard`."""
        self.note("dashboard", file)
        with self.running("dashboard", file) as process:
            line = next((line for line in self.lines(process) if "the API at" in line), "")
            if not line:
                raise UserError("The rehearsal failed: `make dashboard` opens no tunnel.")
            dashboard, api = re.findall(r"http://[\w.:]+", line)
            yield dashboard, api

    def picture(self, file: str, prompt: str) -> Image.Image:
        """Draws a picture through the SSH tunnel of `make dashboard`."""
        with self.tunnel(file) as (_, api):
            url = f"{api}/imagine?seed=1&prompt={prompt}"
            done = subprocess.run(self.command("curl", "-fsS", "--max-time", "120", url), capture_output=True)
        if done.returncode:
            raise UserError(f"The rehearsal failed: {url} gives no picture: {done.stderr.decode().strip()}")
        picture = Image.open(io.BytesIO(done.stdout))
        picture.load()
        self.say(f"GET /imagine through the tunnel: a picture of {picture.width}x{picture.height}")
        return picture

    def first_line(self, verb: str, *variables: str, with_text: str) -> None:
        """Runs a `make` that follows something until it prints a line with a text."""
        words = self.note(verb, *variables)
        with self.running(verb, *variables) as process:
            if not any(with_text in line for line in self.lines(process)):
                raise UserError(f"The rehearsal failed: `make {words}` ends without a line with {with_text!r}.")
        self.say(f"make {words}: follows until Ctrl-C")

    def say(self, sentence: str) -> None:
        self.log.write(f"# {sentence}\n")
        self.log.flush()
        print(sentence, flush=True)

    def nodes(self, status: str = "up-to-date") -> set[str]:
        """The TPU nodes that run and have this label of Ray's."""
        with self.books.lock:
            nodes = self.books.nodes.items()
            return {n for n, node in nodes if node["state"] == "READY" and status == node["labels"].get(STATUS_LABEL)}

    def await_nodes(self, condition: Callable[[set[str]], object], purpose: str) -> set[str]:
        """Waits until the TPU nodes that are set up meet a condition. Returns their names."""
        seconds = self.wait(lambda: condition(self.nodes()), purpose)
        nodes = self.nodes()
        self.say(f"{purpose}, after {seconds:.0f} s: {', '.join(map(short, sorted(nodes)))}")
        return nodes

    def wait(self, condition: Callable[[], object], purpose: str) -> float:
        """Waits until a condition holds. Returns the seconds that it took; raises UserError if it takes too many."""
        began = time.monotonic()
        while time.monotonic() < began + NODE_TIMEOUT_S:
            if condition():
                return time.monotonic() - began
            time.sleep(POLL_S)
        raise UserError(f"The rehearsal failed: {purpose}: not within {NODE_TIMEOUT_S:.0f} s.")

    def await_call(self, method: str, status: int, purpose: str, after: int = 0) -> None:
        """Waits until Google has answered a call of a method with this status; `after` so many calls of any kind."""
        self.wait(lambda: (method, status) in self.books.calls[after:], purpose)
        self.say(purpose)

    def maintain(self, node: str) -> None:
        """Announces that a node ends, as Google does a minute before maintenance that stops a machine."""
        self.say(f"Google announces maintenance of {short(node)}")
        self.books.announce_maintenance(node)

    def preempt(self, node: str) -> None:
        """Takes a node away as Google does: a notice, and half a minute later the end."""
        self.say(f"Google announces that it takes {short(node)} away")
        self.books.announce_preemption(node)
        time.sleep(NOTICE_S)
        self.books.preempt(node)
        self.say("The node is gone")


def short(node: str) -> str:
    return node.rpartition("/")[2]


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
