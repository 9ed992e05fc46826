"""Measures batch generation on the local cluster against the saturated throughput of the engine alone.

    make bench-batch      # starts the local cluster if it is down; exit 1 if the bar is missed

Both draw the same rows with the same buckets on this machine, and take turns. The engine alone has a process of its own
and discards its pictures. The job runs as `make job JOB=batch_generate` submits it, with Ray, PNG and files. Pictures
per second count from the first picture to the last, so start-up is not in them.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.figures import Figure, conclude
from benchmarks.report import OUTPUTS, machine
from cluster.cli import Parser, UserError, run_command
from cluster.connection import LOCAL, dashboard_of, isolate
from cluster.job import follow, submit
from cluster.local.state import RUN_DIR
from jobs.prompts import Row, read
from jobs.replica_config import ReplicaConfig

BAR = 0.95
CONFIG = Path("serve_config.yaml")


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--rows", type=int, default=200, help="of a round (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--engine", type=Path, help=argparse.SUPPRESS)  # for the process that runs the engine alone
    parser.add_argument("--run-dir", type=Path, default=RUN_DIR)
    args = parser.parse_args()
    if args.engine:
        print(engine_alone(args.engine))
        return 0
    run_dir = args.run_dir.resolve()
    isolate(LOCAL, run_dir)
    folder = OUTPUTS / "bench-batch"
    folder.mkdir(parents=True, exist_ok=True)
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(f"a red boat under a yellow sun at dusk, number {i}\n" for i in range(args.rows)))
    figure = Figure(
        "this machine", f"{args.rows} rows", "pictures/s", BAR, at_most=False, against="the engine alone, saturated"
    )
    for _ in range(args.rounds):
        alone = in_a_process(prompts)
        figure.add(by_the_job(prompts, folder / "out", run_dir), alone)
    title = "Batch generation over the saturated engine"
    return conclude("batch", title, [figure], machine(), {"rows": args.rows, "rounds": args.rounds})


def in_a_process(prompts: Path) -> float:
    command = [sys.executable, "-m", "benchmarks.batch", "--engine", str(prompts)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"The engine alone failed: {done.stderr.strip()}")
    return float(done.stdout.split()[-1])


def engine_alone(prompts: Path) -> float:
    """Submits all rows at once, so that the engine is always saturated."""
    from app.diffusion.pipeline import Pipeline
    from app.engine.engine import Engine

    settings = ReplicaConfig.read(CONFIG)
    rows = [row for row in read(prompts, settings) if isinstance(row, Row)]
    pipeline = Pipeline.load(settings.full_batch_spec)
    pipeline.warmup()
    engine = Engine(pipeline, max_waiting=len(rows), gain=settings.args.admission_gain)
    ended: list[float] = []
    engine.start()
    futures = [engine.submit(row.generation) for row in rows]
    for future in futures:
        future.add_done_callback(lambda _: ended.append(time.time()))
    for future in futures:
        future.result()
    engine.close()
    return rate(ended)


def by_the_job(prompts: Path, out: Path, run_dir: Path) -> float:
    shutil.rmtree(out, ignore_errors=True)
    with dashboard_of(LOCAL, run_dir) as dashboard:
        arguments = ["--prompts", str(prompts), "--out", str(out), "--hosts", "1"]
        if status := follow(dashboard, submit(dashboard, "batch_generate", arguments, {})):
            raise UserError(f"The job failed with exit status {status}.")
    return rate([json.loads(line)["ended"] for line in (out / "manifest.jsonl").read_text().splitlines()])


def rate(ended: Sequence[float]) -> float:
    return (len(ended) - 1) / (max(ended) - min(ended))


if __name__ == "__main__":
    run_command(main)
