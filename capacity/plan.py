"""Plans how many TPU hosts a load needs, and what they cost. For each TPU type it compiles the programs
(capacity/check.py) and simulates the engine with their modelled times under the load (capacity/simulate.py):

    python -m capacity.plan --config configs/sd14.yaml --rate 5 --slo 10

Requests come at random, at RATE pictures a second in all, divided at random among hosts of one replica each; 95 % of
them are to be answered within SLO seconds, and none refused. All is modelled, and the host's own work is not in it.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from capacity.check import WIDTH, check, evaluations_of, scheduler_of
from capacity.chips import PRICES_OF, Host
from capacity.configs import Workload, hosts_of, workload_of
from capacity.host_costs import HostCosts, label
from capacity.libtpu import missing
from capacity.model_names import MODEL_NAMES
from capacity.simulate import Load, Simulated, Timings, simulate
from cluster.cli import Parser, UsageError, UserError, run_command
from cluster.config.cluster_config import ACCELERATOR_LABEL, RUNTIMES, Slice
from cluster.terminal import say
from loadtest.arrivals import Seconds, poisson

DEFAULT_TPUS = "v4-8,v5litepod-4,v5p-8,v6e-4"  # a host of four chips of each
MOST_HOSTS = 64
LOAD_S = 600.0  # length of the simulated load, unless that makes too few or too many requests
FEWEST_REQUESTS, MOST_REQUESTS = 200, 4000  # of the simulated load
ROOM = 32  # of max_ongoing_requests, above what the engine holds, for health questions
SPARE = 1.25  # replicas that the autoscaler may add beyond what the rate needs on average


@dataclass(frozen=True)
class Plan:
    """The hosts of one type that meet the target, or why none do."""

    host: Host
    buckets: tuple[int, ...]  # those that fit, up to the fastest
    images_s: float  # images a second of a busy host
    alone_s: float  # time of an image on an idle host
    hosts: int = 0
    simulated: Simulated | None = None
    why_not: str = ""

    @property
    def slots(self) -> int:
        return 2 * self.buckets[-1] if self.buckets else 0

    @property
    def dollars_hour(self) -> float:
        return self.hosts * self.host.dollars_hour


def plan_hosts(costs: HostCosts, workload: Workload, evaluations: int, rate: float, slo_s: float) -> Plan:
    """The fewest hosts that meet the target with the engine's own admission."""
    size, guided = workload.spec.sizes[0], workload.guidance_scale > 1
    throughputs = costs.throughputs(size, workload.spec.batch_buckets, evaluations, 1 + guided)
    if not throughputs:
        return Plan(costs.host, (), 0.0, math.inf, why_not="its programs do not fit")
    best = min(throughputs, key=lambda throughput: throughput.image_s)
    buckets = tuple(throughput.images for throughput in throughputs if throughput.images <= best.images)
    alone_s = throughputs[0].image_s
    draft = Plan(costs.host, buckets, 1 / best.image_s, alone_s)
    if alone_s > slo_s:
        return replace(draft, why_not=f"a picture takes {alone_s:.2f} s alone, more than the {slo_s:g} s asked for")
    encode = costs.cost("encode")
    timings = Timings(
        {rows: cost.seconds for rows, cost in costs.steps(size).items() if rows <= 2 * best.images},
        {images: cost.seconds for images, cost in costs.decodes(size).items()},
        encode.seconds if encode else 0.0,
        slots=draft.slots,
    )
    args = workload.args
    images_at_once = None if args.images_at_once == "auto" else args.images_at_once
    for hosts in range(max(1, math.floor(rate * best.image_s)), MOST_HOSTS + 1):
        load = Load(arrivals_at(rate / hosts), evaluations, guided)
        simulated = simulate(
            timings, load, gain=args.admission_gain, max_waiting=args.max_waiting, images_at_once=images_at_once
        )
        if not simulated.refused and simulated.percentile(95) <= slo_s:
            return replace(draft, hosts=hosts, simulated=simulated)
    return replace(draft, why_not=f"{MOST_HOSTS} hosts are not enough")


def arrivals_at(rate: float) -> Seconds:
    """Random arrivals at one host, `rate` a second. They are the same in each call."""
    count = min(MOST_REQUESTS, max(FEWEST_REQUESTS, round(rate * LOAD_S)))
    return poisson(count, np.random.default_rng(0)) / rate


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


def serve_fragment(plan: Plan, workload: Workload, rate: float) -> dict[str, Any]:
    """The part of a serve config that the plan changes."""
    assert plan.simulated is not None
    ongoing = rate / plan.hosts * float(plan.simulated.latencies.mean())  # Little's law
    most = plan.slots * len(workload.spec.sizes) + workload.args.max_waiting + ROOM
    return {
        "applications": [
            {
                "args": {
                    "model": MODEL_NAMES.get(workload.spec.model, workload.spec.model),
                    "dtype": workload.spec.dtype,
                    "sizes": [label(size) for size in workload.spec.sizes],
                    "batch_buckets": list(plan.buckets),
                },
                "deployments": [
                    {
                        "name": "StableDiffusion",
                        "max_ongoing_requests": most,
                        "autoscaling_config": {
                            "min_replicas": plan.hosts,
                            "max_replicas": math.ceil(SPARE * plan.hosts),
                            "target_ongoing_requests": max(1, math.ceil(ongoing)),
                        },
                        "ray_actor_options": {"resources": {"TPU": plan.host.chips}},
                    }
                ],
            }
        ]
    }


def cluster_fragment(plan: Plan) -> dict[str, Any]:
    """The part of a cluster file that the plan changes. The zone must have this TPU."""
    most = math.ceil(SPARE * plan.hosts)
    tpu = Slice(plan.host.accelerator_type)
    return {
        "max_workers": most,
        "available_node_types": {
            "ray_tpu": {
                "min_workers": plan.hosts,
                "max_workers": most,
                "resources": {"CPU": 8, "TPU": plan.host.chips},
                "labels": {ACCELERATOR_LABEL: tpu.label},
                "node_config": {"acceleratorType": tpu.name, "runtimeVersion": RUNTIMES[tpu.generation]},
            }
        },
    }


def write_fragments(plan: Plan, workload: Workload, rate: float, folder: Path) -> Path:
    subfolder = folder / plan.host.accelerator_type
    subfolder.mkdir(parents=True, exist_ok=True)
    for name, fragment in (
        ("serve_config.yaml", serve_fragment(plan, workload, rate)),
        ("cluster.yaml", cluster_fragment(plan)),
    ):
        head = f"# `make tpu-plan` for {rate:g} pictures a second, modelled: what to change in your {name}.\n"
        (subfolder / name).write_text(head + yaml.safe_dump(fragment, sort_keys=False), "utf-8")
    return subfolder


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
    _, evaluations = evaluations_of(workload, scheduler_of(workload))
    plans = [plan_hosts(host_costs, workload, evaluations, rate, slo_s) for host_costs in costs]
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=WIDTH)
    console.print(table_of(plans, rate, slo_s))
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
