"""cluster/remote/verbs.py and what deploys, through Ray's own launcher over a real SSH: an sshd on loopback is the
way to a head
that is this very machine, with a home of its own. No machine is started and none ended, which only a cloud can do.

Skipped where Debian's openssh-server and rsync are not installed. `ray stop` would end every Ray on this machine, so on
that head it is a command that ends its own.
"""

import json
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from getpass import getuser
from pathlib import Path

import psutil
import pytest

from cluster import ROOT, processes
from tests.clusters import refuses, soon, succeeds

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin")
MISSING = [name for name, path in (("sshd", SSHD), ("rsync", shutil.which("rsync"))) if not path]
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(
        sys.platform != "linux", reason="a second home on one machine, as bash and sshd make it on Linux"
    ),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]

SSHD_CONFIG = """
Port {ssh_port}
ListenAddress 127.0.0.1
HostKey {base}/host_key
AuthorizedKeysFile {base}/key.pub
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
ForceCommand {base}/enter
"""
# What a login on the head is: its own home and temporary folder, and the mark by which its processes are found.
ENTER = """#!/bin/bash
export HOME={base}/home TMPDIR={base} {mark_name}={mark} PYTHONPATH={base}/home/imagine JAX_PLATFORMS=cpu
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0
export RAY_preload_python_modules=cluster.closed_port AUTOSCALER_METRIC_PORT={ports[0]} DASHBOARD_METRIC_PORT={ports[1]}
cd ~
exec bash -c "${{SSH_ORIGINAL_COMMAND//\\/tmp\\/ray\\//{base}/ray/}}"
"""
RAY = """#!/bin/bash
[ "$1" != stop ] || exec {python} -c \
    "import os; from cluster import processes as p; p.end(lambda: p.belonging(os.environ[p.MARK]), 1)"
exec {python} -m ray.scripts.scripts "$@"
"""
# Ray's SSH options know no port.
PROXY = """#!{python}
import os, signal, socket, threading
signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ray's commands share it, and one of them may be interrupted
head = socket.create_connection(("127.0.0.1", {ssh_port}))
def pump():
    while data := head.recv(65536):
        os.write(1, data)
    os._exit(0)
threading.Thread(target=pump).start()
while data := os.read(0, 65536):
    head.sendall(data)
os._exit(0)
"""
CLUSTER = """
cluster_name: over-ssh
provider: {{type: local, head_ip: 127.0.0.1, worker_ips: []}}
auth: {{ssh_user: {user}, ssh_private_key: {base}/key, ssh_proxy_command: {base}/proxy}}
file_mounts:
  ~/imagine/app: app
  ~/imagine/cluster: cluster
  ~/imagine/tests: {base}/code
  ~/.ray/auth_token: ~/.ray/auth_token
setup_commands:
  - touch ~/setting-up && sleep 1
head_start_ray_commands:
  - ray stop
  - >-
    RAY_AUTH_MODE=token ray start --head --node-ip-address=127.0.0.1 --port={ports[2]}
    --ray-client-server-port={ports[3]} --node-manager-port={ports[4]}
    --object-manager-port={ports[5]} --metrics-export-port={ports[6]}
    --dashboard-agent-listen-port={ports[7]} --dashboard-agent-grpc-port={ports[8]} --runtime-env-agent-port={ports[9]}
    --dashboard-host=127.0.0.1 --dashboard-port={ports[10]} --min-worker-port=0 --max-worker-port=0
    --num-cpus=1 --object-store-memory=100000000 --autoscaling-config=$HOME/ray_bootstrap_config.yaml
worker_start_ray_commands:
  - ray start
"""
GREETER = """
proxy_location: HeadOnly
http_options: {{host: 127.0.0.1, port: {ports[11]}}}
applications:
  - name: greeting
    route_prefix: /
    import_path: tests.serve_apps:greeter
    args: {{text: hello, model: {base}/model}}
    deployments:
      - name: Greeter
        ray_actor_options: {{num_cpus: 0.1}}
"""


@dataclass(frozen=True)
class Far:
    """A user with a home folder, and a remote cluster."""

    base: Path
    token: str = field(repr=False)

    @property
    def file(self) -> str:
        return str(self.base / "cluster.yaml")

    @property
    def environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        home = self.base / "user"
        # Somebody else's cluster in the environment must change nothing.
        return kept | {"HOME": str(home), "TMPDIR": str(home / "tmp"), "RAY_ADDRESS": "10.255.255.1:6379"}

    def command(self, module: str, *arguments: str) -> list[str]:
        where = ("--cluster", self.file, "--run-dir", str(self.base / "run"))
        return [sys.executable, "-m", f"cluster.{module}", *arguments, *where]

    def __call__(self, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.command(module, *arguments),
            cwd=ROOT,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
        print(f"$ {module} {' '.join(arguments)} -> {done.returncode}\n{done.stdout}{done.stderr}")  # if a test fails
        assert self.token not in done.stdout + done.stderr
        return done

    @contextmanager
    def start(self, module: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """A command that runs during the block."""
        process = subprocess.Popen(
            self.command(module, *arguments),
            cwd=ROOT,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            process.terminate()
            process.communicate(timeout=60)

    def write(self, name: str, text: str, mode: int = 0o600) -> None:
        file = self.base / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(mode)


@pytest.fixture(scope="module")
def far() -> Iterator[Far]:
    base = Path(tempfile.mkdtemp(prefix="imagine-", dir="/tmp"))  # short, for Ray's sockets
    far, mark = Far(base, secrets.token_hex(32)), str(base)
    ports = processes.free_ports(13)
    facts = {"base": base, "mark": mark, "mark_name": processes.MARK, "ports": ports, "ssh_port": ports[12]}
    facts |= {"python": sys.executable, "user": getuser()}
    for name, text in {"enter": ENTER, "proxy": PROXY, "bin/ray": RAY}.items():
        far.write(name, text.format(**facts), 0o700)
    for name, text in {"sshd_config": SSHD_CONFIG, "cluster.yaml": CLUSTER, "greeter.yaml": GREETER}.items():
        far.write(name, text.format(**facts))
    far.write("home/.bashrc", f"export PATH={base}/bin:{Path(sys.executable).parent}:$PATH\n")
    far.write("user/.ray/auth_token", far.token)
    far.write("code/serve_apps.py", (ROOT / "tests/serve_apps.py").read_text())
    (base / "user/tmp").mkdir()
    for key in ("host_key", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", base / key], check=True)
    if os.geteuid() == 0:
        os.makedirs("/run/sshd", exist_ok=True)  # where it drops its privileges; its service would make it
    assert SSHD
    log = (base / "sshd.log").open("w")
    sshd = subprocess.Popen([SSHD, "-D", "-e", "-f", base / "sshd_config"], stderr=log)
    try:
        yield far
    finally:
        processes.end(lambda: processes.belonging(mark), 3)
        for session in psutil.Process(sshd.pid).children(recursive=True):
            session.terminate()
        sshd.terminate()
        sshd.wait()
        log.close()
        shutil.rmtree(base)


def head(far: Far) -> dict[str, int]:
    """Ray's processes on the head."""
    return {processes.name_of(process): process.pid for process in processes.belonging(str(far.base))}


def line(process: subprocess.Popen[str], words: str) -> str:
    """The next line of a process's output with these words."""
    assert process.stdout
    return next(text for text in process.stdout if words in text)


def plain(far: Far, *command: str) -> subprocess.CompletedProcess[str]:
    """Runs a command after eval "$(make -s address)", in any folder."""
    address = succeeds(far("remote", "address"))
    assert all(line.startswith(("export ", "unset ")) for line in address.splitlines())
    shell = f"set -e; {address}\n{shlex.join(command)}"
    environment = far.environment | {"PATH": os.defpath}
    return subprocess.run(["bash", "-c", shell], cwd=far.base, env=environment, capture_output=True, text=True)


# In this order: a cluster comes up, serves, is looked at and is ended.


def test_before_it_is_up_each_verb_says_so_in_a_line(far: Far) -> None:
    sentence = f"No cluster is up by {far.file}. Start it with: make up CLUSTER={far.file}"
    assert refuses(far("deploy", "status")) == sentence
    assert refuses(far("remote", "dashboard")) == sentence


def test_up_that_is_interrupted_goes_on_when_it_is_run_again(far: Far) -> None:
    with far.start("remote", "up") as first:
        assert soon(lambda: (far.base / "home/setting-up").exists())
        os.killpg(first.pid, signal.SIGINT)
        output = first.communicate(timeout=120)[0]
    assert first.returncode == 130 and output.endswith("Interrupted.\n"), output
    assert "gcs_server" not in head(far)
    # Ray's provider for machines at hand writes its state in place, so an interrupt may leave an empty file, which Ray
    # then cannot read. Google's provider keeps no such file.
    for state in far.base.glob("user/tmp/ray/cluster-*.state"):
        if not state.read_text():
            state.unlink()
    output = succeeds(far("remote", "up"))
    assert "Starting it with `ray up`" in output
    assert "its dashboard answers, to the token." in output.splitlines()[-1]
    assert {"gcs_server", "raylet"} <= set(head(far))
    assert (far.base / "home/.ray/auth_token").read_text() == far.token


def test_up_again_brings_files_and_leaves_ray_alone(far: Far) -> None:
    before = head(far)
    far.write("code/news", "changed")
    output = succeeds(far("remote", "up"))
    assert "It is up. `ray up` brings files and node types up to date; what runs there goes on" in output
    assert (far.base / "home/imagine/tests/news").read_text() == "changed"
    assert all(head(far)[name] == before[name] for name in ("gcs_server", "raylet"))


def test_a_deploy_that_failed_works_again_once_the_cause_is_gone(far: Far) -> None:
    config = str(far.base / "greeter.yaml")
    failed = refuses(far("deploy", "deploy", "--config", config))
    assert failed.startswith("greeting/Greeter did not start: model must be a folder in diffusers layout, got")
    (far.base / "model").mkdir()
    output = succeeds(far("deploy", "deploy", "--config", config))
    assert "greeting has failed before and is removed first" in output
    assert output.splitlines()[-1].endswith(f"on the head, and here at the end of: make dashboard CLUSTER={far.file}")
    status = succeeds(far("deploy", "status"))  # which asks the API itself, at the end of a tunnel
    assert re.search(r"\ngreeting  RUNNING, answers after [\d.]+ s\n  Greeter  HEALTHY  1 of 1 ready\n", status)
    assert "Greeter " in succeeds(far("logs", "--lines", "5"))


def test_attach_runs_a_command_on_the_head(far: Far) -> None:
    output = succeeds(far("remote", "attach", "--command", "ray status; pwd"))
    assert "Autoscaler status" in output and f"{far.base}/home\n" in output.replace("\r", "")


def test_a_job_runs_on_the_head_with_the_code_from_here(far: Far) -> None:
    job_arguments = f"--arguments={ROOT / 'assets' / 'demo-model'} --out weights/demo"
    output = succeeds(far("job", "run", "--job", "fetch_weights", job_arguments))
    out = far.base / "home" / "imagine" / "weights" / "demo"  # where the head has the repository
    assert f"Made {out}: " in output and (out / "model_index.json").is_file()
    assert not (far.base / "home" / "imagine" / "jobs").exists()  # it came with the job
    failed = far("job", "run", "--job", "fetch_weights", "--arguments=nowhere --out weights/other")
    assert failed.returncode == 2 and "\nmodel must be a folder in diffusers layout" in failed.stdout
    listed = succeeds(far("job", "list"))
    assert "succeeded  fetch_weights" in listed and "failed (exit 2)  fetch_weights nowhere" in listed


def test_monitor_follows_the_autoscaler(far: Far) -> None:
    with far.start("remote", "monitor") as watching:
        assert line(watching, "<==")  # which tail writes on the head
        os.killpg(watching.pid, signal.SIGINT)
        watching.communicate(timeout=60)


def test_plain_clients_reach_dashboard_and_api_through_tunnels_that_are_built_again(far: Far) -> None:
    config = str(far.base / "greeter.yaml")
    ports = processes.free_ports(2)
    options = ("--dashboard-port", str(ports[0]), "--serve-port", str(ports[1]))
    with far.start("remote", "dashboard", *options) as tunnels:
        assert f"the dashboard at http://127.0.0.1:{ports[0]}, the API at" in line(tunnels, "Open, until Ctrl-C")
        assert far("remote", "dashboard").stdout.startswith(f"Open already, by process {tunnels.pid}: ")
        assert "greeting" in succeeds(plain(far, "serve", "status"))
        assert "Sent deploy request successfully" in succeeds(plain(far, "serve", "deploy", config))
        sshs = psutil.Process(tunnels.pid).children()
        sshs[0].kill()
        line(tunnels, "The connection broke. Connecting again.")
        line(tunnels, "Open again")
        answer = plain(far, "bash", "-c", "curl -fsS $IMAGINE_URL/")
        assert json.loads(succeeds(answer))["text"] == "hello"
        sshs = psutil.Process(tunnels.pid).children(recursive=True)
        tunnels.kill()  # worse than Ctrl-C
        tunnels.wait()
    gone, alive = psutil.wait_procs(sshs, timeout=60)
    assert len(gone) >= 2 and not alive
    assert all(processes.free(port) for port in ports)
    assert "These lead nowhere until another terminal" in far("remote", "address").stderr


def test_another_token_is_refused_in_a_line_and_restarts_nothing(far: Far) -> None:
    before = head(far)
    far.write("user/.ray/auth_token", "0" * 64)
    sentence = f"The dashboard of {far.file}'s cluster answers 403: it was started with another token"
    for verb in (("deploy", "status"), ("remote", "up"), ("remote", "dashboard")):
        assert refuses(far(*verb)).startswith(sentence)
    far.write("user/.ray/auth_token", far.token)
    assert head(far)["gcs_server"] == before["gcs_server"]


def test_undeploy_leaves_the_cluster_and_down_ends_it(far: Far) -> None:
    assert succeeds(far("deploy", "undeploy")) == "Removed greeting; the cluster is still up.\n"
    assert succeeds(far("remote", "down")).splitlines()[-1] == f"The cluster of {far.file} is down."
    assert not {"gcs_server", "raylet", "dashboard"} & set(head(far))
    assert refuses(far("logs")).startswith("No cluster is up by ")
