"""Hosts of the simulated Google Cloud: a machine or TPU VM is a set of namespaces with its own address, sshd and home.

A host sees neither the repository nor the home of the user who rehearses. Its packages come from rehearsal/image.py.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rehearsal.accounts import token_for
from rehearsal.books import SERVICES, Books, Keeper, Machine
from rehearsal.image import WRITTEN
from rehearsal.metadata import ADDRESS, Metadata
from rehearsal.metadata import Server as MetadataServer
from rehearsal.namespaces import GATEWAYS, Network, call_inside

USER, UID = "ubuntu", 1000
NAMES = [f"{service}.googleapis.com" for service in (*SERVICES, "oauth2")] + ["files.pythonhosted.org"]
# Runs as process 1 of a host. $1 is the host's folder, $2 that of the image, $3 its name, $4 its chips. $5 is where the
# image's Python was built to find its library.
ENTER = """set -e
hostname "$3"
mount --make-rprivate /
mount -t proc proc /proc
for file in hosts passwd group resolv.conf; do mount --bind "$1/etc/$file" "/etc/$file"; done
mount -t tmpfs tmpfs /mnt && mkdir /mnt/image /mnt/host
mount --bind "$2" /mnt/image
mount --bind "$1" /mnt/host
mount -t tmpfs tmpfs /home && cp -a "$1/home" /home/ubuntu # in memory: it goes with the host
for place in /tmp /run; do mount -t tmpfs tmpfs $place; done
chmod 1777 /tmp
mount -t tmpfs dev /mnt/host/dev
for node in null zero full random urandom tty; do
    touch /mnt/host/dev/$node && mount --bind /dev/$node /mnt/host/dev/$node
done
mkdir /mnt/host/dev/pts /mnt/host/dev/shm
mount -t devpts -o newinstance,ptmxmode=0666,mode=0620,gid=5 devpts /mnt/host/dev/pts
mount -t tmpfs shm /mnt/host/dev/shm && chmod 1777 /mnt/host/dev/shm
ln -s pts/ptmx /mnt/host/dev/ptmx && ln -s /proc/self/fd /mnt/host/dev/fd
for i in 0 1 2; do ln -s /proc/self/fd/$i /mnt/host/dev/$(echo stdin stdout stderr | cut -d' ' -f$((i + 1))); done
if [ "$4" != 0 ]; then
    mkdir /mnt/host/dev/vfio
    for i in $(seq 0 $(($4 - 1))); do touch /mnt/host/dev/vfio/$i; done
fi
mount --move /mnt/host/dev /dev
for place in /root /work; do [ ! -d $place ] || mount -t tmpfs -o mode=755 tmpfs $place; done
[ -d "$5" ] || { mkdir -p "$5" && mount --bind /mnt/image/python/cpython-* "$5"; }
mkdir -p /run/sshd
/usr/sbin/sshd -D -e -f /mnt/host/sshd_config
exit # bash stays process 1 and reaps what Ray leaves, as sshd would not
"""
# All hosts share this machine's processors, so they share compiled modules too: Ray gives up agents that start slowly.
SSHD = """ListenAddress 0.0.0.0
HostKey /mnt/host/host_key
AuthorizedKeysFile /mnt/host/authorized_keys
StrictModes no
UsePAM no
PasswordAuthentication no
Subsystem sftp internal-sftp
SetEnv HTTPLIB2_CA_CERTS=/mnt/host/certificate.pem CURL_CA_BUNDLE=/mnt/host/certificate.pem UV_NO_INDEX=1 \
UV_FIND_LINKS=/mnt/image/wheels UV_CACHE_DIR=/mnt/image/uv-cache UV_LINK_MODE=symlink UV_OFFLINE=1 \
UV_PYTHON_INSTALL_DIR=/mnt/image/python PYTHONPYCACHEPREFIX=/mnt/image/pycache
"""


@dataclass
class Host:
    folder: Path
    process: subprocess.Popen[bytes]
    metadata: Metadata
    server: MetadataServer


class Hosts(Keeper):
    def __init__(self, books: Books, network: Network, image: Path, folder: Path) -> None:
        self.books, self.network, self.image, self.folder = books, network, image, folder
        self.hosts: dict[str, Host] = {}
        for name in WRITTEN:
            os.chown(image / name, UID, UID)

    def start(self, machine: Machine) -> None:
        folder = self.folder / machine.name
        for name in ("etc", "home", "dev"):
            (folder / name).mkdir(parents=True)
        self.write_files(folder, machine)
        namespace = self.network.join(machine.name, *machine.addresses)
        subprocess.run(["ip", "-netns", namespace, "addr", "add", f"{ADDRESS}/32", "dev", "lo"], check=True)
        facts = Metadata(self.values(machine), lambda: token_for(self.books, f"serviceAccount:{machine.account}"))
        server = call_inside(namespace, lambda: MetadataServer(facts))
        unshare = ["unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child"]
        arguments = [str(folder), str(self.image), machine.name, str(machine.chips), sys.base_prefix]
        with (folder / "sshd.log").open("wb") as log:
            process = subprocess.Popen(
                ["ip", "netns", "exec", namespace, *unshare, "bash", "-c", ENTER, "host", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.hosts[machine.name] = Host(folder, process, facts, server)

    def stop(self, name: str) -> None:
        if host := self.hosts.pop(name, None):
            host.process.kill()
            host.process.wait()
            host.server.shutdown()
            host.server.server_close()
            self.network.leave(name)
            shutil.rmtree(host.folder, ignore_errors=True)

    def tell(self, name: str, key: str, value: str) -> None:
        self.hosts[name].metadata.set(key, value)

    def close(self) -> None:
        for name in list(self.hosts):
            self.stop(name)

    def write_files(self, folder: Path, machine: Machine) -> None:
        names = "".join(f"{GATEWAYS[0]} {name}\n" for name in NAMES)
        etc = {
            "hosts": f"127.0.0.1 localhost\n{machine.addresses[0]} {machine.name}\n"
            f"{ADDRESS} metadata.google.internal metadata\n{names}",
            "passwd": f"{USER}:x:{UID}:{UID}::/home/{USER}:/bin/bash\n"
            + "".join(line for line in Path("/etc/passwd").open() if line.split(":")[2] != str(UID)),
            "group": f"{USER}:x:{UID}:\n"
            + "".join(line for line in Path("/etc/group").open() if line.split(":")[2] != str(UID)),
            "resolv.conf": "",
        }
        for name, text in etc.items():
            (folder / "etc" / name).write_text(text)
        for source in Path("/etc/skel").glob(".*"):
            if source.is_file():
                shutil.copy(source, folder / "home")
        for path in (folder / "home", *(folder / "home").iterdir()):
            os.chown(path, UID, UID)
        (folder / "sshd_config").write_text(SSHD)
        (folder / "authorized_keys").write_text(keys(self.books))
        shutil.copy(self.folder / "certificate.pem", folder)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "host_key"], check=True)

    def values(self, machine: Machine) -> dict[str, Any]:
        values = {
            "project/project-id": self.books.project.id,
            "project/numeric-project-id": str(self.books.project.number),
            "instance/name": machine.name,
            "service-account": machine.account,
        }
        if machine.accelerator:
            environment = f"ACCELERATOR_TYPE: '{machine.accelerator}'\nWORKER_ID: '{machine.worker}'\n"
            values |= {
                "instance/attributes/accelerator-type": machine.accelerator,
                "instance/attributes/agent-worker-number": str(machine.worker),
                "instance/attributes/instance-id": machine.name,
                "instance/attributes/tpu-env": environment,
            }
        return values


def keys(books: Books) -> str:
    """The project's SSH keys for the hosts' user, as Google's agent on a machine installs them."""
    items: list[dict[str, str]] = books.project.metadata.get("items", [])
    lines = [line for item in items if item["key"] == "ssh-keys" for line in item["value"].splitlines()]
    return "".join(f"{line.partition(':')[2]}\n" for line in lines if line.startswith(f"{USER}:"))
