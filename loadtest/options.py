"""The command line of `python -m loadtest`, and how its flags override a scenario."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml

from cluster.cli import Parser, UsageError, integer, nonempty, number, path
from loadtest.contact import SHEET
from loadtest.scenario import FOLDER, Closed, Endpoint, Open, Scenario, load, names, parse

VERBS = ("run", "sweep", "compare", "report", "ready")
PREDECESSORS: Mapping[str, int] = {"requests": 8, "concurrency": 8}
TRUTHS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
ARRIVALS = ("rate", "to", "concurrency", "requests", "replay", "speed")  # flags that say when requests are sent
RESUMED = (  # flags that --resume excludes, besides ARRIVALS
    *("named", "duration", "process", "cv", "seed", "prompts", "field", "endpoint", "stream", "repeat", "no_checks"),
    *("timeout", "objective", "warmup", "max_requests", "max_in_flight", "price", "settle"),
)


class SwitchParser(Parser):
    def __init__(self, description: str | None = None, **options: Any) -> None:
        super().__init__(description, **options)
        self.switches: set[str] = set()

    def switch(self, *names: str, help: str, group: argparse._ArgumentGroup | None = None) -> None:
        """Adds a flag with an optional truth value: --stream, --stream=True, --stream false."""
        self.switches |= set(names)
        (group or self).add_argument(
            *names, nargs="?", type=truth, const=True, default=False, metavar="true", help=help
        )

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """A word after a switch that is no truth value is the next argument, for example a scenario."""
        joined: list[str] = []
        for word in args or ():
            if joined and joined[-1] in self.switches and word.lower() in TRUTHS:
                joined[-1] += f"={word}"
            else:
                joined.append(word)
        return super().parse_known_args(
            [f"{word}=true" if word in self.switches else word for word in joined], namespace
        )


def truth(text: str) -> bool:
    if text.lower() not in TRUTHS:
        raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}.")
    return TRUTHS[text.lower()]


def field(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, such as num_inference_steps=4, got {text!r}.")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError:
        return name, value


def parser(description: str | None) -> SwitchParser:
    top = SwitchParser(description)
    verbs = top.add_subparsers(dest="verb", required=True, parser_class=SwitchParser)
    run = verbs.add_parser("run", help="run a scenario (the default verb)")
    run.add_argument("scenario", nargs="?", help=f"{', '.join(names())}, or a YAML file")
    run.add_argument("--scenario", dest="named", type=nonempty, help=argparse.SUPPRESS)
    run.add_argument("--resume", type=path, help="folder of a run that was killed or interrupted")
    run.switch("--save-pictures", "--save_pictures", help=f"save the pictures as a captioned sheet, {SHEET}")
    run.switch("--save-each", help="save each picture as a file")
    add_target_flags(run)
    add_scenario_flags(run)
    raising = verbs.add_parser("sweep", help="raise the rate until the server no longer holds it")
    raising.add_argument("scenario", nargs="?", help="the scenario with the requests")
    raising.add_argument("--from", dest="first", type=number, default=0.5, help="first rate (%(default)s)")
    raising.add_argument("--factor", type=number, default=2.0, help="factor between two rates (%(default)s)")
    raising.add_argument("--most", type=number, default=1000.0, help="highest rate (%(default)s)")
    add_target_flags(raising)
    add_scenario_flags(raising)
    comparing = verbs.add_parser("compare", help="compare two runs side by side")
    comparing.add_argument("a", type=path)
    comparing.add_argument("b", type=path)
    ready = verbs.add_parser("ready", help="exit status 0 if the local cluster of this checkout serves")
    ready.add_argument("--run-dir", type=path, default=Path(".run"))
    again = verbs.add_parser("report", help="write the reports of a run again")
    again.add_argument("folder", type=path)
    return top


def add_target_flags(parser: SwitchParser) -> None:
    parser.add_argument("--url", type=nonempty, help="of the API; default: the local cluster of this checkout")
    parser.add_argument("--ip", type=nonempty, help="address of the API, with port 8000")
    parser.switch("--allow-remote", help="allow to load another machine, which must be yours")
    parser.add_argument(
        "--dashboard", type=nonempty, help="URL of Ray's dashboard, for the timeline; default: the local cluster's"
    )
    parser.add_argument("--run-dir", type=path, default=Path(".run"), help="folder of the local cluster (%(default)s)")
    parser.add_argument("--out", type=path, default=Path("outputs/loadtest"), help="folder of the runs (%(default)s)")


def add_scenario_flags(parser: SwitchParser) -> None:
    load = parser.add_argument_group("arrivals, instead of the scenario's")
    load.add_argument("--rate", type=number, help="requests a second")
    load.add_argument("--to", type=number, help="the rate at the end, for a ramp")
    load.add_argument("--duration", type=number, help="seconds")
    load.add_argument("--process", choices=("constant", "poisson", "gamma"))
    load.add_argument("--cv", type=number, help="coefficient of variation of gamma: 1 is Poisson, more is bursty")
    load.add_argument("--concurrency", "--batch_size", type=integer, help="closed loop: number of clients")
    load.add_argument("--requests", "--num_requests", type=integer, help="closed loop: number of requests in all")
    load.add_argument("--replay", type=path, help="JSONL file with a time and a request in each line")
    load.add_argument("--speed", type=number, help="speed-up of the replay")
    load.add_argument("--seed", type=integer, help="seed of the schedule and the requests")
    requests = parser.add_argument_group("requests")
    requests.add_argument(
        "--prompts", type=path, help="text file with a prompt per line, or CSV, JSONL or Parquet with any fields"
    )
    requests.add_argument(
        "--field", type=field, action="append", default=[], help="NAME=VALUE, a field of every request"
    )
    requests.add_argument("--endpoint", choices=get_args(Endpoint), help="endpoint of every request")
    parser.switch("--stream", help="stream with a preview, whose latency is reported", group=requests)
    requests.add_argument("--repeat", type=number, help="share of requests that repeat an earlier one, seed and all")
    parser.switch("--no-checks", help="do not check the pictures", group=requests)
    other = parser.add_argument_group("the run")
    other.add_argument("--timeout", type=number, help="longest time for an answer, in seconds")
    other.add_argument("--objective", type=number, help="latency within which an answer counts as goodput, in seconds")
    other.add_argument("--warmup", type=number, help="seconds at the start that do not count")
    other.add_argument("--max-requests", type=integer, help="most requests of a run")
    other.add_argument("--max-in-flight", type=integer, help="most requests open at once")
    other.add_argument("--price", type=number, help="dollars for an hour of a chip")
    other.add_argument("--settle", type=number, help="longest wait for scale-down after the load, in seconds")


def refuse(options: argparse.Namespace, names: Sequence[str], why: str) -> None:
    """Raises UsageError if a flag is given that the verb would ignore."""
    values = {name: getattr(options, name) for name in names}
    refused = [name for name, value in values.items() if not (value is None or value is False or value == [])]
    if refused:
        flags = ["--scenario" if name == "named" else f"--{name.replace('_', '-')}" for name in refused]
        raise UsageError(f"{why}: {' and '.join(flags)} cannot be given.")


def scenario_of(options: argparse.Namespace) -> tuple[str, Scenario]:
    """The scenario and its name, with flags applied. The default is the predecessor's load test."""
    arrivals = {"process": "closed", **PREDECESSORS}
    overrides = {
        "seed": options.seed,
        "prompts": options.prompts and str(options.prompts),
        "checks.repeat": options.repeat,
        "checks.pictures": False if options.no_checks else None,
        "timeout_s": options.timeout,
        "objective_s": options.objective,
        "warmup_s": options.warmup,
        "max_requests": options.max_requests,
        "max_in_flight": options.max_in_flight,
        "price.chip_hour_usd": options.price,
        "watch.settle_s": options.settle,
    }
    if options.scenario:
        name, base = Path(options.scenario).stem, load(options.scenario, {})
        content = base.model_dump(mode="json", exclude_none=True)
        source = str(FOLDER / f"{name}.yaml") if name in names() else options.scenario
    else:
        name, source = "requests", "The command line"
        content = {"arrivals": arrivals}
        base = parse(content, source, {})
    overrides["arrivals"] = arrivals_of(options, base)
    overrides["mix"] = mix_of(options, content)
    return name, parse(content, source, overrides)


def arrivals_of(options: argparse.Namespace, base: Scenario) -> dict[str, Any] | None:
    flags = {
        "--replay": options.replay is not None,
        "--concurrency or --requests": not (options.concurrency is None and options.requests is None),
        "--rate, --to or --process": not all(
            value is None for value in (options.rate, options.to, options.process, options.cv)
        ),
    }
    if len(kinds := [name for name, present in flags.items() if present]) > 1:
        raise UsageError(f"{' and '.join(kinds)} exclude one another: arrivals are of one kind.")
    old = base.arrivals
    if options.replay:
        return {
            "process": "replay",
            "trace": str(options.replay),
            "speed": 1.0 if options.speed is None else options.speed,
        }
    if options.speed is not None:
        raise UsageError("--speed needs --replay.")
    if flags["--concurrency or --requests"]:
        known = old.model_dump(exclude_none=True) if isinstance(old, Closed) else {"process": "closed", **PREDECESSORS}
        changed = {"concurrency": options.concurrency, "requests": options.requests, "duration_s": options.duration}
        return known | {name: value for name, value in changed.items() if value is not None}
    if isinstance(old, Closed) and options.duration is not None and not flags["--rate, --to or --process"]:
        return {"process": "closed", "concurrency": old.concurrency, "duration_s": options.duration}
    if not flags["--rate, --to or --process"] and options.duration is None:
        return None
    first = old.stages[0] if isinstance(old, Open) else None
    process = options.process or (
        "gamma" if options.cv is not None else old.process if isinstance(old, Open) else "poisson"
    )
    stage: dict[str, Any] = {
        "rate": options.rate if options.rate is not None else first.rate if first else 1.0,
        "duration_s": options.duration
        if options.duration is not None
        else old.duration_s
        if isinstance(old, Open)
        else 30.0,
    }
    if options.to is not None:
        stage["to"] = options.to
    cv = {} if options.cv is None else {"cv": options.cv}
    return {"process": process, "stages": [stage], **cv}


def mix_of(options: argparse.Namespace, content: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    changes = dict(options.field)
    if options.endpoint:
        changes["endpoint"] = options.endpoint
    if options.stream:
        changes |= {"stream": True, "partial_images": changes.get("partial_images", 1)}
    return [kind | changes for kind in content.get("mix") or [{}]] if changes else None
