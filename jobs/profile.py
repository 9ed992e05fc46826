"""Traces the next steps of a replica under its current load, saves the trace, and lists the top operations.

    python -m jobs.profile --steps 20 --out outputs/profile

--out gets NAME.xplane.pb, for XProf and TensorBoard, and NAME.trace.json.gz, for https://ui.perfetto.dev. The trace
covers everything that the replica's process does meanwhile. Serve chooses one of several replicas. Requests continue, a
little slower. The job fails if the replica has no requests, and so makes no steps.
"""

import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cluster.cli import Parser, UsageError, UserError, integer_between
from cluster.ray_client import connect
from cluster.terminal import say
from jobs.entry import path, run
from jobs.replica_config import DEPLOYMENT

TOP = 15


class Operation(NamedTuple):
    name: str
    seconds: float  # without nested operations
    times: int


def main() -> str:
    parser = Parser(__doc__)
    parser.add_argument(
        "--steps", type=integer_between(1, 1000), default=20, help="number of engine steps (%(default)s)"
    )
    parser.add_argument(
        "--timeout-s", type=integer_between(1, 600), default=60, help="longest wait for the steps (%(default)s)"
    )
    parser.add_argument("--application", help="its name, if several are deployed")
    parser.add_argument("--out", type=path, default="outputs/profile", help="folder of the trace (%(default)s)")
    args = parser.parse_args()

    connect()
    from ray import serve

    handle = serve.get_deployment_handle(DEPLOYMENT, application(args.application))
    say(f"Waiting for {args.steps} steps")
    trace = handle.profile.remote(args.steps, args.timeout_s).result(timeout_s=args.timeout_s + 120)
    if isinstance(trace, str):
        raise UserError(trace)
    args.out.mkdir(parents=True, exist_ok=True)
    name = time.strftime("%Y%m%d-%H%M%S")
    for ending, content in trace.files.items():
        (args.out / f"{name}{ending}").write_bytes(content)
    say(f"{trace.steps} steps in {trace.seconds:.2f} s of replica {trace.replica}; its operations by their own time:")
    show(operations(args.out / f"{name}.xplane.pb"))
    return f"The trace stands in {args.out / name}.xplane.pb and .trace.json.gz."


def application(name: str | None) -> str:
    from ray import serve

    applications = [app for app, status in serve.status().applications.items() if DEPLOYMENT in status.deployments]
    if not applications:
        raise UserError(f"No application with a deployment {DEPLOYMENT} runs here. Deploy one with: make deploy")
    if name is None and len(applications) == 1:
        return applications[0]
    if name not in applications:
        raise UsageError(f"--application must be one of {', '.join(applications)}, got {name}.")
    return name


def operations(file: Path) -> list[Operation]:
    """The operations of the devices, the longest first. Operations of one kind and module are added up."""
    from jax.profiler import ProfileData

    seconds: defaultdict[str, float] = defaultdict(float)
    counts: defaultdict[str, int] = defaultdict(int)
    for events in event_lines(ProfileData.from_file(str(file))):
        for name, own_ns in own_times(events):
            seconds[name] += own_ns / 1e9
            counts[name] += 1
    ranked = sorted(seconds, key=lambda name: -seconds[name])
    return [Operation(name, seconds[name], counts[name]) for name in ranked]


def event_lines(data: Any) -> Iterator[list[tuple[float, float, str]]]:
    """Start, end and name of the operations that XLA ran, for each device; on a CPU, for each thread."""
    devices = [plane for plane in data.planes if plane.name.startswith("/device:TPU")]
    for plane in devices or data.planes:
        for line in plane.lines:
            if devices and line.name != "XLA Ops":
                continue
            events = []
            for event in line.events:
                stats = dict(event.stats)
                if devices or "hlo_op" in stats:
                    module = str(stats.get("hlo_module", "")).removeprefix("jit_")
                    kind = re.sub(r"[.\d]+$", "", event.name.partition(" = ")[0].lstrip("%"))
                    events.append((event.start_ns, event.end_ns, f"{module} {kind}".strip()))
            yield events


def own_times(events: Iterable[tuple[float, float, str]]) -> Iterator[tuple[str, float]]:
    """Each event's time without nested events: that of a loop is without its body."""
    open_events: list[list[Any]] = []  # end, name, own time
    for start, end, name in sorted(events, key=lambda event: (event[0], -event[1])):
        while open_events and open_events[-1][0] <= start:
            _, done, own = open_events.pop()
            yield done, own
        if open_events:
            open_events[-1][2] -= min(end, open_events[-1][0]) - start
        open_events.append([end, name, end - start])
    for _, done, own in reversed(open_events):
        yield done, own


def show(ranked: list[Operation]) -> None:
    total = sum(operation.seconds for operation in ranked) or 1.0
    for operation in ranked[:TOP]:
        say(
            f"{operation.seconds:9.3f} s  {operation.seconds / total:6.1%}  {operation.times:7} times  {operation.name}"
        )
    if len(ranked) > TOP:
        rest = sum(operation.seconds for operation in ranked[TOP:])
        say(f"{rest:9.3f} s  {rest / total:6.1%}                 {len(ranked) - TOP} others")


if __name__ == "__main__":
    run(main)
