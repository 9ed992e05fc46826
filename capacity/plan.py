"""Plans how many TPU hosts a load needs, and what they cost. For each TPU type it compiles the programs
(capacity/check.py) and simulates the engine with their modelled times under the load (capacity/simulate.py):

    python -m capacity.plan --config configs/sd14.yaml --rate 5 --slo 10

Requests come at random, at RATE pictures a second in all. Where there are several hosts, of one replica each, the
ingress's queue and router share the requests out. 95 % of them are to be answered within SLO seconds, and none refused.
All is modelled, and the host's own work is not in it.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from capacity.check import check, evaluations_of, schedule_of
from capacity.check_report import wide_console
from capacity.chips import PRICES_OF
from capacity.configs import Workload, hosts_of, workload_of
from capacity.fragments import write_fragments
from capacity.libtpu import missing
from capacity.planner import Plan, plan_hosts
from cluster.cli import Parser, UsageError, UserError, run_command
from cluster.terminal import say

DEFAULT_TPUS = "v4-8,v5litepod-4,v5p-8,v6e-4"  # a host of four chips of each


def table_of(plans: Sequence[Plan], rate: float, slo_s: float) -> Table:
    title = f"{rate:g} pictures a second, 95 % of them within {slo_s:g} s; modelled and simulated"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    table.add_column("TPU", no_wrap=True)
    columns = ("buckets", "slots", "images/s/host", "alone s", "hosts", "p50 s", "p95 s", "$/hour", "$ per 1000")
    for column in columns:
        table.add_column(column, justify="right")
    for plan in plans:
        begin = (plan.host.accelerator_type, " ".join(map(str, plan.buckets)), str(plan.slots))
        speed = (f"{plan.images_s:.2f}", f"{plan.alone_s:.2f}")
        if plan.simulated is None:
            table.add_row(*begin, *speed, "none")
            continue
        waits = (f"{plan.simulated.percentile(50):.2f}", f"{plan.simulated.percentile(95):.2f}")
        dollars = (f"{plan.dollars_hour:.2f}", f"{1000 * plan.dollars_hour / 3600 / rate:.2f}")
        table.add_row(*begin, *speed, str(plan.hosts), *waits, *dollars)
    return table


def report(plans: Sequence[Plan], workload: Workload, rate: float, slo_s: float) -> dict[str, Any]:
    return {
        "modelled": True,
        "served": asdict(workload.spec),
        "rate": rate,
        "slo_s": slo_s,
        "prices": PRICES_OF,
        "plans": [
            {
                "tpu": plan.host.accelerator_type,
                "buckets": plan.buckets,
                "slots": plan.slots,
                "images_s_host": plan.images_s,
                "alone_s": plan.alone_s if math.isfinite(plan.alone_s) else None,
                "hosts": plan.hosts,
                "p50_s": plan.simulated.percentile(50) if plan.simulated else None,
                "p95_s": plan.simulated.percentile(95) if plan.simulated else None,
                "dollars_hour": plan.dollars_hour,
                "why_not": plan.why_not,
            }
            for plan in plans
        ],
    }


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError
    return value


def command() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--config", type=Path, default=Path("serve_config.yaml"))
    parser.add_argument(
        "--model", default="", help="in place of the config's, in bfloat16: a folder, demo, or a preset's name"
    )
    parser.add_argument("--size", default="", help="in place of the config's: WIDTHxHEIGHT")
    parser.add_argument("--rate", required=True, help="pictures a second, of all hosts together")
    parser.add_argument("--slo", required=True, help="seconds within which 95 %% of them are answered")
    parser.add_argument("--tpu", default="", help=f"types to compare; {DEFAULT_TPUS}")
    parser.add_argument("--out", type=Path, default=Path("outputs/tpu-plan"), help="where figures and fragments go")
    parser.add_argument("--dollars", default="", help="of a chip's hour, in place of the list's: v5e=0.9,v6e=1.5")
    parser.add_argument("--cache", type=Path, default=Path(".cache/tpu-prices"))
    arguments = parser.parse_args()
    numbers = {}
    for name in ("rate", "slo"):
        try:
            numbers[name] = positive(getattr(arguments, name))
        except ValueError:
            value = getattr(arguments, name) or "nothing"
            raise UsageError(f"{name.upper()} must be a number above 0, got {value}.") from None
    rate, slo_s = numbers["rate"], numbers["slo"]
    if reason := missing():
        raise UsageError(reason)
    try:
        workload = workload_of(arguments.config, arguments.model, arguments.size)
        costs = check(
            workload, hosts_of(arguments.tpu or DEFAULT_TPUS, Path("cluster.yaml"), arguments.dollars), arguments.cache
        )
    except UserError as error:
        raise UsageError(str(error)) from None
    _, evaluations = evaluations_of(workload, schedule_of(workload))
    plans = [plan_hosts(host_costs, workload, evaluations, rate, slo_s) for host_costs in costs]
    wide_console().print(table_of(plans, rate, slo_s))
    for plan in plans:
        if plan.why_not:
            say(f"{plan.host.accelerator_type}: {plan.why_not}.")
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "plan.json").write_text(json.dumps(report(plans, workload, rate, slo_s), indent=1) + "\n", "utf-8")
    good = [plan for plan in plans if plan.simulated]
    if not good:
        return 1
    for plan in good:
        write_fragments(plan, workload, rate, arguments.out)
    cheapest = min(good, key=lambda plan: plan.dollars_hour)
    folder = arguments.out / cheapest.host.accelerator_type
    say(f"Cheapest: {cheapest.host.accelerator_type}. What to change for it: {folder}/serve_config.yaml, cluster.yaml.")
    say(f"Dollars: Google's {PRICES_OF}, or DOLLARS=.")
    return 0


if __name__ == "__main__":
    run_command(command)
