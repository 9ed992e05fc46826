"""Runs a soak test: a local cluster of its own under mixed load, with a verdict at the end.

    python -m benchmarks.soak                            # an hour; starts a cluster in .run/soak and ends it
    python -m benchmarks.soak --minutes 5
    python -m benchmarks.soak --resume outputs/soak/A    # continues a test that was stopped
    python -m benchmarks.soak --judge outputs/soak/A     # judges the records of a test again

The load consists of equal and mixed requests, streams, clients that hang up or never read, bad requests, bursts, and a
replica that is killed every few minutes. The test fails for a wrong picture, a request without an answer, an error that
no kill explains, growing memory, more open files or threads than before, and requests left unfinished.

Exit status: 0 if the test passed, 1 if not, 2 for a usage error, 130 if interrupted.
"""

import argparse
import asyncio
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks.local_cluster import leave, local_cluster
from benchmarks.soak.records import Run, read
from benchmarks.soak.run import soak
from benchmarks.soak.verdict import Verdict, judge
from cluster import ROOT, processes
from cluster.cli import Parser, UsageError, run_command
from cluster.local.state import RUN_DIR, running
from loadtest.session import Target, described

RATE = 1.2  # clients a second, about half of what two cores can serve
REPLICAS = 2  # at most
OUT = ROOT / "outputs" / "soak"


def begin(options: argparse.Namespace) -> Path:
    if options.minutes <= 0 or options.rate <= 0:
        raise UsageError("--minutes and --rate must be above 0.")
    folder: Path = options.out / time.strftime("%Y%m%d-%H%M%S")
    folder.mkdir(parents=True)
    head = {"started": time.strftime("%Y-%m-%d %H:%M:%S %z"), "seed": options.seed, "rate": options.rate}
    (folder / "soak.json").write_text(json.dumps(head | {"duration_s": 60 * options.minutes}, indent=2) + "\n")
    return folder


def config() -> dict[str, Any]:
    """serve_config.yaml with few enough replicas for a small machine."""
    document: dict[str, Any] = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    for deployment in document["applications"][0]["deployments"]:
        if scaling := deployment.get("autoscaling_config"):
            scaling["max_replicas"] = REPLICAS
    return document


def carry_out(folder: Path) -> bool:
    run_dir = RUN_DIR / "soak"
    with local_cluster(run_dir, config()) as url:
        model = asyncio.run(described(Target(url)))
        assert model, "our own API describes its model"
        interrupted = asyncio.run(soak(folder, url, running(run_dir), model))
        signal.signal(signal.SIGTERM, leave)  # asyncio removed it
    return interrupted


def report(folder: Path) -> Verdict:
    from benchmarks.soak.chart import draw

    run = read(folder)
    verdict = judge(run)
    facts = {"passed": verdict.passed, "reasons": verdict.reasons, "notes": verdict.notes, **verdict.figures}
    (folder / "verdict.json").write_text(json.dumps(facts, indent=2) + "\n")
    draw(run, folder / "soak.png")
    tell(run, verdict)
    print(f"Picture   {folder / 'soak.png'}")
    print(f"Figures   {folder / 'verdict.json'}")
    return verdict


def tell(run: Run, verdict: Verdict) -> None:
    figures = verdict.figures
    sessions = f" in {figures['sessions']} sessions" if figures["sessions"] > 1 else ""
    print(f"Load      {figures['minutes']:.1f} of {run.head['duration_s'] / 60:g} minutes{sessions}")
    print(f"Requests  {figures['requests']}, {figures['compared']} compared with the answer to a client alone")
    for kind, outcomes in figures["outcomes"].items():
        print(f"          {kind}: {', '.join(f'{count} {outcome}' for outcome, count in outcomes.items())}")
    for kill in figures["kills"]:
        took = "never" if kill["recovered_s"] is None else f"{kill['recovered_s']:.0f} s"
        print(f"Kill      at {kill['t']:.0f} s; another replica answered after {took}")
    for kind, trend in figures["trends"].items():
        print(f"Memory    {kind}: {trend['mb_per_hour']:+.1f} MB an hour (at most {trend['most']:g})")
    for note in verdict.notes:
        print(f"Note      {note}")
    for reason in verdict.reasons:
        print(f"FAILED    {reason}")
    print("Verdict   " + ("passed" if verdict.passed else "failed"))


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--minutes", type=float, default=60, help="of load (%(default)s)")
    parser.add_argument("--rate", type=float, default=RATE, help="clients a second on average (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the load and the kills (%(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="where the test gets a folder (%(default)s)")
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="continue a test that was stopped")
    parser.add_argument("--judge", type=Path, metavar="FOLDER", help="only judge a test")
    options = parser.parse_args()
    os.environ.update(processes.past_proxies())
    if options.judge:
        return int(not report(options.judge).passed)
    if options.resume and read(options.resume).ends:
        raise UsageError(f"{options.resume} is complete: nothing is left to do.")
    folder: Path = options.resume or begin(options)
    signal.signal(signal.SIGTERM, leave)
    print(f"Folder    {folder}", flush=True)
    interrupted = carry_out(folder)
    verdict = report(folder)
    if interrupted:
        print(f"Continue with: make soak RESUME={folder}")
        return 130
    return int(not verdict.passed)


if __name__ == "__main__":
    run_command(main)
