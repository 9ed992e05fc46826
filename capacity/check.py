"""Compiles all programs of a serve config for TPUs that are not there. Shows whether they fit, and what images would
cost:

    python -m capacity.check --config configs/sd14.yaml --tpu v5litepod-4,v6e-4

Exit status: 0; 1 where a program does not fit or is refused; 2 after a wrong call. All times are modelled.
"""

import json
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from app.diffusion.models.scheduler_config import corrected
from app.diffusion.samplers import Schedule, default_sampler, make_table
from capacity.chips import PRICES_OF, Host
from capacity.compile_pool import CompileOutcome, CompileTask, compile_all
from capacity.configs import Workload, hosts_of, workload_of
from capacity.host_costs import HostCosts, costs_by_host, label
from capacity.libtpu import compile_only, missing
from capacity.program_cost import GIB, MIB, ProgramCost
from cluster.cli import Parser, UsageError, UserError, run_command
from cluster.terminal import Progress, format_duration, say

SHOWN = {  # share of the time, in percent
    "self-attention": "self-attn",
    "cross-attention": "cross",
    "feed-forward": "feed-fwd",
    "resnet": "resnet",
    "resampling": "resample",
    "transformer": "rest of tf",
}
WIDTH = 160  # of tables where the output is no terminal


def check(workload: Workload, hosts: Sequence[Host], cache: Path) -> list[HostCosts]:
    """Compiles all programs for all hosts. Raises UserError for a model that cannot be served."""
    compile_only()
    from capacity.programs import keys_of, pipeline_of, resident_bytes

    tasks, resident = [], {}
    for host in hosts:
        try:
            pipeline = pipeline_of(workload.spec, host)
        except ValueError as error:
            raise UserError(str(error)) from None
        resident[host] = resident_bytes(pipeline)
        keys = keys_of(pipeline.programs, host)
        tasks += [CompileTask(workload.spec, host, program.name, keys[program.name]) for program in pipeline.programs]
    with Progress() as progress:
        display = CompileProgress(progress, len(tasks))
        outcomes = compile_all(tasks, cache, display.update, display.show)
    display.conclude()
    return costs_by_host(outcomes, resident)


class CompileProgress:
    """Shows which programs are being compiled, and how many are done."""

    def __init__(self, progress: Progress, total: int):
        self.progress, self.total = progress, total
        self.done = self.cached = 0
        self.running: dict[str, None] = {}
        self.lock = threading.Lock()

    def update(self, task: CompileTask, outcome: CompileOutcome | None) -> None:
        with self.lock:
            if outcome is None:
                self.running[task.label] = None
            else:
                self.running.pop(task.label, None)
                self.done += 1
                self.cached += outcome.cached

    def show(self) -> None:
        with self.lock:
            state = f"{self.done} of {self.total} done"
            self.progress.show({"programs": (state, "; ".join(self.running))})

    def conclude(self) -> None:
        compiled = self.done - self.cached
        took = format_duration(self.progress.elapsed)
        say(f"{compiled} programs compiled in {took}, {self.cached} known from earlier runs.")


def evaluations_of(workload: Workload, scheduler: Mapping[str, Any]) -> tuple[str, int]:
    """The sampler of a request that names none, and how often it evaluates the UNet."""
    schedule = Schedule.from_config(scheduler)
    sampler = workload.sampler or default_sampler(schedule)
    return sampler, len(make_table(sampler, workload.num_inference_steps, schedule))


def programs_table(costs: HostCosts) -> Table:
    host = costs.host
    hbm = f"{host.chips} x {host.chip.hbm_gib:g} GiB"
    title = f"{host.accelerator_type} ({hbm}); figures of one chip, ms and % modelled"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("program", no_wrap=True)
    columns = ("chips", "compile s", "args MiB", "temp MiB", "peak GiB", "TFLOP", "GB", "ms", "bound")
    for column in (*columns, *SHOWN.values()):
        table.add_column(column, justify="right")
    for name, outcome in costs.outcomes.items():
        cost = outcome.cost
        if cost is None:
            table.add_row(name, "does not fit" if outcome.too_large else "refused")
            continue
        table.add_row(name, *figures(cost, costs, name))
    return table


def figures(cost: ProgramCost, costs: HostCosts, name: str) -> list[str]:
    return [
        f"{cost.shards}",
        f"{cost.compile_s:.1f}",
        f"{cost.arguments / MIB:.0f}",
        f"{cost.temporaries / MIB:.0f}",
        f"{costs.peak(name) / GIB:.2f}",
        f"{cost.tflop:.3f}",
        f"{cost.bytes / 1e9:.2f}",
        f"{1e3 * cost.seconds:.3f}",
        f"{1e3 * cost.padded_cycles / costs.host.chip.clock:.3f}",
        *(f"{100 * cost.share(part):.0f} %" if part in cost.parts else "" for part in SHOWN),
    ]


def rates_table(costs: HostCosts, workload: Workload, sampler: str, evaluations: int) -> Table:
    rows = 1 + (workload.guidance_scale > 1)
    guided = "guided" if rows == 2 else "unguided"
    title = f"Pictures with {sampler}, {workload.num_inference_steps} steps, {guided}; modelled"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for column in ("size", "sharing a step", "images/s", "images/s/chip", "of the padded bound", "$ per 1000"):
        table.add_column(column, justify="right")
    for size in workload.spec.sizes:
        for rate in costs.throughputs(size, workload.spec.batch_buckets, evaluations, rows):
            table.add_row(
                label(size),
                str(rate.images),
                f"{1 / rate.image_s:.2f}",
                f"{1 / rate.image_s / costs.host.chips:.2f}",
                f"{100 * rate.padded_s / rate.image_s:.0f} %",
                f"{costs.dollars_per_1000(rate.image_s):.2f}",
            )
    return table


def verdicts(costs: HostCosts, workload: Workload) -> list[str]:
    """A sentence for each program that a TPU would refuse, and for the largest bucket that fits."""
    problems = []
    chip, type_ = costs.host.chip, costs.host.accelerator_type
    for name, outcome in costs.outcomes.items():
        if outcome.refused:
            problems.append(f"{type_}: {name} is refused: {outcome.refused}")
        elif outcome.too_large:
            problems.append(f"{type_}: {name} does not fit: {outcome.too_large}")
        elif not costs.fits(name):
            needs = f"{costs.peak(name) / GIB:.2f} GiB with all that lies beside it, of {chip.hbm_gib:g}"
            problems.append(f"{type_}: {name} does not fit: it needs {needs}.")
    if problems:
        for size in workload.spec.sizes:
            fitting = [images for images in workload.spec.batch_buckets if 2 * images in costs.steps(size)]
            largest = f"the largest of batch_buckets that fits is {fitting[-1]}" if fitting else "no bucket fits"
            problems.append(f"{type_}: at {label(size)} {largest}.")
    return problems


def outcome_json(outcome: CompileOutcome) -> dict[str, Any]:
    return {
        "price": outcome.cost and asdict(outcome.cost),
        "too_large": outcome.too_large,
        "refused": outcome.refused,
        "cached": outcome.cached,
    }


def report(workload: Workload, hosts: Sequence[HostCosts], sampler: str, evaluations: int) -> dict[str, Any]:
    """All figures, as JSON."""
    rows = 1 + (workload.guidance_scale > 1)
    return {
        "modelled": True,
        "served": asdict(workload.spec),
        "sampler": sampler,
        "num_inference_steps": workload.num_inference_steps,
        "evaluations": evaluations,
        "rows": rows,
        "prices": PRICES_OF,
        "hosts": [
            {
                "tpu": costs.host.accelerator_type,
                "chips": costs.host.chips,
                "hbm_bytes": round(costs.host.chip.hbm_gib * GIB),
                "dollars_hour": costs.host.dollars_hour,
                "resident_bytes": costs.resident,
                "programs": {
                    name: {"peak_bytes": costs.peak(name), "fits": costs.fits(name), **outcome_json(outcome)}
                    for name, outcome in costs.outcomes.items()
                },
                "rates": {
                    label(size): [
                        asdict(r) for r in costs.throughputs(size, workload.spec.batch_buckets, evaluations, rows)
                    ]
                    for size in workload.spec.sizes
                },
                "verdicts": verdicts(costs, workload),
            }
            for costs in hosts
        ],
    }


def command() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--config", type=Path, default=Path("serve_config.yaml"))
    parser.add_argument("--cluster", type=Path, default=Path("cluster.yaml"), help="whose TPU nodes, without --tpu")
    parser.add_argument(
        "--model", default="", help="in place of the config's, in bfloat16: a folder, demo, or a preset's name"
    )
    parser.add_argument("--tpu", default="", help="v5litepod-4,v6e-8: hosts to compile for")
    parser.add_argument("--json", type=Path, default=Path("outputs/tpu-check.json"), help="where the figures go too")
    parser.add_argument("--dollars", default="", help="of a chip's hour, in place of the list's: v5e=0.9,v6e=1.5")
    parser.add_argument("--cache", type=Path, default=Path(".cache/tpu-prices"))
    arguments = parser.parse_args()
    if reason := missing():
        raise UsageError(reason)
    try:
        workload = workload_of(arguments.config, arguments.model)
        hosts = check(workload, hosts_of(arguments.tpu, arguments.cluster, arguments.dollars), arguments.cache)
    except UserError as error:
        raise UsageError(str(error)) from None
    sampler, evaluations = evaluations_of(workload, scheduler_of(workload))
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=WIDTH)
    problems = []
    for costs in hosts:
        console.print(programs_table(costs))
        console.print(rates_table(costs, workload, sampler, evaluations))
        if left_out := sorted(
            {note for outcome in costs.outcomes.values() if outcome.cost for note in outcome.cost.left_out}
        ):
            say(f"Not in these times: {', '.join(left_out)}. The file below has their numbers.")
        problems += verdicts(costs, workload)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(report(workload, hosts, sampler, evaluations), indent=1) + "\n", "utf-8")
    say(f"The same figures and more: {arguments.json}. Dollars: Google's {PRICES_OF}, or DOLLARS=.")
    if problems:
        print("\n".join(problems), file=sys.stderr)
        return 1
    say("Every program compiles and fits.")
    return 0


def scheduler_of(workload: Workload) -> Mapping[str, Any]:
    from capacity.models import configurations

    return corrected(configurations(workload.spec.model, [])[1]["scheduler"])[0]


if __name__ == "__main__":
    run_command(command)
