"""Draws all requests of a run and their times from the scenario's seed. The same scenario gives the same plan."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from app.api import prompt_files
from cluster.cli import UsageError
from loadtest.arrivals import Span, evenly, gamma, through, with_bursts
from loadtest.scenario import Closed, Endpoint, Open, Replay, Scenario

PROMPTS = Path(__file__).with_name("prompts.txt")
REPEATED = 64  # a repeated request is one of so many that came last
TIMES = ("at", "timestamp", "intended")  # keys that a trace may use for the time of a request
BODIES = ("request", "body")


@dataclass(frozen=True)
class Planned:
    id: int
    at: float  # seconds of the run; a closed loop ignores it and sends when a client is free
    kind: str
    endpoint: Endpoint
    request: Mapping[str, Any]  # fields of the API


def plan(scenario: Scenario) -> list[Planned]:
    if isinstance(scenario.arrivals, Replay):
        return replayed(scenario.arrivals, scenario.max_requests)
    times_rng, requests_rng = np.random.default_rng(scenario.seed).spawn(2)
    times = arrivals(scenario, times_rng)
    each = zip(times, requests(scenario, requests_rng), strict=False)  # `requests` is endless
    return [Planned(i, at, *request) for i, (at, request) in enumerate(each)]


def arrivals(scenario: Scenario, rng: np.random.Generator) -> list[float]:
    match scenario.arrivals:
        case Closed(requests=limit):
            return [0.0] * min(scenario.max_requests, scenario.max_requests if limit is None else limit)
        case Open(process=process, cv=cv, stages=stages, bursts=bursts):
            spans = [
                Span(stage.rate, stage.rate if stage.to is None else stage.to, stage.duration_s) for stage in stages
            ]
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
    """Yields requests without end. Each has a seed, so it can be drawn again. Some repeat an earlier request."""
    prompts = read_prompts(scenario.prompts or PROMPTS)
    weights = np.array([kind.weight for kind in scenario.mix])
    recent: list[tuple[str, Endpoint, Mapping[str, Any]]] = []
    while True:
        if recent and rng.random() < scenario.checks.repeat:
            yield recent[int(rng.integers(len(recent)))]
            continue
        kind = scenario.mix[int(rng.choice(len(weights), p=weights / weights.sum()))]
        prompt = prompts[int(rng.integers(len(prompts)))]
        request = kind.label, kind.endpoint, {"seed": int(rng.integers(2**32)), **kind.fields, **prompt}
        recent = [*recent[1 - REPEATED :], request]
        yield request


def fingerprint(requests: Sequence[Planned]) -> str:
    """A hash of the plan. It changes if the code or a file of the scenario changes the plan."""
    digest = hashlib.sha256()
    for planned in requests:
        entry = [planned.at, planned.kind, planned.endpoint, planned.request]
        digest.update(json.dumps(entry, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def read_prompts(path: Path) -> list[Mapping[str, Any]]:
    """The rows of a prompt file, each with a prompt and any other fields of the API."""
    prompts: list[Mapping[str, Any]] = []
    for where, fields in rows(path):
        if not isinstance(fields.get("prompt"), str):
            raise UsageError(f'{where} must have a "prompt" that is a string.')
        prompts.append(fields)
    if not prompts:
        raise UsageError(f"{path} holds no prompt.")
    return prompts


def replayed(replay: Replay, most: int) -> list[Planned]:
    """The requests of a trace in the order of their times. The first is at 0."""
    entries: list[tuple[float, Endpoint, Mapping[str, Any], str]] = []
    for where, entry in rows(replay.trace, ".jsonl"):
        if "session" in entry or "ended" in entry:  # lines of requests.jsonl that are no requests
            continue
        at = first_of(entry, TIMES)
        if isinstance(at, bool) or not isinstance(at, int | float):
            raise UsageError(f'{where} must have a time, "at", in seconds, got {at!r}.')
        request = first_of(entry, BODIES)
        if not isinstance(request, dict) or not isinstance(request.get("prompt"), str):
            raise UsageError(f'{where} must have a "request", fields of the API with a prompt, got {request!r}.')
        endpoint = entry.get("endpoint", "generations")
        if endpoint not in get_args(Endpoint):
            raise UsageError(f'{where}: "endpoint" must be one of {", ".join(get_args(Endpoint))}, got {endpoint!r}.')
        entries.append((float(at), endpoint, request, str(entry.get("kind", "replay"))))
    if not entries:
        raise UsageError(f"{replay.trace} holds no request.")
    if len(entries) > most:
        raise UsageError(f"{replay.trace} holds {len(entries)} requests, more than max_requests = {most}.")
    entries.sort(key=lambda entry: entry[0])
    began = entries[0][0]
    return [
        Planned(i, (at - began) / replay.speed, kind, endpoint, request)
        for i, (at, endpoint, request, kind) in enumerate(entries)
    ]


def rows(path: Path, kind: str | None = None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows of a file, each with its file and line."""
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
