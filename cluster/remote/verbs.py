"""The verbs for a remote cluster, which a file for `ray up` describes: up, down, monitor, attach, dashboard, address.

Ray's own launcher does the work. This module adds checks before the start, a second `up` that does not restart what
runs, and a wait until the cluster answers. Knows nothing of what is deployed.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import psutil

from cluster import ROOT, ownership, processes, shell_environment
from cluster.cli import Parser, UserError
from cluster.connection import DASHBOARD_PORT, authorization, dashboard_of, dashboard_port, isolate
from cluster.dashboard import Dashboard, Refused
from cluster.local.state import RUN_DIR
from cluster.local.verbs import locked, port
from cluster.processes import Recorded
from cluster.remote.leftovers import clear
from cluster.remote.preflight import content, ready, ready_to_start
from cluster.remote.tunnel import NoHead, route, tunnel
from cluster.terminal import Progress, make_command, say

RAY = (sys.executable, "-m", "cluster.remote.launcher")
MONITOR_LOGS = "/tmp/ray/session_latest/logs/monitor.*"
API_PORT = 8000  # Serve's default
ANSWER_TIMEOUT_S = 120.0  # from Ray's start on the head until its dashboard answers
POLL_S = 0.5
RETRY_S = 3.0  # from a broken tunnel to the next try
GRACE_S = 5.0


def up(path: Path, run_dir: Path) -> None:
    ready_to_start(path)
    with locked(folder(path, run_dir)):
        say(f"Checking whether the cluster of {path} is up")
        if unanswered := silence(path, run_dir):
            say(f"{unanswered}\nStarting it with `ray up`: a head within minutes, then what its setup installs")
            launch("up", "--yes", "--no-config-cache", path)
        else:
            say("It is up. `ray up` brings files and node types up to date; what runs there goes on")
            launch("up", "--yes", "--no-restart", "--no-config-cache", path)
        await_answer(path, run_dir)
    say(f"The cluster of {path} is up: its dashboard answers, to the token. Next: {make_command('deploy', str(path))}")


def silence(path: Path, run_dir: Path) -> str:
    """Why the cluster does not answer; empty if it does. Raises Refused if it has another token: do not restart it."""
    try:
        with dashboard_of(str(path), run_dir) as dashboard:
            dashboard.details()
        return ""
    except Refused:
        raise
    except NoHead:
        return f"No cluster is up by {path} yet."
    except UserError as reason:
        return str(reason)


def await_answer(path: Path, run_dir: Path) -> None:
    with Progress() as progress:
        while unanswered := silence(path, run_dir):
            if progress.elapsed > ANSWER_TIMEOUT_S:
                raise UserError(f"The head is up, and Ray does not answer on it. {unanswered}")
            progress.show({"dashboard": ("no answer yet", unanswered)})
            time.sleep(POLL_S)


def down(path: Path, run_dir: Path) -> None:
    ready(path)
    with locked(folder(path, run_dir)):
        say(f"Ending {path}'s cluster with `ray down`: Ray on it, then its machines")
        launch("down", "--yes", path)
        clear(path)
    say(f"The cluster of {path} is down.")


def monitor(path: Path, lines: int) -> None:
    """Does what `ray monitor` does, which reports Ctrl-C as a failure. Becomes ssh, so that no process is left."""
    ready(path)
    *ssh, head = route(path)
    say(f"What the autoscaler of {path}'s cluster logs, until Ctrl-C")
    os.execvp(ssh[0], [*ssh, "-tt", head, f"tail -n {lines} -F {MONITOR_LOGS}"])


def attach(path: Path, command: str) -> None:
    ready(path)
    if command:
        become("exec", path, command)
    say(f"A shell on the head of {path}'s cluster, until you leave it with: exit")
    become("attach", path)


def launch(*arguments: str | Path) -> None:
    """Runs Ray's command line until it ends."""
    process = subprocess.Popen(ray(*arguments))
    try:
        status = process.wait()
    except KeyboardInterrupt:
        stop(process)
        raise
    if status:
        raise UserError(
            f"`ray {arguments[0]}` failed; its output above has the reason. Then run the same command again."
        )


def stop(process: subprocess.Popen[bytes]) -> None:
    """Waits for Ray's launcher after Ctrl-C, which a terminal sends to both. Ends it if the signal was only for us."""
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        parent = psutil.Process(process.pid)
        tree = [parent, *parent.children(recursive=True)]
        processes.end(lambda: [child for child in tree if not processes.dead(child)], GRACE_S)
        process.wait()


def become(*arguments: str | Path) -> None:
    os.execv(sys.executable, ray(*arguments))


def ray(*arguments: str | Path) -> list[str]:
    colour = "auto" if sys.stdout.isatty() else "false"
    return [*RAY, *map(str, arguments), "--log-style=pretty", f"--log-color={colour}"]


def dashboard(path: Path, run_dir: Path, wanted: tuple[int | None, int | None]) -> None:
    """Keeps tunnels to the dashboard and the API open until Ctrl-C. Opens them again if they break."""
    ready(path)
    if standing := tunnels(path, run_dir):
        say(f"Open already, by process {standing[0].pid}: {links(*standing[1:])}")
        return
    ports = free_port("RAY_DASHBOARD_PORT", wanted[0], DASHBOARD_PORT), free_port("SERVE_PORT", wanted[1], API_PORT)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(0))
    opened = False
    while True:
        try:
            with opening(path, ports) as broken, recorded(path, run_dir, ports):
                say(f"Open{' again' if opened else ', until Ctrl-C'}: {links(*ports)}")
                opened = True
                while not broken():
                    time.sleep(POLL_S)
            say("The connection broke. Connecting again.")
        except NoHead:
            raise
        except UserError as reason:
            if not opened:
                raise
            say(f"Not yet: {reason}")
        time.sleep(RETRY_S)


@contextmanager
def opening(path: Path, ports: tuple[int, int]) -> Iterator[Callable[[], bool]]:
    """Opens both tunnels. Gives a function that says whether one has broken."""
    dashboard_local, api_local = ports
    ssh_command = route(path)
    with tunnel(ssh_command, {dashboard_local: dashboard_port(content(path))}) as first:
        api_remote = api_port(Dashboard(f"http://127.0.0.1:{dashboard_local}", str(path), authorization()))
        with tunnel(ssh_command, {api_local: api_remote}) as second:
            yield lambda: first.poll() is not None or second.poll() is not None


def api_port(dashboard: Dashboard) -> int:
    return int((dashboard.details().get("http_options") or {}).get("port", API_PORT))


def free_port(variable: str, wanted: int | None, usual: int) -> int:
    """A free port of this machine: the one that the user names, else the usual one, else any."""
    if wanted and not processes.free(wanted):
        raise UserError(f"Port {wanted} is taken by {processes.listener(wanted)}. Choose another one with {variable}=")
    return wanted or (usual if processes.free(usual) else processes.free_ports(1)[0])


def links(dashboard: int, api: int) -> str:
    return f"the dashboard at http://127.0.0.1:{dashboard}, the API at http://127.0.0.1:{api}"


@contextmanager
def recorded(path: Path, run_dir: Path, ports: tuple[int, int]) -> Iterator[None]:
    """Records the tunnels, so that `address` finds them."""
    file = folder(path, run_dir) / "tunnels.json"
    ownership.make_folder(file.parent, "RUN_DIR=")
    ownership.write(file, json.dumps({"process": asdict(processes.record(psutil.Process())), "ports": ports}))
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def tunnels(path: Path, run_dir: Path) -> tuple[psutil.Process, int, int] | None:
    """The process that holds the tunnels open, and their ports on this machine."""
    try:
        state = json.loads(ownership.read(folder(path, run_dir) / "tunnels.json"))
        process, (dashboard, api) = processes.find(Recorded(**state["process"])), state["ports"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (process, int(dashboard), int(api)) if process else None


def folder(path: Path, run_dir: Path) -> Path:
    return run_dir / re.sub(r"[^\w.-]", "_", f"cluster-{content(path)['cluster_name']}")


def address(path: Path, run_dir: Path) -> None:
    """Prints lines for a shell's `eval`, and nothing else on stdout."""
    standing = tunnels(path, run_dir)
    _, dashboard, api = standing or (None, DASHBOARD_PORT, API_PORT)
    if not standing:
        note = (
            f"These lead nowhere until another terminal holds the tunnels open: {make_command('dashboard', str(path))}"
        )
        print(note, file=sys.stderr, flush=True)
    shell_environment.tell(variables(dashboard, api), unset=shell_environment.strays({"RAY_AUTH_MODE": "token"}))


def variables(dashboard: int, api: int) -> dict[str, str]:
    """Variables for `ray job`, `serve` and `curl`."""
    bin_dir, path = str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)
    return {
        "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "RAY_DASHBOARD_ADDRESS": f"http://127.0.0.1:{dashboard}",  # for `serve`
        "PYTHONPATH": str(ROOT),  # `serve` imports the autoscaling policy that a config names
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",  # for `ray job`
        "RAY_AUTH_MODE": "token",  # otherwise a client sends no token
        "IMAGINE_URL": f"http://127.0.0.1:{api}",  # curl "$IMAGINE_URL/v1/models"
        "PATH": path if bin_dir in path.split(os.pathsep) else f"{bin_dir}{os.pathsep}{path}",
        **processes.past_proxies(),
    }


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("verb", choices=["up", "down", "monitor", "attach", "dashboard", "address"])
    parser.add_argument("--cluster", type=Path, required=True, help="a file for `ray up`")
    parser.add_argument("--run-dir", type=Path, default=RUN_DIR, help="of the state of tunnels")
    parser.add_argument("--lines", type=int, default=30, help="monitor: the last lines first")
    parser.add_argument("--command", default="", help="attach: a command instead of a shell")
    parser.add_argument("--dashboard-port", default="", help=f"dashboard: its port here (default {DASHBOARD_PORT})")
    parser.add_argument("--serve-port", default="", help=f"dashboard: port of the API here (default {API_PORT})")
    arguments = parser.parse_args()
    path, run_dir = arguments.cluster, arguments.run_dir.resolve()
    isolate(str(path), run_dir)
    os.environ["RAY_UP_enable_autoscaler_v2"] = "1"  # Ray's default, which it announces unless it is set
    match arguments.verb:
        case "up":
            up(path, run_dir)
        case "down":
            down(path, run_dir)
        case "monitor":
            monitor(path, arguments.lines)
        case "attach":
            attach(path, arguments.command)
        case "address":
            address(path, run_dir)
        case "dashboard":
            wanted = [port(text) if text else None for text in (arguments.dashboard_port, arguments.serve_port)]
            dashboard(path, run_dir, (wanted[0], wanted[1]))
