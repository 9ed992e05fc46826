"""The command line of `python -m loadtest`, and what of a scenario each flag overrides."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cluster.cli import Parser, UsageError, integer, nonempty, number, path
from loadtest.contact import SHEET
from loadtest.scenario import FOLDER, Closed, Open, Scenario, load, names, parse

VERBS = ("run", "sweep", "compare", "report", "ready")
PREDECESSORS: Mapping[str, int] = {"requests": 8, "concurrency": 8}
TRUTHS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
ARRIVALS = ("rate", "to", "concurrency", "requests", "replay", "speed")  # flags which say when requests are sent
RESUMED = (  # and which say what is sent and how it is judged
    *("named", "duration", "process", "cv", "seed", "prompts", "field", "endpoint", "stream", "repeat", "no_checks"),
    *("timeout", "objective", "warmup", "max_requests", "max_in_flight", "price", "settle"),
)


class SwitchParser(Parser):
    def __init__(self, description: str | None = None, **options: Any) -> None:
        super().__init__(description, **options)
        self.switches: set[str] = set()

    def switch(self, *names: str, help: str, group: argparse._ArgumentGroup | None = None) -> None:
        """A flag that may be followed by what it is to be: --stream, --stream=True, --stream false."""
        self.switches |= set(names)
        (group or self).add_argument(
            *names, nargs="?", type=truth, const=True, default=False, metavar="true", help=help
        )

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """A word behind a switch that is no truth is the next argument, such as the name of a scenario."""
        joined: list[str] = []
        for word in args or ():
            if joined and joined[-1] in self.switches and word.lower() in TRUTHS:
                joined[-1] += f"={word}"
            else:
                joined.append(word)
        return super().parse_known_args([f"{one}=true" if one in self.switches else one for one in joined], namespace)


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
    run = verbs.add_parser("run", help="run a scenario (what is done without a verb, too)")
    run.add_argument("scenario", nargs="?", help=f"{', '.join(names())}, or a YAML file")
    run.add_argument("--scenario", dest="named", type=nonempty, help=argparse.SUPPRESS)
    run.add_argument("--resume", type=path, help="folder of a run that was killed or interrupted")
    run.switch("--save-pictures", "--save_pictures", help=f"as one captioned sheet, {SHEET}")
    run.switch("--save-each", help="each picture as a file of its own")
    where(run)
    what(run)
    raising = verbs.add_parser("sweep", help="raise the rate to find the highest that the server holds")
    raising.add_argument("scenario", nargs="?", help="whose requests are sent")
    raising.add_argument("--from", dest="first", type=number, default=0.5, help="rate to begin at (%(default)s)")
    raising.add_argument("--factor", type=number, default=2.0, help="by which it is raised (%(default)s)")
    raising.add_argument("--most", type=number, default=1000.0, help="highest rate (%(default)s)")
    where(raising)
    what(raising)
    comparing = verbs.add_parser("compare", help="two runs side by side")
    comparing.add_argument("a", type=path)
    comparing.add_argument("b", type=path)
    ready = verbs.add_parser("ready", help="exit status 0 if the local cluster of this checkout serves")
    ready.add_argument("--run-dir", type=path, default=Path(".run"))
    again = verbs.add_parser("report", help="derive the reports of a run again")
    again.add_argument("folder", type=path)
    return top


def where(parser: SwitchParser) -> None:
    parser.add_argument("--url", type=nonempty, help="of the API; left out, the local cluster of this checkout")
    parser.add_argument("--ip", type=nonempty, help="its address alone, with port 8000")
    parser.switch("--allow-remote", help="to load another machine, which must be yours")
    parser.add_argument(
        "--dashboard", type=nonempty, help="Ray's dashboard, for the timeline; left out, the local cluster's"
    )
    parser.add_argument("--run-dir", type=path, default=Path(".run"), help="of the local cluster (%(default)s)")
    parser.add_argument("--out", type=path, default=Path("outputs/loadtest"), help="folder of the runs (%(default)s)")


def what(parser: SwitchParser) -> None:
    load = parser.add_argument_group("arrivals, instead of the scenario's")
    load.add_argument("--rate", type=number, help="requests a second")
    load.add_argument("--to", type=number, help="the rate at the end, for a ramp")
    load.add_argument("--duration", type=number, help="seconds")
    load.add_argument("--process", choices=("constant", "poisson", "gamma"))
    load.add_argument("--cv", type=number, help="of gamma: 1 is Poisson, more comes in bursts")
    load.add_argument("--concurrency", "--batch_size", type=integer, help="closed loop: so many clients")
    load.add_argument("--requests", "--num_requests", type=integer, help="closed loop: so many requests in all")
    load.add_argument("--replay", type=path, help="JSONL with the time and the request in each line")
    load.add_argument("--speed", type=number, help="of the replay")
    load.add_argument("--seed", type=integer, help="of the schedule and the requests")
    asked = parser.add_argument_group("requests")
    asked.add_argument(
        "--prompts", type=path, help="text with a prompt a line, or CSV, JSONL or Parquet with any field"
    )
    asked.add_argument("--field", type=field, action="append", default=[], help="NAME=VALUE of every request")
    asked.add_argument("--endpoint", choices=("generations", "imagine"), help="of every request")
    parser.switch("--stream", help="with a preview, whose time is reported", group=asked)
    asked.add_argument("--repeat", type=number, help="share of requests that repeat an earlier one, seed and all")
    parser.switch("--no-checks", help="do not look at the pictures", group=asked)
    other = parser.add_argument_group("the run")
    other.add_argument("--timeout", type=number, help="seconds that an answer may take")
    other.add_argument("--objective", type=number, help="seconds within which an answer counts as goodput")
    other.add_argument("--warmup", type=number, help="seconds at the start that are not counted")
    other.add_argument("--max-requests", type=integer, help="most requests of a run")
    other.add_argument("--max-in-flight", type=integer, help="most requests open at once")
    other.add_argument("--price", type=number, help="dollars for an hour of a chip")
    other.add_argument("--settle", type=number, help="seconds to wait at most for replicas and nodes to go again")


def refuse(options: argparse.Namespace, names: Sequence[str], why: str) -> None:
    """Whoever gives a flag which the verb would ignore is told."""
    values = {name: getattr(options, name) for name in names}
    given = [name for name, value in values.items() if not (value is None or value is False or value == [])]
    if given:
        flags = ["--scenario" if name == "named" else f"--{name.replace('_', '-')}" for name in given]
        raise UsageError(f"{why}: {' and '.join(flags)} cannot be given.")


def scenario_of(options: argparse.Namespace) -> tuple[str, Scenario]:
    """Its name and itself, flags applied. Neither a name nor arrivals given, it is the predecessor's load test."""
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
            one is None for one in (options.rate, options.to, options.process, options.cv)
        ),
    }
    if len(given := [name for name, there in flags.items() if there]) > 1:
        raise UsageError(f"{' and '.join(given)} exclude one another: arrivals are of one kind.")
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
