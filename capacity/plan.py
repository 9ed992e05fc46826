"""Which TPU for which load: prices the programs for several types (capacity/check.py), runs the engine on those
prices under the load (capacity/simulate.py), and says how many hosts of each meet the target and what they cost:

    python -m capacity.plan --config configs/sd14.yaml --rate 5 --slo 10

Requests come at random, at RATE pictures a second in all, divided at random among hosts of one replica each; 95 % of
them are to be answered within SLO seconds, and none refused. All is modelled, and the host's own work is not in it.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from capacity.check import WIDTH, check, evaluations_of, scheduler_of
from capacity.chips import PRICES_OF, Host
from capacity.configs import Asked, asked_of, hosts_of
from capacity.hosts import Priced, label
from capacity.libtpu import missing
from capacity.served import NAMES
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
    """For one type. Without `hosts`, why there is no plan."""

    host: Host
    buckets: tuple[int, ...]  # that fit, up to the one that makes most pictures a second
    images_s: float  # of a host that always has work
    alone_s: float  # a picture that has a host to itself
    hosts: int = 0
    simulated: Simulated | None = None
    why_not: str = ""

    @property
    def slots(self) -> int:
        return 2 * self.buckets[-1] if self.buckets else 0

    @property
    def dollars_hour(self) -> float:
        return self.hosts * self.host.dollars_hour


def plan(priced: Priced, asked: Asked, evaluations: int, rate: float, slo_s: float) -> Plan:
    """The fewest hosts that meet the target with the engine's own admission."""
    size, guided = asked.served.sizes[0], asked.guidance_scale > 1
    rates = priced.rates(size, asked.served.batch_buckets, evaluations, 1 + guided)
    if not rates:
        return Plan(priced.host, (), 0.0, math.inf, why_not="its programs do not fit")
    best = min(rates, key=lambda one: one.image_s)
    buckets = tuple(one.images for one in rates if one.images <= best.images)
    alone_s = next(one.image_s for one in rates)
    about = Plan(priced.host, buckets, 1 / best.image_s, alone_s)
    if alone_s > slo_s:
        return failed(about, f"a picture takes {alone_s:.2f} s alone, more than the {slo_s:g} s asked for")
    encode = priced.price("encode")
    timings = Timings(
        {rows: price.seconds for rows, price in priced.steps(size).items() if rows <= 2 * best.images},
        {images: price.seconds for images, price in priced.decodes(size).items()},
        encode.seconds if encode else 0.0,
        slots=about.slots,
    )
    for hosts in range(max(1, math.floor(rate * best.image_s)), MOST_HOSTS + 1):
        load = Load(arrivals_at(rate / hosts), evaluations, guided)
        args = asked.args
        fixed = None if args.images_at_once == "auto" else args.images_at_once
        found = simulate(timings, load, gain=args.admission_gain, max_waiting=args.max_waiting, images_at_once=fixed)
        if not found.refused and found.percentile(95) <= slo_s:
            return Plan(about.host, buckets, about.images_s, alone_s, hosts, found)
    return failed(about, f"{MOST_HOSTS} hosts are not enough")


def arrivals_at(rate: float) -> Seconds:
    """Random arrivals at one host, `rate` a second. They are the same in each call."""
    count = min(MOST_REQUESTS, max(FEWEST_REQUESTS, round(rate * LOAD_S)))
    return poisson(count, np.random.default_rng(0)) / rate


def failed(about: Plan, why_not: str) -> Plan:
    return Plan(about.host, about.buckets, about.images_s, about.alone_s, why_not=why_not)


def table_of(plans: Sequence[Plan], rate: float, slo_s: float) -> Table:
    title = f"{rate:g} pictures a second, 95 % of them within {slo_s:g} s; modelled and simulated"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    table.add_column("TPU", no_wrap=True)
    columns = ("buckets", "slots", "images/s/host", "alone s", "hosts", "p50 s", "p95 s", "$/hour", "$ per 1000")
    for column in columns:
        table.add_column(column, justify="right")
    for one in plans:
        begin = (one.host.accelerator_type, " ".join(map(str, one.buckets)), str(one.slots))
        speed = (f"{one.images_s:.2f}", f"{one.alone_s:.2f}")
        if one.simulated is None:
            table.add_row(*begin, *speed, "none")
            continue
        waits = (f"{one.simulated.percentile(50):.2f}", f"{one.simulated.percentile(95):.2f}")
        dollars = (f"{one.dollars_hour:.2f}", f"{1000 * one.dollars_hour / 3600 / rate:.2f}")
        table.add_row(*begin, *speed, str(one.hosts), *waits, *dollars)
    return table


def serve_fragment(one: Plan, asked: Asked, rate: float) -> dict[str, Any]:
    """What to change in a serve config."""
    assert one.simulated is not None
    ongoing = rate / one.hosts * float(one.simulated.latencies.mean())  # Little's law
    most = one.slots * len(asked.served.sizes) + asked.args.max_waiting + ROOM
    return {
        "applications": [
            {
                "args": {
                    "model": NAMES.get(asked.served.model, asked.served.model),
                    "dtype": asked.served.dtype,
                    "sizes": [label(size) for size in asked.served.sizes],
                    "batch_buckets": list(one.buckets),
                },
                "deployments": [
                    {
                        "name": "StableDiffusion",
                        "max_ongoing_requests": most,
                        "autoscaling_config": {
                            "min_replicas": one.hosts,
                            "max_replicas": math.ceil(SPARE * one.hosts),
                            "target_ongoing_requests": max(1, math.ceil(ongoing)),
                        },
                        "ray_actor_options": {"resources": {"TPU": one.host.chips}},
                    }
                ],
            }
        ]
    }


def cluster_fragment(one: Plan) -> dict[str, Any]:
    """What to change in a cluster file, beside a zone that has this TPU."""
    most = math.ceil(SPARE * one.hosts)
    tpu = Slice(one.host.accelerator_type)
    return {
        "max_workers": most,
        "available_node_types": {
            "ray_tpu": {
                "min_workers": one.hosts,
                "max_workers": most,
                "resources": {"CPU": 8, "TPU": one.host.chips},
                "labels": {ACCELERATOR_LABEL: tpu.label},
                "node_config": {"acceleratorType": tpu.name, "runtimeVersion": RUNTIMES[tpu.generation]},
            }
        },
    }


def write_fragments(one: Plan, asked: Asked, rate: float, folder: Path) -> Path:
    here = folder / one.host.accelerator_type
    here.mkdir(parents=True, exist_ok=True)
    for name, fragment in (
        ("serve_config.yaml", serve_fragment(one, asked, rate)),
        ("cluster.yaml", cluster_fragment(one)),
    ):
        head = f"# `make tpu-plan` for {rate:g} pictures a second, modelled: what to change in your {name}.\n"
        (here / name).write_text(head + yaml.safe_dump(fragment, sort_keys=False), "utf-8")
    return here


def report(plans: Sequence[Plan], asked: Asked, rate: float, slo_s: float) -> dict[str, Any]:
    return {
        "modelled": True,
        "served": asdict(asked.served),
        "rate": rate,
        "slo_s": slo_s,
        "prices": PRICES_OF,
        "plans": [
            {
                "tpu": one.host.accelerator_type,
                "buckets": one.buckets,
                "slots": one.slots,
                "images_s_host": one.images_s,
                "alone_s": one.alone_s if math.isfinite(one.alone_s) else None,
                "hosts": one.hosts,
                "p50_s": one.simulated.percentile(50) if one.simulated else None,
                "p95_s": one.simulated.percentile(95) if one.simulated else None,
                "dollars_hour": one.dollars_hour,
                "why_not": one.why_not,
            }
            for one in plans
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
        asked = asked_of(arguments.config, arguments.model, arguments.size)
        priced = check(
            asked, hosts_of(arguments.tpu or DEFAULT_TPUS, Path("cluster.yaml"), arguments.dollars), arguments.cache
        )
    except UserError as error:
        raise UsageError(str(error)) from None
    _, evaluations = evaluations_of(asked, scheduler_of(asked))
    plans = [plan(one, asked, evaluations, rate, slo_s) for one in priced]
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=WIDTH)
    console.print(table_of(plans, rate, slo_s))
    for one in plans:
        if one.why_not:
            say(f"{one.host.accelerator_type}: {one.why_not}.")
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "plan.json").write_text(json.dumps(report(plans, asked, rate, slo_s), indent=1) + "\n", "utf-8")
    good = [one for one in plans if one.simulated]
    if not good:
        return 1
    for one in good:
        write_fragments(one, asked, rate, arguments.out)
    cheapest = min(good, key=lambda one: one.dollars_hour)
    folder = arguments.out / cheapest.host.accelerator_type
    say(f"Cheapest: {cheapest.host.accelerator_type}. What to change for it: {folder}/serve_config.yaml, cluster.yaml.")
    say(f"Dollars: Google's {PRICES_OF}, or DOLLARS=.")
    return 0


if __name__ == "__main__":
    run_command(command)
