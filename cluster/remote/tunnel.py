"""SSH tunnels to a cluster's head: ports of its loopback appear on this machine's, for as long as one is held open.

Ray's launcher says how the head is reached (address, user, key, proxy); ssh does the rest. `ray dashboard` is not used,
because it leaves its connection behind for 10 s, with the ports that it holds. Knows nothing of Serve.
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

CONNECT_S = 20  # for the connection, and again for the key and the ports
GRACE_S = 5.0
READY = b"open\n"
# Ray shares one connection among all its commands, which outlives them; a tunnel is to end with who opened it.
OURS = ("-T", "-oControlMaster=no", "-oControlPath=none", "-oBatchMode=yes", "-oLogLevel=ERROR")


class NoHead(UserError):
    """Nothing is up that a tunnel could lead to."""


def route(path: Path) -> list[str]:
    """The ssh command that reaches the head of a cluster file's cluster, but for what it is to do there."""
    from app.ray_internals.autoscaler import ssh_command  # takes half a second to import

    logging.getLogger("ray.autoscaler").setLevel(logging.WARNING)  # else it tells how it keeps its books
    output = io.StringIO()  # as it does on stdout
    with redirect_stdout(output), redirect_stderr(output):
        try:
            ssh = ssh_command(yaml.safe_load(path.read_text()), str(path), CONNECT_S)
        except Exception as error:  # of Ray, of Google's client, of the network: whatever `ray up` would show
            sentence = str(error).strip() or output.getvalue().strip() or type(error).__name__
            raise UserError(f"The head of {path} cannot be looked up: {sentence.splitlines()[-1]}") from None
    if ssh is None:
        raise NoHead(f"No cluster is up by {path}. Start it with: {make_command('up', str(path))}")
    options, target = ssh
    return ["ssh", *OURS, *options, target]


@contextmanager
def tunnel(route: list[str], ports: Mapping[int, int]) -> Iterator[subprocess.Popen[bytes]]:
    """From ports of our loopback to those of the head's. It breaks when the process that is given ends.

    What runs on the head reads from us until we are gone, so even our being killed ends the connection.
    """
    forwards = [f"-L127.0.0.1:{local_port}:127.0.0.1:{remote_port}" for local_port, remote_port in ports.items()]
    with tempfile.TemporaryFile() as errors:
        ssh = subprocess.Popen(
            [*route[:-1], *forwards, route[-1], "echo open; exec cat > /dev/null"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,  # Ctrl-C is for us, and we end it in order
        )
        try:
            if not opened(ssh):
                raise UserError(f"SSH does not get through to {route[-1]}{why(errors)}")
            yield ssh
        finally:
            end(ssh)


def opened(ssh: subprocess.Popen[bytes]) -> bool:
    """Waits until the head has answered, which it does once all ports are forwarded (ExitOnForwardFailure)."""
    assert ssh.stdout
    heard, until = b"", time.monotonic() + 2 * CONNECT_S
    while not heard.endswith(READY):  # a head may greet us first
        if not select.select([ssh.stdout], [], [], max(0.0, until - time.monotonic()))[0]:
            return False
        if not (news := os.read(ssh.stdout.fileno(), 4096)):
            return False
        heard += news
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
