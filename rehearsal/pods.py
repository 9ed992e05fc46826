"""Containers as sets of namespaces: the image of a Dockerfile that `make gke` writes, and pods of its RayService.

Does what Docker, the kubelet and KubeRay do with them: layers of files, the user and the capabilities that a pod asks
for, and the `ray start` that KubeRay makes. Needs root, and nothing leaves the namespaces.
"""

import json
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.cli import UserError
from cluster.gke.image import UID
from rehearsal.namespaces import Network

Json = dict[str, Any]
TOKEN = secrets.token_hex(32)
# Runs a command in a root of its own, with this machine's /usr. $1 is the folder with its /etc and /home, $2 the /home
# below or nothing, $3 the folder of rehearsal/image.py. $4 is where its Python was built to find its library, $5 the
# folder of a secret or nothing. The rest is a command line.
CONTAINER = """set -e
mount --make-rprivate /
mkdir -p "$1/root" && mount -t tmpfs root "$1/root" && cd "$1/root"
mkdir usr etc home proc dev tmp run var var/tmp mnt mnt/wheels
for place in bin lib lib64 sbin; do cp -d /$place .; done
mount --bind /usr usr
mount --bind "$1/etc" etc
if [ -n "$2" ]; then
    mkdir -p "$1/work" && mount -t overlay overlay -o "lowerdir=$2,upperdir=$1/home,workdir=$1/work" home
else
    mount --bind "$1/home" home
fi
mount -t proc proc proc
mount --rbind /dev dev
for place in dev/shm tmp; do mount -t tmpfs -o mode=1777 tmpfs $place; done
mkdir -p ".$4" && mount --bind "$3"/python/cpython-* ".$4"
mount --bind "$3/wheels" mnt/wheels
[ -z "$5" ] || mount --bind "$5" etc/imagine
shift 5
exec chroot . "$@"
"""


@dataclass
class Layers:
    """The image while it is built, and its pods."""

    folder: Path
    disk: Path  # of rehearsal/image.py
    network: Network
    environment: dict[str, str] = field(default_factory=dict)

    def container(self, name: str, below: str, command: list[str], secret: str = "") -> list[str]:
        """The command line of a container. `below` is the /home that it has its own layer over."""
        enter = ["ip", "netns", "exec", self.network.namespace(name), "unshare", "--mount", "--uts", "--ipc", "--pid"]
        script = ["--fork", "--kill-child", "bash", "-c", CONTAINER, name, str(self.folder / name)]
        return [*enter, *script, below, str(self.disk), sys.base_prefix, secret, *command]

    def build(self, dockerfile: str, context: Path) -> None:
        """Carries out the instructions of a Dockerfile that `make gke` writes."""
        self.network.join("image", "10.128.0.10")
        user, workdir, root = "root", "/", self.folder / "image"
        (root / "home").mkdir(parents=True)
        shutil.copytree("/etc", root / "etc", symlinks=True)
        for name in ("passwd", "group"):  # this machine may have a user of that number
            lines = (root / "etc" / name).read_text().splitlines(keepends=True)
            (root / "etc" / name).write_text("".join(line for line in lines if line.split(":")[2] != str(UID)))
        base = {"PATH": f"{sys.base_prefix}/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin", "HOME": "/home/ray"}
        offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/mnt/wheels", "PIP_CONFIG_FILE": "/dev/null"}
        self.environment = dict(base)
        for instruction, rest in instructions(dockerfile):
            match instruction:
                case "FROM":
                    if not rest.startswith(f"python:{sys.version_info[0]}.{sys.version_info[1]}-"):
                        raise UserError(f"The rehearsal failed: this Python is not that of {rest}.")
                case "USER":
                    user = rest
                case "WORKDIR":
                    workdir = rest
                case "ENV":
                    pairs = (word.partition("=") for word in shlex.split(rest))
                    self.environment |= {name: value.replace("$PATH", base["PATH"]) for name, _, value in pairs}
                case "COPY":
                    _, source, target = rest.split()
                    there = root / target.lstrip("/")
                    subprocess.run(["cp", "-r", f"{context / source}", str(there)], check=True)
                    subprocess.run(["chown", "-R", f"{UID}:{UID}", str(there)], check=True)
                case "RUN":
                    shell = ["sh", "-c", f"cd {workdir} && {rest}"]
                    become = (
                        [] if user == "root" else ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups"]
                    )
                    command = self.container(
                        "image", "", ["env", *assigned(self.environment | offline), *become, *shell]
                    )
                    run(command, f"RUN {rest}")

    def pod(self, name: str, address: str, group: Json, secret: Path, head: str) -> subprocess.Popen[bytes]:
        """Starts the Ray container of a group as KubeRay and the kubelet do."""
        self.network.join(name, address)
        start = f"ulimit -n ${{RAY_START_ULIMIT_OPEN_FILES:-65536}}; {start_command(group, head)}"
        (self.folder / name / "home").mkdir(parents=True)
        shutil.copytree(self.folder / "image/etc", self.folder / name / "etc", symlinks=True)
        below = str(self.folder / "image/home")
        with (self.folder / f"{name}.log").open("wb") as log:
            return subprocess.Popen(
                self.container(name, below, self.process(group, head, start), str(secret)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def process(self, group: Json, head: str, command: str) -> list[str]:
        """A process of a pod's container: its user, its capabilities and its environment."""
        security = group["template"]["spec"]["securityContext"]
        ids = [f"--reuid={security['runAsUser']}", f"--regid={security['runAsGroup']}", "--clear-groups"]
        container = group["template"]["spec"]["containers"][0]
        variables = self.environment | {entry["name"]: entry["value"] for entry in container["env"]}
        variables |= {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": TOKEN,
            "RAY_ADDRESS": f"{head if 'groupName' in group else '127.0.0.1'}:6379",
            "RAY_NODE_TYPE_NAME": group.get("groupName", "headgroup"),
        }
        limits = ["--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
        return ["env", "-i", *assigned(variables), "setpriv", *ids, *limits, "bash", "-c", f"cd ~/imagine; {command}"]

    def execute(self, pod: subprocess.Popen[bytes], group: Json, head: str, command: list[str]) -> None:
        """Runs a command in a pod's container, as the kubelet runs a preStop hook."""
        (child,) = Path(f"/proc/{pod.pid}/task/{pod.pid}/children").read_text().split()
        enter = ["nsenter", f"--target={child}", "--all", f"--root=/proc/{child}/root"]
        run([*enter, *self.process(group, head, shlex.join(command))], shlex.join(command))

    def ask(self, url: str, *options: str) -> tuple[int, str]:
        """Asks from another pod. Returns the status, 0 without an answer, and the text."""
        inside = ["ip", "netns", "exec", self.network.namespace("operator"), "curl", "-s", "-m", "120"]
        done = subprocess.run([*inside, "-w", "\n%{http_code}", *options, url], capture_output=True)
        text, _, status = done.stdout.decode(errors="replace").rpartition("\n")
        return int(status or 0), text


def instructions(dockerfile: str) -> Iterator[tuple[str, str]]:
    for line in dockerfile.replace("\\\n", " ").splitlines():
        if line and not line.startswith("#"):
            instruction, _, rest = line.partition(" ")
            yield instruction, re.sub(r" +", " ", rest)


def start_command(group: Json, head: str) -> str:
    """The `ray start` that KubeRay 1.7 makes of a group (controllers/ray/common/pod.go)."""
    is_head = "groupName" not in group
    parameters = {**group["rayStartParams"], "block": "true", "dashboard-agent-listen-port": "52365"}
    parameters |= {"metrics-export-port": "8080"} | ({"no-monitor": "true"} if is_head else {"address": f"{head}:6379"})
    resources = dict(group["resources"])
    parameters["num-cpus"] = resources.pop("CPU")
    if resources:
        parameters["resources"] = f"'{json.dumps({name: int(amount) for name, amount in resources.items()})}'"
    if labels := group.get("labels"):
        parameters["labels"] = ",".join(f"{name}={value}" for name, value in sorted(labels.items()))
    options = [f"--{name}" if value == "true" else f"--{name}={value}" for name, value in sorted(parameters.items())]
    return " ".join(["ray start", *(["--head"] if is_head else []), *options])


def assigned(variables: Mapping[str, str]) -> list[str]:
    return [f"{name}={value}" for name, value in variables.items()]


def run(command: list[str], words: str) -> None:
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise UserError(f"The rehearsal failed at `{words}`: {' '.join(lines[-3:])}")
    print(f"{words}: {time.monotonic() - began:.0f} s", flush=True)
