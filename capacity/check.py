"""Compiles all programs of a serve config for TPUs that are not there. Shows whether they fit, and what images would
cost:

    python -m capacity.check --config configs/sd14.yaml --tpu v5litepod-4,v6e-4

Exit status: 0; 1 where a program does not fit or is refused; 2 after a wrong call. All times are modelled.
"""

import json
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from app.diffusion.samplers import FlowSchedule, Schedule, default_sampler, make_table
from capacity.check_report import programs_table, report, throughput_table, verdicts, wide_console
from capacity.chips import PRICES_OF, Host
from capacity.compile_pool import POSTPONED, CompileOutcome, CompileTask, compile_all
from capacity.configs import Workload, hosts_of, workload_of
from capacity.host_costs import HostCosts, costs_by_host
from capacity.libtpu import compile_only, missing
from cluster.cli import Parser, UsageError, UserError, run_command
from cluster.terminal import Progress, format_duration, say


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
                return
            self.running.pop(task.label, None)
            if outcome is not POSTPONED:
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


def evaluations_of(workload: Workload, schedule: Schedule | FlowSchedule) -> tuple[str, int]:
    """The sampler of a request that names none, and how often it evaluates the UNet."""
    sampler = workload.sampler or default_sampler(schedule)
    return sampler, len(make_table(sampler, workload.num_inference_steps, schedule, image_tokens=1))


def command() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--config", type=Path, default=Path("serve_config.yaml"))
    parser.add_argument(
        "--cluster", type=Path, default=Path("cluster.yaml"), help="cluster file with the TPU nodes, without --tpu"
    )
    parser.add_argument(
        "--model", default="", help="in place of the config's, in bfloat16: a folder, demo, or a preset's name"
    )
    parser.add_argument("--tpu", default="", help="v5litepod-4,v6e-8: hosts to compile for")
    parser.add_argument("--json", type=Path, default=Path("outputs/tpu-check.json"), help="file for all figures")
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
    sampler, evaluations = evaluations_of(workload, schedule_of(workload))
    console = wide_console()
    problems = []
    for costs in hosts:
        console.print(programs_table(costs))
        console.print(throughput_table(costs, workload, sampler, evaluations))
        if left_out := costs.left_out:
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


def schedule_of(workload: Workload) -> Schedule | FlowSchedule:
    from capacity.models import architecture_of

    return architecture_of(workload.spec.model)[2]


if __name__ == "__main__":
    run_command(command)
