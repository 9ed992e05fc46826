"""Compiles every program that a config would serve for a TPU that is not there, and says whether it fits, how fast it
should be and what pictures would cost:

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
from capacity.configs import Asked, asked_of, hosts_of
from capacity.hosts import Priced, label, priced_hosts
from capacity.libtpu import compile_only, missing
from capacity.price import GIB, MIB, Price
from capacity.pricing import Outcome, Task, price_all
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


def check(asked: Asked, hosts: Sequence[Host], cache: Path) -> list[Priced]:
    """Prices all programs on all hosts. Raises UserError for a model that cannot be served."""
    compile_only()
    from capacity.programs import keys_of, pipeline_of, resident_bytes

    tasks, resident = [], {}
    for host in hosts:
        try:
            pipeline = pipeline_of(asked.served, host)
        except ValueError as error:
            raise UserError(str(error)) from None
        resident[host] = resident_bytes(pipeline)
        keys = keys_of(pipeline.programs, host)
        tasks += [Task(asked.served, host, program.name, keys[program.name]) for program in pipeline.programs]
    with Progress() as progress:
        news = News(progress, len(tasks))
        outcomes = price_all(tasks, cache, news.tell, news.show)
    news.conclude()
    return priced_hosts(outcomes, resident)


class News:
    """How far it is: which programs are being compiled, and how many are done."""

    def __init__(self, progress: Progress, total: int):
        self.progress, self.total = progress, total
        self.done = self.cached = 0
        self.running: dict[str, None] = {}
        self.lock = threading.Lock()

    def tell(self, task: Task, outcome: Outcome | None) -> None:
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
        say(f"{compiled} programs compiled in {took}, {self.cached} known from before.")


def evaluations_of(asked: Asked, scheduler: Mapping[str, Any]) -> tuple[str, int]:
    """The sampler of a request that names none, and how often it asks the UNet."""
    schedule = Schedule.from_config(scheduler)
    sampler = asked.sampler or default_sampler(schedule)
    return sampler, len(make_table(sampler, asked.num_inference_steps, schedule))


def programs_table(priced: Priced) -> Table:
    host = priced.host
    hbm = f"{host.chips} x {host.chip.hbm_gib:g} GiB"
    title = f"{host.accelerator_type} ({hbm}); figures of one chip, ms and % modelled"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("program", no_wrap=True)
    columns = ("chips", "compile s", "args MiB", "temp MiB", "peak GiB", "TFLOP", "GB", "ms", "bound")
    for column in (*columns, *SHOWN.values()):
        table.add_column(column, justify="right")
    for name, outcome in priced.outcomes.items():
        price = outcome.price
        if price is None:
            table.add_row(name, "does not fit" if outcome.too_large else "refused")
            continue
        table.add_row(name, *figures(price, priced, name))
    return table


def figures(price: Price, priced: Priced, name: str) -> list[str]:
    return [
        f"{price.shards}",
        f"{price.compile_s:.1f}",
        f"{price.arguments / MIB:.0f}",
        f"{price.temporaries / MIB:.0f}",
        f"{priced.peak(name) / GIB:.2f}",
        f"{price.tflop:.3f}",
        f"{price.bytes / 1e9:.2f}",
        f"{1e3 * price.seconds:.3f}",
        f"{1e3 * price.padded_cycles / priced.host.chip.clock:.3f}",
        *(f"{100 * price.share(part):.0f} %" if part in price.parts else "" for part in SHOWN),
    ]


def rates_table(priced: Priced, asked: Asked, sampler: str, evaluations: int) -> Table:
    rows = 1 + (asked.guidance_scale > 1)
    title = (
        f"Pictures with {sampler}, {asked.num_inference_steps} steps, {'guided' if rows == 2 else 'unguided'}; modelled"
    )
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for column in ("size", "sharing a step", "images/s", "images/s/chip", "of the padded bound", "$ per 1000"):
        table.add_column(column, justify="right")
    for size in asked.served.sizes:
        for rate in priced.rates(size, asked.served.batch_buckets, evaluations, rows):
            table.add_row(
                label(size),
                str(rate.images),
                f"{1 / rate.image_s:.2f}",
                f"{1 / rate.image_s / priced.host.chips:.2f}",
                f"{100 * rate.padded_s / rate.image_s:.0f} %",
                f"{priced.dollars_per_1000(rate.image_s):.2f}",
            )
    return table


def verdicts(priced: Priced, asked: Asked) -> list[str]:
    """A sentence for each thing that a TPU would refuse."""
    said = []
    chip, type_ = priced.host.chip, priced.host.accelerator_type
    for name, outcome in priced.outcomes.items():
        if outcome.refused:
            said.append(f"{type_}: {name} is refused: {outcome.refused}")
        elif outcome.too_large:
            said.append(f"{type_}: {name} does not fit: {outcome.too_large}")
        elif not priced.fits(name):
            needs = f"{priced.peak(name) / GIB:.2f} GiB with all that lies beside it, of {chip.hbm_gib:g}"
            said.append(f"{type_}: {name} does not fit: it needs {needs}.")
    if said:
        for size in asked.served.sizes:
            fitting = [images for images in asked.served.batch_buckets if 2 * images in priced.steps(size)]
            largest = f"the largest of batch_buckets that fits is {fitting[-1]}" if fitting else "no bucket fits"
            said.append(f"{type_}: at {label(size)} {largest}.")
    return said


def report(asked: Asked, hosts: Sequence[Priced], sampler: str, evaluations: int) -> dict[str, Any]:
    """All that is told, for machines."""
    rows = 1 + (asked.guidance_scale > 1)
    return {
        "modelled": True,
        "served": asdict(asked.served),
        "sampler": sampler,
        "num_inference_steps": asked.num_inference_steps,
        "evaluations": evaluations,
        "rows": rows,
        "prices": PRICES_OF,
        "hosts": [
            {
                "tpu": priced.host.accelerator_type,
                "chips": priced.host.chips,
                "hbm_bytes": round(priced.host.chip.hbm_gib * GIB),
                "dollars_hour": priced.host.dollars_hour,
                "resident_bytes": priced.resident,
                "programs": {
                    name: {"peak_bytes": priced.peak(name), "fits": priced.fits(name), **asdict(outcome)}
                    for name, outcome in priced.outcomes.items()
                },
                "rates": {
                    label(size): [asdict(r) for r in priced.rates(size, asked.served.batch_buckets, evaluations, rows)]
                    for size in asked.served.sizes
                },
                "verdicts": verdicts(priced, asked),
            }
            for priced in hosts
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
        asked = asked_of(arguments.config, arguments.model)
        hosts = check(asked, hosts_of(arguments.tpu, arguments.cluster, arguments.dollars), arguments.cache)
    except UserError as error:
        raise UsageError(str(error)) from None
    sampler, evaluations = evaluations_of(asked, scheduler_of(asked))
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=WIDTH)
    wrong = []
    for priced in hosts:
        console.print(programs_table(priced))
        console.print(rates_table(priced, asked, sampler, evaluations))
        if left_out := sorted({note for one in priced.outcomes.values() if one.price for note in one.price.left_out}):
            say(f"Not in these times: {', '.join(left_out)}. How many of which, says the file below.")
        wrong += verdicts(priced, asked)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(report(asked, hosts, sampler, evaluations), indent=1) + "\n", "utf-8")
    say(f"The same figures and more: {arguments.json}. Dollars: Google's {PRICES_OF}, or DOLLARS=.")
    if wrong:
        print("\n".join(wrong), file=sys.stderr)
        return 1
    say("Every program compiles and fits.")
    return 0


def scheduler_of(asked: Asked) -> Mapping[str, Any]:
    from capacity.models import configurations

    return corrected(configurations(asked.served.model, [])[1]["scheduler"])[0]


if __name__ == "__main__":
    run_command(command)
