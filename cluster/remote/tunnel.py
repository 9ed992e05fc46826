"""SSH tunnels from ports of this machine to ports of a head's loopback interface.

Ray's launcher gives the head's address, user, key and proxy. `ray dashboard` is not used, because its connection stays
for 10 s after it ends and holds its ports. Knows nothing of Serve.
"""

import io
import logging
import os
import select
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import IO

import yaml

from cluster.cli import UserError
from cluster.terminal import make_command

CONNECT_S = 20  # for the connection, and again for login and ports
GRACE_S = 5.0
READY = b"open\n"
# Ray's commands share a connection that outlives them. A tunnel must end with its process.
OURS = ("-T", "-oControlMaster=no", "-oControlPath=none", "-oBatchMode=yes", "-oLogLevel=ERROR")


class NoHead(UserError):
    """No head is running."""


def route(path: Path) -> list[str]:
    """The ssh command that logs in to the head of a cluster, without a remote command."""
    from app.ray_internals.autoscaler import ssh_command  # takes half a second to import
    from app.ray_internals.google import retry_reads_and_deletes
    from app.ray_internals.google import sentence as google_sentence

    logging.getLogger("ray.autoscaler").setLevel(logging.WARNING)  # otherwise it logs its bookkeeping
    retry_reads_and_deletes()
    output = io.StringIO()  # it also prints on stdout
    with redirect_stdout(output), redirect_stderr(output):
        try:
            ssh = ssh_command(yaml.safe_load(path.read_text()), str(path), CONNECT_S)
        except Exception as error:  # of Ray, Google's client or the network
            reason = google_sentence(error) or str(error).strip() or output.getvalue().strip()
            sentence = reason or type(error).__name__
            raise UserError(f"The head of {path} cannot be looked up: {sentence.splitlines()[-1]}") from None
    if ssh is None:
        raise NoHead(f"No cluster is up by {path}. Start it with: {make_command('up', str(path))}")
    options, target = ssh
    return ["ssh", *OURS, *options, target]


@contextmanager
def tunnel(route: list[str], ports: Mapping[int, int]) -> Iterator[subprocess.Popen[bytes]]:
    """Forwards local ports to ports of the head. The tunnel is broken when the ssh process has ended.

    The remote command reads from this process until it ends, so the connection ends even if this process is killed.
    """
    forwards = [f"-L127.0.0.1:{local_port}:127.0.0.1:{remote_port}" for local_port, remote_port in ports.items()]
    with tempfile.TemporaryFile() as errors:
        ssh = subprocess.Popen(
            [*route[:-1], *forwards, route[-1], "echo open; exec cat > /dev/null"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,  # Ctrl-C reaches only us, and we end ssh
        )
        try:
            if not opened(ssh):
                raise UserError(f"SSH does not get through to {route[-1]}{why(errors)}")
            yield ssh
        finally:
            end(ssh)


def opened(ssh: subprocess.Popen[bytes]) -> bool:
    """Waits for the head's answer, which comes once all ports are forwarded (ExitOnForwardFailure)."""
    assert ssh.stdout
    received, until = b"", time.monotonic() + 2 * CONNECT_S
    while not received.endswith(READY):  # a head may print a greeting first
        if not select.select([ssh.stdout], [], [], max(0.0, until - time.monotonic()))[0]:
            return False
        if not (news := os.read(ssh.stdout.fileno(), 4096)):
            return False
        received += news
    return True


def why(errors: IO[bytes]) -> str:
    errors.seek(0)
    lines = [line.strip() for line in errors.read().decode(errors="replace").splitlines() if line.strip()]
    return f": {lines[-1]}" if lines else "."


def end(ssh: subprocess.Popen[bytes]) -> None:
    assert ssh.stdin and ssh.stdout
    ssh.terminate()
    try:
        ssh.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        ssh.kill()
        ssh.wait()
    ssh.stdin.close()
    ssh.stdout.close()
