"""Every request of a run, with its time, drawn in advance from the scenario's seed: the same scenario, the same run."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from app.api import prompt_files
from cluster.cli import UsageError
from loadtest.arrivals import Span, evenly, gamma, through, with_bursts
from loadtest.scenario import Closed, Endpoint, Open, Replay, Scenario

PROMPTS = Path(__file__).with_name("prompts.txt")
REPEATED = 64  # how far back the request may be that another repeats
TIMES = ("at", "timestamp", "intended")  # what a trace may call the time of a request
BODIES = ("request", "body")


@dataclass(frozen=True)
class Planned:
    id: int
    at: float  # seconds from the start of the run; a closed loop sends in this order whenever a client is free
    kind: str
    endpoint: Endpoint
    request: Mapping[str, Any]  # fields of the API


def plan(scenario: Scenario) -> list[Planned]:
    if isinstance(scenario.arrivals, Replay):
        return replayed(scenario.arrivals, scenario.max_requests)
    times_rng, requests_rng = np.random.default_rng(scenario.seed).spawn(2)
    times = arrivals(scenario, times_rng)
    each = zip(times, requests(scenario, requests_rng), strict=False)  # of requests there is no end
    return [Planned(i, at, *one) for i, (at, one) in enumerate(each)]


def arrivals(scenario: Scenario, rng: np.random.Generator) -> list[float]:
    match scenario.arrivals:
        case Closed(requests=asked):
            return [0.0] * min(scenario.max_requests, scenario.max_requests if asked is None else asked)
        case Open(process=process, cv=cv, stages=stages, bursts=bursts):
            spans = [Span(one.rate, one.rate if one.to is None else one.to, one.duration_s) for one in stages]
            count, most = sum(span.count for span in spans), scenario.max_requests + 1
            if process == "constant":
                arrived = evenly(count, most)
            else:
                arrived = gamma(count, most, cv if process == "gamma" else 1.0, rng)
            times = through(spans, arrived)
            times = with_bursts(times, [(burst.at_s, burst.requests) for burst in bursts])
            if len(times) > scenario.max_requests:
                raise UsageError(
                    f"This makes more than max_requests = {scenario.max_requests} requests. Lower the rate or the "
                    "duration, or raise it: --max-requests."
                )
            return [float(at) for at in times]
    raise AssertionError(scenario.arrivals)


def requests(scenario: Scenario, rng: np.random.Generator) -> Iterator[tuple[str, Endpoint, Mapping[str, Any]]]:
    """Without end. Each has a seed, so that its picture can be made again; some repeat an earlier one on purpose."""
    prompts = read_prompts(scenario.prompts or PROMPTS)
    weights = np.array([kind.weight for kind in scenario.mix])
    recent: list[tuple[str, Endpoint, Mapping[str, Any]]] = []
    while True:
        if recent and rng.random() < scenario.checks.repeat:
            yield recent[int(rng.integers(len(recent)))]
            continue
        kind = scenario.mix[int(rng.choice(len(weights), p=weights / weights.sum()))]
        prompt = prompts[int(rng.integers(len(prompts)))]
        one = kind.label, kind.endpoint, {"seed": int(rng.integers(2**32)), **kind.fields, **prompt}
        recent = [*recent[1 - REPEATED :], one]
        yield one


def fingerprint(requests: Sequence[Planned]) -> str:
    """Another one means another plan: the code, or a file that the scenario names, has changed."""
    told = hashlib.sha256()
    for one in requests:
        told.update(json.dumps([one.at, one.kind, one.endpoint, one.request], sort_keys=True).encode())
    return told.hexdigest()[:16]


def read_prompts(path: Path) -> list[Mapping[str, Any]]:
    """A prompt a line, or rows with any field of the API."""
    found: list[Mapping[str, Any]] = []
    for where, fields in rows(path):
        if not isinstance(fields.get("prompt"), str):
            raise UsageError(f'{where} must have a "prompt" that is a string.')
        found.append(fields)
    if not found:
        raise UsageError(f"{path} holds no prompt.")
    return found


def replayed(replay: Replay, most: int) -> list[Planned]:
    """In the order of their times, the first at 0."""
    found: list[tuple[float, Endpoint, Mapping[str, Any], str]] = []
    for where, entry in rows(replay.trace, ".jsonl"):
        if "session" in entry or "ended" in entry:  # of a requests.jsonl
            continue
        at = first_of(entry, TIMES)
        if isinstance(at, bool) or not isinstance(at, int | float):
            raise UsageError(f'{where} must have a time, "at", in seconds, got {at!r}.')
        request = first_of(entry, BODIES)
        if not isinstance(request, dict) or not isinstance(request.get("prompt"), str):
            raise UsageError(f'{where} must have a "request", fields of the API with a prompt, got {request!r}.')
        endpoint = entry.get("endpoint", "generations")
        if endpoint not in ("generations", "imagine"):
            raise UsageError(f'{where}: "endpoint" must be generations or imagine, got {endpoint!r}.')
        found.append((float(at), endpoint, request, str(entry.get("kind", "replay"))))
    if not found:
        raise UsageError(f"{replay.trace} holds no request.")
    if len(found) > most:
        raise UsageError(f"{replay.trace} holds {len(found)} requests, more than max_requests = {most}.")
    found.sort(key=lambda one: one[0])
    began = found[0][0]
    return [
        Planned(i, (at - began) / replay.speed, kind, endpoint, request)
        for i, (at, endpoint, request, kind) in enumerate(found)
    ]


def rows(path: Path, kind: str | None = None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each with where it stands."""
    try:
        for entry in prompt_files.read(path, kind):
            where = f"{path}:{entry.line}"
            if isinstance(entry.fields, str):
                raise UsageError(f"{where}: {entry.fields}")
            yield where, entry.fields
    except prompt_files.BadFile as error:
        raise UsageError(str(error)) from None


def first_of(entry: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((entry[name] for name in names if name in entry), None)
