"""A load test for text-to-image servers.

    python -m loadtest run steady --rate 3         # runs a scenario; flags override it; the report is an HTML file
    python -m loadtest --num_requests 1024 --batch_size 128 --save_pictures      # the predecessor's flags
    python -m loadtest sweep --duration 30         # raises the rate to find the knee
    python -m loadtest compare outputs/loadtest/A outputs/loadtest/B
    python -m loadtest run --resume outputs/loadtest/A       # continues a run that was killed
    python -m loadtest report outputs/loadtest/A   # writes summary.json, requests.csv and report.html again

Exit status: 0; 1 if a request failed; 2 for a usage error; 3 if the run is invalid because the load generator was late;
130 if interrupted.
"""

import argparse
import asyncio
import json
import os
import shutil
import sys
import time
from pathlib import Path

from rich.console import Console

from cluster import processes
from cluster.cli import UsageError, UserError, run_command
from cluster.connection import authorization
from cluster.dashboard import Dashboard, Refused, serve_address
from cluster.local.state import Cluster
from cluster.remote.preflight import token_file
from loadtest import compare, report
from loadtest.contact import contact_sheet_of
from loadtest.options import ARRIVALS, RESUMED, VERBS, parser, refuse, scenario_of
from loadtest.plan import plan
from loadtest.records import read
from loadtest.scenario import parse
from loadtest.session import Target, begin, carry_out, described, guard
from loadtest.summary import Summary, counted, seconds, summarize
from loadtest.sweep import Level, sweep

FALLBACK = "http://127.0.0.1:8000"


def local(run_dir: Path) -> tuple[str | None, Dashboard | None]:
    """The addresses of the API and of the dashboard of this checkout's local cluster. Raises UserError if the cluster
    is up and refuses us."""
    cluster = Cluster.load(run_dir.resolve())
    if not cluster or cluster.missing:
        return None, None
    dashboard = cluster.dashboard
    try:
        details = dashboard.details()
    except Refused:
        raise
    except (UserError, OSError):
        return None, None
    return (serve_address(details) if details["applications"] else None), dashboard


def target_of(options: argparse.Namespace) -> Target:
    if options.url and options.ip:
        raise UsageError("--url and --ip exclude one another.")
    try:
        address, dashboard = local(options.run_dir)
    except UserError as reason:
        if not options.url and not options.ip:
            raise
        print(f"The cluster in this checkout is not watched: {reason}", file=sys.stderr, flush=True)
        address, dashboard = None, None
    host = f"[{options.ip}]" if options.ip and ":" in options.ip else options.ip
    url = guard(options.url or (f"http://{host}:8000" if host else address or FALLBACK), options.allow_remote)
    if options.dashboard:
        headers = authorization() if token_file().exists() else {}
        return Target(url, Dashboard(guard(options.dashboard, options.allow_remote), headers=headers))
    return Target(url, dashboard if url == address else None)


def run(options: argparse.Namespace) -> int:
    if options.resume:
        refuse(options, (*ARRIVALS, *RESUMED), "--resume continues a run unchanged")
        folder = options.resume
        before = read(folder)
        if before.ended == "complete":
            raise UsageError(f"{folder} is complete: nothing is left to send.")
        options.url = options.url or before.head["url"]
        target = target_of(options)
        asyncio.run(described(target))
    else:
        options.scenario = options.scenario or options.named
        name, scenario = scenario_of(options)
        requests = plan(scenario)  # first, as it reports mistakes in the scenario
        target = target_of(options)
        folder = new_folder(options.out, name)
        begin(scenario, requests, name, target, folder, asyncio.run(described(target)))
    keep = options.save_pictures or options.save_each
    ended = asyncio.run(carry_out(folder, target, keep_pictures=keep))
    summary = report.write(read(folder))
    print_summary(summary, folder)
    if options.save_pictures and (sheet := contact_sheet_of(read(folder))):
        print(f"Pictures    {sheet}")
    if keep and not options.save_each:
        shutil.rmtree(folder / "pictures")
    if ended == "interrupted":
        return 130
    return 1 if summary["failed"] else 3 if summary["invalid"] else 0


def run_sweep(options: argparse.Namespace) -> int:
    if options.first <= 0 or options.factor <= 1 or options.most < options.first:
        raise UsageError("A sweep needs --from above 0, --factor above 1 and --most not below --from.")
    refuse(options, ARRIVALS, "A sweep chooses its own rates")
    name, scenario = scenario_of(options)
    objective_s = 10.0 if scenario.objective_s is None else scenario.objective_s
    duration_s = 20.0 if options.duration is None else options.duration
    kind = {"process": options.process or ("poisson" if options.cv is None else "gamma")}
    kind |= {} if options.cv is None else {"cv": options.cv}
    target = target_of(options)
    model = asyncio.run(described(target))
    sweep_folder = new_folder(options.out, f"sweep-{name}")
    sweep_folder.mkdir(parents=True)
    interrupted = False

    def at(rate: float) -> Summary:
        nonlocal interrupted
        arrivals = {**kind, "stages": [{"rate": rate, "duration_s": duration_s}]}
        base = scenario.model_dump(mode="json", exclude_none=True)
        level = parse(base, "The sweep", {"arrivals": arrivals, "objective_s": objective_s})
        folder = sweep_folder / f"{rate:08.3f}"
        begin(level, plan(level), f"{name} at {rate:.3g}/s", target, folder, model)
        interrupted = asyncio.run(carry_out(folder, target, keep_pictures=False)) == "interrupted"
        return report.write(read(folder))

    levels: list[Level] = []
    for level in sweep(at, options.first, options.factor, options.most, objective_s):
        levels.append(level)
        p95 = seconds((level.summary["latency"] or {}).get("p95"))
        print(
            f"{level.rate:8.3g}/s  p95 {p95:>8}  {'holds' if level.held else 'does not hold: ' + level.why}", flush=True
        )
        if interrupted:
            return 130
    knee = max((level.rate for level in levels if level.held), default=None)
    facts = [{"rate": level.rate, "held": level.held, "why": level.why, "summary": level.summary} for level in levels]
    (sweep_folder / "sweep.json").write_text(json.dumps({"knee": knee, "levels": facts}, indent=2) + "\n")
    (sweep_folder / "sweep.html").write_text(report.sweep_page(name, target.url, levels, objective_s, knee))
    if knee is None:
        print(f"Knee        below {options.first:g} requests a second: {levels[0].why}")
    else:
        least = "at least " if all(level.held for level in levels) else ""
        print(f"Knee        {least}{knee:.3g} requests a second, 95 % within {objective_s:g} s")
    print(f"Report      {sweep_folder / 'sweep.html'}")
    return 1 if knee is None else 0


def new_folder(out: Path, name: str) -> Path:
    stamp = out / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder, count = stamp, 1
    while folder.exists():
        count += 1
        folder = Path(f"{stamp}-{count}")
    return folder


def print_summary(summary: Summary, folder: Path) -> None:
    latency = summary["latency"] or {}
    if not summary["complete"]:
        print(f"Ended       {summary['ended']} before the end; continue with: --resume {folder}")
    print(f"Requests    {counted(summary['requests'], summary['planned'])}, {summary['failed']} failed")
    for error in summary["errors"]:
        print(f"            {error['count']} {error['outcome']}: {error['example']}")
    print(f"Rate        {summary['completed_per_s']:.3g}/s completed, {summary['images_per_s']:.3g} images/s")
    quantiles = [
        f"{name} {seconds(latency[name])}" for name in ("p50", "p90", "p95", "p99", "p99.9") if latency.get(name)
    ]
    if latency:
        print(f"Latency     {', '.join(quantiles)}, max {seconds(latency['max'])}, from the intended times")
    if summary["goodput_share"] is not None:
        print(f"Goodput     {summary['goodput_share']:.1%} within {seconds(summary['objective_s'])}")
    if summary["most"]:
        most = summary["most"]
        ends = f"{most['replicas_at_end']} on {most['nodes_at_end']}"
        print(f"Cluster     most replicas {most['replicas']}, on nodes {most['nodes']}; in the end {ends}")
    for scale_up in summary["scale_ups"]:
        parts = ", ".join(f"{name} {seconds(part)}" for name, part in scale_up["phases"].items() if part is not None)
        print(f"Scale-up    {seconds(scale_up['total'])}: {parts}")
    if summary["moved"] or summary["restarted"]:
        print(f"Moves       {summary['moved']} requests changed replicas, {summary['restarted']} began again")
    for reason in summary["invalid"]:
        print(f"INVALID     {reason}")
    print(f"Report      {folder / 'report.html'}")


def main() -> int:
    arguments = sys.argv[1:]
    if not arguments or (arguments[0] not in VERBS and arguments[0] not in ("-h", "--help")):
        arguments = ["run", *arguments]
    options = parser(__doc__).parse_args(arguments)
    os.environ.update(processes.past_proxies())
    match options.verb:
        case "run":
            return run(options)
        case "sweep":
            return run_sweep(options)
        case "ready":
            return int(local(options.run_dir)[0] is None)
        case "report":
            done = read(options.folder)
            print_summary(report.write(done), options.folder)
            return 0
    a, b = (summarize(read(folder)) for folder in (options.a, options.b))
    console = Console()
    console.print(compare.table(a, b, [f"A {options.a.name}", f"B {options.b.name}"]))
    for line in compare.differences(a, b):
        console.print(line)
    return 0


if __name__ == "__main__":
    run_command(main)
