"""Sends malformed HTTP to the real API. A kind, a seed and a number determine each request byte for byte.

    python -m tests.http_fuzz --run-dir .run --count 26000 --seed 0      # `make fuzz` starts the cluster first
    python -m tests.http_fuzz --run-dir .run --replay framings:0:4711    # shows the bytes and what comes back

No answer may be a 5xx other than a documented 503, contain a part of a traceback, or take longer than 20 s. The report
has the memory of the proxy and the ingress. One request must get the same image before and after.
"""

import re
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.request import urlopen

import psutil

from cluster.cli import Parser, run_command
from cluster.connection import LOCAL, dashboard_of
from cluster.local.state import RUN_DIR, Cluster, running
from tests.fuzz_cases import KINDS, Case

HANG_S = 20.0
QUIET_S = 0.5  # after this long, an incomplete request is ended and a kept-alive connection is closed
WORKERS = 12
DOCUMENTED_503 = {"queue_full", "deadline_unmeetable"}
TRACES = (b"Traceback", b'File "/', b"site-packages", b"ray.exceptions", b"Error: ")
PICTURE = "/imagine?prompt=a+red+boat&seed=7&num_inference_steps=2"
STATUS = re.compile(rb"(?:\A|\r\n\r\n|\})HTTP/1\.1 (\d{3}) ")


@dataclass
class Report:
    statuses: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    slowest_s: float = 0.0
    seconds: float = 0.0
    memory: dict[str, tuple[int, int, int]] = field(default_factory=dict)  # MiB before, at most and after

    def add(self, case: Case, data: bytes, seconds: float) -> None:
        self.slowest_s = max(self.slowest_s, seconds)
        codes = STATUS.findall(data)
        self.statuses[case.kind, codes[0].decode() if codes else "closed"] += 1
        if problem := problem_of(data, codes, seconds):
            self.failures.append(f"{case}: {problem}\n  sent {case.request[:2000]!r}\n  got {data[:2000]!r}")

    def __str__(self) -> str:
        total = sum(self.statuses.values())
        lines = [f"{total} requests in {self.seconds:.0f} s, the slowest took {self.slowest_s:.1f} s"]
        for kind in sorted({kind for kind, _ in self.statuses}, key=[*KINDS].index):
            counts = sorted((status, count) for (known, status), count in self.statuses.items() if known == kind)
            lines.append(f"{kind:9} " + "  ".join(f"{status} x {count}" for status, count in counts))
        lines += [f"{name}: {a} MiB before, {b} at most, {c} after" for name, (a, b, c) in self.memory.items()]
        return "\n".join([*lines, f"{len(self.failures)} failures", *self.failures[:20]])


def problem_of(data: bytes, statuses: Sequence[bytes], seconds: float) -> str:
    if seconds > HANG_S:
        return f"no end after {seconds:.0f} s"
    if trace := next((trace for trace in TRACES if trace in data and b"image/png" not in data), None):
        return f"the answer has {trace!r} in it"
    for status in statuses:
        if status == b"503" and any(b'"code": "%s"' % code.encode() in data for code in DOCUMENTED_503):
            continue
        if status == b"503" and data.endswith(b"\r\n\r\n") and b"\r\nretry-after: " in data:  # to HEAD
            continue
        if status >= b"500":
            return f"status {status.decode()}"
    if statuses and statuses[0] >= b"400" and b'{"error": {' not in data and data.partition(b"\r\n\r\n")[2]:
        return "an error that is not in OpenAI's shape"
    return ""


def exchange(port: int, request: bytes) -> bytes:
    """Sends everything at once. A request without an answer may be incomplete: closing the connection ends it."""
    data, ended = b"", False
    deadline = time.monotonic() + 2 * HANG_S
    with socket.create_connection(("127.0.0.1", port), timeout=HANG_S) as connection:
        try:
            connection.sendall(request)
            connection.settimeout(QUIET_S)
            while time.monotonic() < deadline:
                try:
                    piece = connection.recv(1 << 16)
                except TimeoutError:
                    if data and not ended and STATUS.search(data):
                        break
                    if not data and not ended and not complete(request):
                        connection.shutdown(socket.SHUT_WR)
                        ended = True
                    continue
                if not piece:
                    break
                data += piece
        except (ConnectionResetError, BrokenPipeError):
            pass
    return data


def complete(request: bytes) -> bool:
    """Whether an answer is due: not before the whole body has arrived."""
    head, separator, body = request.partition(b"\r\n\r\n")
    length = re.search(rb"\r\nContent-Length: (\d+)", head)
    return bool(separator) and b"chunked" not in head and (not length or len(body) >= int(length[1]))


def fuzz(
    port: int, count: int, seed: int, processes: dict[str, psutil.Process], kinds: Sequence[str] = (*KINDS,)
) -> Report:
    """Sends `count` requests of each kind. The image before and after must be the same, byte for byte."""
    report, lock = Report(), threading.Lock()
    before = picture(port)
    began = time.monotonic()

    def send(case: Case) -> None:
        start = time.monotonic()
        try:
            data = exchange(port, case.request)
        except OSError as error:
            data = f"no connection: {error}".encode()
            with lock:
                report.failures.append(f"{case}: {error}")
        with lock:
            report.add(case, data, time.monotonic() - start)

    with watched(processes, report), ThreadPoolExecutor(WORKERS) as pool:
        for _ in pool.map(send, (Case(kind, seed, number) for number in range(count) for kind in kinds)):
            pass
        if picture(port) != before:
            report.failures.append(f"{PICTURE} drew another picture after")
    report.seconds = time.monotonic() - began
    return report


def picture(port: int) -> bytes:
    with urlopen(f"http://127.0.0.1:{port}{PICTURE}", timeout=120) as answer:
        return bytes(answer.read())


@contextmanager
def watched(processes: dict[str, psutil.Process], report: Report) -> Iterator[None]:
    """Resident memory of each process, before, at most and after."""
    before = {name: resident(process) for name, process in processes.items()}
    most, stop = dict(before), threading.Event()

    def watch() -> None:
        while not stop.wait(0.1):
            for name, process in processes.items():
                most[name] = max(most[name], resident(process))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        report.memory = {name: (before[name], most[name], resident(processes[name])) for name in processes}


def resident(process: psutil.Process) -> int:
    return int(process.memory_info().rss) >> 20


def front_of(cluster: Cluster) -> dict[str, psutil.Process]:
    """The proxy and the ingress of a local cluster."""
    wanted = {"ProxyActor": "proxy", "APIIngress": "ingress"}
    processes: dict[str, psutil.Process] = {}
    for process in cluster.search():
        command = " ".join(process.cmdline()[:1])
        if command.startswith("ray::"):
            processes |= {name: process for part, name in wanted.items() if part in command}
    return processes


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--run-dir", type=Path, default=RUN_DIR, help="of the local cluster")
    parser.add_argument("--count", type=int, default=26000, help="of requests, all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS, help="only these")
    parser.add_argument("--replay", help="KIND:SEED:NUMBER")
    arguments = parser.parse_args()
    run_dir = arguments.run_dir.resolve()
    cluster = running(run_dir)
    with dashboard_of(LOCAL, run_dir) as dashboard:
        port = int(dashboard.details()["http_options"]["port"])
    if arguments.replay:
        kind, seed, number = arguments.replay.split(":")
        case = Case(kind, int(seed), int(number))
        print(case.request)
        print(exchange(port, case.request))
        return
    kinds = [arguments.kind] if arguments.kind else [*KINDS]
    report = fuzz(port, arguments.count // len(kinds), arguments.seed, front_of(cluster), kinds)
    print(report)
    sys.exit(bool(report.failures))


if __name__ == "__main__":
    run_command(main)
