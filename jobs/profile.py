"""Traces the next steps of a replica under the load that it has, brings the trace back, and tells the top operations.

    python -m jobs.profile --steps 20 --out outputs/profile

In --out appear NAME.xplane.pb, for XProf and TensorBoard, and NAME.trace.json.gz, for https://ui.perfetto.dev. The
trace covers all that the replica's process does meanwhile; of several replicas Serve chooses one. Requests go on, a
little slower. A replica that nobody asks anything makes no steps, and this says so.
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
from jobs.settings import DEPLOYMENT

TOP = 15


class Operation(NamedTuple):
    name: str
    seconds: float  # without the operations that ran inside it
    times: int


def main() -> str:
    parser = Parser(__doc__)
    parser.add_argument("--steps", type=integer_between(1, 1000), default=20, help="of the engine (%(default)s)")
    parser.add_argument(
        "--timeout-s", type=integer_between(1, 600), default=60, help="longest wait for them (%(default)s)"
    )
    parser.add_argument("--application", help="whose replica (the one that is deployed)")
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
    tell(operations(args.out / f"{name}.xplane.pb"))
    return f"The trace stands in {args.out / name}.xplane.pb and .trace.json.gz."


def application(name: str | None) -> str:
    from ray import serve

    found = {app: one.status.value for app, one in serve.status().applications.items() if DEPLOYMENT in one.deployments}
    if not found:
        raise UserError(f"No application with a deployment {DEPLOYMENT} runs here. Deploy one with: make deploy")
    if name is None and len(found) == 1:
        return next(iter(found))
    if name not in found:
        raise UsageError(f"--application must be one of {', '.join(found)}, got {name}.")
    return name


def operations(file: Path) -> list[Operation]:
    """What ran on the devices, most of the time first; operations of one kind and module count together."""
    from jax.profiler import ProfileData

    seconds: defaultdict[str, float] = defaultdict(float)
    counts: defaultdict[str, int] = defaultdict(int)
    for events in lines(ProfileData.from_file(str(file))):
        for name, own_ns in own_times(events):
            seconds[name] += own_ns / 1e9
            counts[name] += 1
    ranked = sorted(seconds, key=lambda name: -seconds[name])
    return [Operation(name, seconds[name], counts[name]) for name in ranked]


def lines(data: Any) -> Iterator[list[tuple[float, float, str]]]:
    """Of each device's line of operations, and on a CPU of each thread: start, end and name of what XLA ran."""
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
    """Each event's time without that of the events inside it, such as a loop's without its body's."""
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


def tell(found: list[Operation]) -> None:
    total = sum(one.seconds for one in found) or 1.0
    for one in found[:TOP]:
        say(f"{one.seconds:9.3f} s  {one.seconds / total:6.1%}  {one.times:7} times  {one.name}")
    if len(found) > TOP:
        rest = sum(one.seconds for one in found[TOP:])
        say(f"{rest:9.3f} s  {rest / total:6.1%}                 {len(found) - TOP} others")


if __name__ == "__main__":
    run(main)
