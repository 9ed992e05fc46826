"""Measures the load generator of loadtest/: its highest rate, and the error of its percentiles.

    python -m benchmarks.loadgen          # exit 1 if a bar is missed; measures wrk as well if it is installed

Rate: the highest rate at which all requests are sent on time and answered. The generator has one core and checks the
pictures; a server that answers immediately has another. wrk is measured in a closed loop with 16 connections.

Percentiles: a server delays each answer by a time from a known distribution with a tail. The generator's percentiles
are compared with the delays that the server measured itself. wrk gets other delays of the same distribution, so its
figures are only reported.
"""

import argparse
import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
from PIL import Image
from rich import box
from rich.table import Table

from benchmarks.report import machine, write
from cluster import ROOT
from cluster.cli import Parser, run_command
from loadtest.percentiles import PERCENTILES

RATE_BAR = 1000.0  # requests a second
SHARE_BAR, FLOOR_BAR_S = 0.02, 0.001
RATES = (500, 1000, 1250, 1500, 1750, 2000, 2500, 3000)
MEDIAN_S, SIGMA = 0.2, 0.4  # of the log-normal delays, which are about those of the demo model
TAIL_S, TAIL = 1.0, 0.03  # seconds added to this share of the delays
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


class PictureProtocol(asyncio.Protocol):
    """Only as much of HTTP as GET needs, so that the server is not the bottleneck."""

    def __init__(self, server: "PictureServer") -> None:
        self.server = server
        self.buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            line, self.buffer = self.buffer[:end], self.buffer[end + 4 :]
            self.server.answer(line, self.transport)


class PictureServer:
    def __init__(self, delayed: bool) -> None:
        self.delays: Iterator[float] | None = drawn_delays() if delayed else None
        self.injected: list[float] = []
        pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        file = BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        self.picture = response(file.getvalue(), "image/png")

    def answer(self, line: bytes, transport: asyncio.Transport) -> None:
        if line.startswith(b"GET /delays"):
            transport.write(response(json.dumps(self.injected).encode(), "application/json"))
        elif not line.startswith(b"GET /imagine"):
            transport.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
        elif self.delays is None:
            transport.write(self.picture)
        else:
            self.injected.append(0.0)
            loop, number, came = asyncio.get_running_loop(), len(self.injected) - 1, time.perf_counter()
            loop.call_later(next(self.delays), self.late, number, came, transport)

    def late(self, number: int, came: float, transport: asyncio.Transport) -> None:
        """Answers, and records the real delay: a timer may itself be a millisecond late."""
        self.injected[number] = time.perf_counter() - came
        transport.write(self.picture)


def response(body: bytes, kind: str) -> bytes:
    return f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def drawn_delays() -> Iterator[float]:
    rng = np.random.default_rng(7)
    while True:
        yield float(MEDIAN_S * np.exp(SIGMA * rng.standard_normal()) + TAIL_S * (rng.random() < TAIL))


async def serve(delayed: bool) -> None:
    server = PictureServer(delayed)
    listening = await asyncio.get_running_loop().create_server(lambda: PictureProtocol(server), "127.0.0.1", 0)
    print(listening.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)  # until the parent process closes the pipe


def pinned(core: int) -> list[str]:
    """A command prefix that pins a process to a core, if there are two cores and taskset."""
    if len(CORES) < 2 or not shutil.which("taskset"):
        return []
    return ["taskset", "--cpu-list", str(CORES[core])]


@contextmanager
def server(kind: str) -> Iterator[str]:
    command = [*pinned(1), sys.executable, "-m", "benchmarks.loadgen", "--serve", kind]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdin
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.stdin.close()


def run_loadtest(url: str, process: str, rate: float, duration_s: float) -> dict[str, Any]:
    """The summary of a run of `python -m loadtest`."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(*pinned(0), sys.executable, "-m", "loadtest", "--url", url, "--process", process, "--rate", f"{rate:g}"),
            *("--duration", f"{duration_s:g}", "--endpoint", "imagine", "--max-requests", "1000000", "--warmup", "1"),
            *("--out", folder, "--run-dir", folder),
        ]
        subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False)
        (path,) = Path(folder).glob("*/summary.json")
        summary: dict[str, Any] = json.loads(path.read_text())
        return summary


def wrk(url: str, connections: int, duration_s: float) -> dict[str, float] | None:
    """wrk's requests per second, and its percentiles in seconds; None if it is not installed."""
    if not shutil.which("wrk"):
        return None
    command = [*pinned(0), "wrk", "-t1", f"-c{connections}", f"-d{duration_s:.0f}s", "--latency", f"{url}/imagine"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    units = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
    percentiles = {
        f"p{p}": float(value) * units[unit] for p, value, unit in re.findall(r"(\d+)%\s+([\d.]+)(us|ms|s)\b", output)
    }
    rate = re.search(r"Requests/sec:\s+([\d.]+)", output)
    assert rate, output
    return percentiles | {"rate": float(rate[1])}


def highest_rate(duration_s: float, table: Table) -> tuple[float, list[dict[str, Any]]]:
    highest, levels = 0.0, []
    with server("at-once") as url:
        beside = wrk(url, 16, duration_s)
        for rate in RATES:
            summary = run_loadtest(url, "constant", rate, duration_s)
            good = not summary["invalid"] and not summary["failed"] and summary["completed_per_s"] > 0.99 * rate
            lag, latency = summary["send_lag"], summary["latency"]
            table.add_row(
                *(f"{rate}/s", f"p50 {1e3 * latency['p50']:.2f}", "", f"send lag p99 {1e3 * lag['p99']:.2f}", ""),
                "on time" if good else "too late" if summary["invalid"] else f"{summary['failed']} failed",
            )
            levels.append(
                {"rate": rate, "on_time": good, "send_lag": lag["p99"], "completed": summary["completed_per_s"]}
            )
            if not good:
                break
            highest = rate
    if beside:
        table.add_row("as fast as it goes", "", "", "", f"{beside['rate']:.0f}/s", "")
    return highest, levels


def errors(rate: float, duration_s: float, table: Table) -> list[dict[str, Any]]:
    compared: list[dict[str, Any]] = []
    with server("delayed") as url:
        summary = run_loadtest(url, "poisson", rate, duration_s)
        if summary["invalid"]:  # for example because this machine is busy with other work
            table.caption = f"The run with these percentiles is invalid: {'; '.join(summary['invalid'])}."
        with urlopen(f"{url}/delays") as answer:
            injected = json.load(answer)
    with server("delayed") as url:
        beside = wrk(url, round(rate * MEDIAN_S), duration_s / 2) or {}
    injected = injected[len(injected) - summary["latency"]["count"] :]  # drops those of the warm-up
    for p in PERCENTILES:
        true, reported = float(np.percentile(injected, p, method="inverted_cdf")), summary["latency"][f"p{p:g}"]
        if reported is None:
            continue
        error = abs(reported - true)
        met = error <= max(FLOOR_BAR_S, SHARE_BAR * true)
        other = beside.get(f"p{p:g}")
        table.add_row(
            f"p{p:g}",
            f"{1e3 * reported:.2f}",
            f"{1e3 * true:.2f}",
            f"{1e3 * (reported - true):+.2f}, {(reported - true) / true:+.2%}",
            f"{1e3 * other:.1f}" if other else "",
            "met" if met else "MISSED",
        )
        compared.append({"percentile": p, "true": true, "ours": reported, "wrk": other, "met": met})
    return compared


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--serve", choices=("at-once", "delayed"), help=argparse.SUPPRESS)
    parser.add_argument("--part", choices=("rate", "percentiles", "all"), default="all", help="(%(default)s)")
    parser.add_argument("--quick", action="store_true", help="short runs, as a check")
    arguments = parser.parse_args()
    if arguments.serve:
        asyncio.run(serve(arguments.serve == "delayed"))
        return 0
    before = machine()
    title = "The load generator on one core, its server on another"
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    for heading in ("", "ours, ms", "true, ms", "off by, ms", "wrk", ""):
        table.add_column(heading)
    part, quick = arguments.part, arguments.quick
    highest, levels = highest_rate(3 if quick else 10, table) if part != "percentiles" else (None, [])
    if highest is not None:
        verdict = f"≥ {RATE_BAR:g} {'met' if highest >= RATE_BAR else 'MISSED'}"
        table.add_row("highest on time", f"{highest:g}/s", "", "", "", verdict)
        table.add_section()
    percentiles = errors(100, 10 if quick else 60, table) if part != "rate" else []
    result = {"machine": before, "highest_rate": highest, "levels": levels, "percentiles": percentiles}
    write("loadgen" if part == "all" and not quick else "loadgen-part", result, table)
    missed = any(not compared["met"] for compared in percentiles)
    return int(missed or (highest is not None and highest < RATE_BAR))


if __name__ == "__main__":
    run_command(main)
