"""Shows what the check found: tables, a sentence for each problem, and JSON."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from capacity.chips import PRICES_OF
from capacity.compile_pool import CompileOutcome
from capacity.configs import Workload
from capacity.host_costs import HostCosts, label
from capacity.program_cost import GIB, MIB, ProgramCost

SHOWN = {  # columns: part -> heading
    "self-attention": "self-attn",
    "cross-attention": "cross",
    "feed-forward": "feed-fwd",
    "resnet": "resnet",
    "resampling": "resample",
    "transformer": "rest of tf",
}
WIDTH = 160  # columns, where the output is no terminal


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


def throughput_table(costs: HostCosts, workload: Workload, sampler: str, evaluations: int) -> Table:
    rows = 1 + (workload.guidance_scale > 1)
    guided = "guided" if rows == 2 else "unguided"
    title = f"Pictures with {sampler}, {workload.num_inference_steps} steps, {guided}; modelled"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for column in ("size", "sharing a step", "images/s", "images/s/chip", "of the padded bound", "$ per 1000"):
        table.add_column(column, justify="right")
    for size in workload.spec.sizes:
        for throughput in costs.throughputs(size, images_of_steps(workload, rows), evaluations, rows):
            table.add_row(
                label(size),
                str(throughput.images),
                f"{1 / throughput.image_s:.2f}",
                f"{1 / throughput.image_s / costs.host.chips:.2f}",
                f"{100 * throughput.padded_s / throughput.image_s:.0f} %",
                f"{costs.dollars_per_1000(throughput.image_s):.2f}",
            )
    return table


def images_of_steps(workload: Workload, rows: int) -> tuple[int, ...]:
    """How many images of so many rows fill a step: without guidance, twice as many as batch_buckets says."""
    return tuple(bucket // rows for bucket in workload.spec.row_buckets if bucket % rows == 0)


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
                        asdict(r) for r in costs.throughputs(size, images_of_steps(workload, rows), evaluations, rows)
                    ]
                    for size in workload.spec.sizes
                },
                "verdicts": verdicts(costs, workload),
            }
            for costs in hosts
        ],
    }


def wide_console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDTH)
