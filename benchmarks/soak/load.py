"""Draws the load of a soak test from a seed: which clients come when, and when a replica is killed.

It knows nothing of HTTP. The same seed and length give the same load.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from loadtest.arrivals import Span, gamma, through
from loadtest.plan import PROMPTS, Planned, read_prompts
from loadtest.scenario import Endpoint

Kind = Literal["equal", "mixed", "stream", "leaves at once", "leaves a stream", "never reads", "bad request", "burst"]
WEIGHTS: Mapping[Kind, float] = {
    "equal": 5,  # one of a few requests that were answered alone before, so that every answer can be compared
    "mixed": 4,
    "stream": 2,
    "leaves at once": 1,
    "leaves a stream": 1,
    "never reads": 0.3,
    "bad request": 2,
}
BURSTINESS = 2.0  # standard deviation of the gaps over their mean; 1 is Poisson
MOST_REQUESTS = 1_000_000
BURST_EVERY_S, BURST_REQUESTS = 420.0, 60  # a burst is larger than the queue
KILL_EVERY_S, KILL_SPREAD_S = 240.0, 60.0
FIRST_KILL_S = 100.0
KILLING = 2 / 3  # share of the time; after it no replica is killed, so that its leaks show
EQUAL_REQUESTS = 8
STEPS, SCALES, IMAGES, FORMATS = (2, 4, 8, 20, 50), (1.0, 4.0), (1, 1, 1, 2, 4), ("png", "webp", "jpeg")
LONG = {"num_inference_steps": 100, "sampler": None}  # some samplers allow fewer steps, the default allows 100


@dataclass(frozen=True)
class BadRequest:
    method: str
    path: str
    body: bytes | None
    status: int  # that the answer must have
    headers: Mapping[str, str] = field(default_factory=lambda: {"Content-Type": "application/json"})


GENERATIONS = "/v1/images/generations"
BAD_REQUESTS: Mapping[str, BadRequest] = {
    "no prompt": BadRequest("POST", GENERATIONS, b"{}", 400),
    "no JSON": BadRequest("POST", GENERATIONS, b'{"prompt": ', 400),
    "not UTF-8": BadRequest("POST", GENERATIONS, b'{"prompt": "\xff"}', 400),
    "deep JSON": BadRequest("POST", GENERATIONS, b"[" * 30_000, 400),
    "unknown field": BadRequest("POST", GENERATIONS, b'{"prompt": "a", "colour": "red"}', 400),
    "unknown size": BadRequest("POST", GENERATIONS, b'{"prompt": "a", "size": "33x33"}', 400),
    "long prompt": BadRequest("POST", GENERATIONS, b'{"prompt": "%s"}' % (b"a" * 4001), 400),
    "another model": BadRequest("POST", GENERATIONS, b'{"prompt": "a", "model": "gpt-image-2"}', 404),
    "large body": BadRequest("POST", GENERATIONS, b" " * (1 << 20), 413),
    "another type": BadRequest("POST", GENERATIONS, b"prompt=a", 415, {"Content-Type": "text/plain"}),
    "bad query": BadRequest("GET", "/imagine?prompt=a&seed=-1", None, 400, {}),
    "wrong method": BadRequest("DELETE", "/v1/models", None, 405, {}),
    "no route": BadRequest("GET", "/v2/images", None, 404, {}),
    "no model": BadRequest("GET", "/v1/models/nobody/nothing", None, 404, {}),
}


@dataclass(frozen=True)
class Load:
    """The clients and the times of kills. The `request` of a bad request has only its name, as `bad`."""

    requests: Sequence[Planned]
    kills: Sequence[float]
    duration_s: float


def plan(seed: int, duration_s: float, rate: float, samplers: Sequence[str]) -> Load:
    times_rng, kinds_rng, kills_rng = np.random.default_rng(seed).spawn(3)
    span = Span(rate, rate, duration_s)
    times = through([span], gamma(span.count, MOST_REQUESTS, BURSTINESS, times_rng))
    names, weights = [*WEIGHTS], np.array([*WEIGHTS.values()])
    kinds: list[tuple[float, Kind]] = [
        (float(at), names[int(i)])
        for at, i in zip(times, kinds_rng.choice(len(names), len(times), p=weights / weights.sum()), strict=True)
    ]
    for burst in range(1, math.ceil(duration_s / BURST_EVERY_S)):
        kinds += [(burst * BURST_EVERY_S, "burst")] * BURST_REQUESTS
    prompts = [str(fields["prompt"]) for fields in read_prompts(PROMPTS)]
    equal = equal_requests(samplers)
    requests = [
        Planned(i, at, kind, *drawn(kind, kinds_rng, equal, prompts, samplers))
        for i, (at, kind) in enumerate(sorted(kinds, key=lambda pair: pair[0]))
    ]
    return Load(requests, kill_times(duration_s, kills_rng), duration_s)


def equal_requests(samplers: Sequence[str]) -> list[Mapping[str, Any]]:
    return [
        {
            "prompt": f"a red house under a yellow sun, number {i}",
            "seed": 1000 + i,
            "num_inference_steps": 3 + 2 * i,
            "guidance_scale": SCALES[i % 2],
            "sampler": samplers[i % len(samplers)],
        }
        for i in range(EQUAL_REQUESTS)
    ]


def drawn(
    kind: Kind,
    rng: np.random.Generator,
    equal: Sequence[Mapping[str, Any]],
    prompts: Sequence[str],
    samplers: Sequence[str],
) -> tuple[Endpoint, Mapping[str, Any]]:
    """The endpoint and the request of a client of this kind."""

    def draw(values: Sequence[Any]) -> Any:
        return values[int(rng.integers(len(values)))]

    streamed = {"stream": True, "partial_images": int(rng.integers(4))}
    match kind:
        case "bad request":
            return "generations", {"bad": draw([*BAD_REQUESTS])}
        case "equal" | "burst":
            endpoint: Endpoint = draw(("generations", "imagine"))
            return endpoint, {**draw(equal)}
        case "stream" if rng.random() < 0.5:
            return "generations", {**draw(equal), **streamed}
    request = {
        "prompt": draw(prompts),
        "seed": int(rng.integers(2**32)),
        "num_inference_steps": draw(STEPS),
        "guidance_scale": draw(SCALES),
        "sampler": draw(samplers),
    }
    match kind:
        case "mixed":
            return "generations", request | {"n": draw(IMAGES), "output_format": draw(FORMATS)}
        case "leaves at once":
            return "generations", request | LONG | {"n": draw(IMAGES)}
        case "leaves a stream":
            return "generations", request | LONG | {"stream": True, "partial_images": 3}
    return "generations", request | streamed


def kill_times(duration_s: float, rng: np.random.Generator) -> list[float]:
    kills, at = [], FIRST_KILL_S
    while at < KILLING * duration_s:
        kills.append(at)
        at += KILL_EVERY_S + float(rng.uniform(-KILL_SPREAD_S, KILL_SPREAD_S))
    return kills
