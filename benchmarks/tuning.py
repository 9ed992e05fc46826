"""Tunes the whole-batch baseline to a load. It simulates each batch size and wait, and really runs the best few."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from app.engine.verbs import Verbs
from app.types import Generation
from benchmarks.devices import Device
from benchmarks.load import Submit, offer, offer_all
from benchmarks.report import log
from benchmarks.whole_batch import Picture, Setting, WholeBatch, batch_seconds, ranked
from loadtest.arrivals import Seconds

WAITS = (0.0, 0.1, 0.25, 0.5, 1.0)  # shares of the mean time that a request takes alone
CONFIRMED, CLOSE = 2, 1.25  # how many settings really run, and how far from the best a simulated score may be

Score = Callable[[Sequence[Generation], Seconds], float]


@dataclass(frozen=True)
class Load:
    """The requests and arrival times of each run. Both systems get the same."""

    offers: list[tuple[list[Generation], Seconds]]
    setting: Setting  # the baseline's best for this load


@contextmanager
def served_in_batches(pipeline: Verbs, setting: Setting) -> Iterator[Submit]:
    """Runs the baseline while the block runs; gives its `submit`."""
    server = WholeBatch(pipeline, setting)
    try:
        yield server.submit
    finally:
        server.close()


def saturated(device: Device, requests: Sequence[Generation]) -> tuple[Setting, float]:
    """The batch size with the highest throughput when all requests arrive at once, and that throughput."""
    offers = [(requests, np.zeros(len(requests)))]
    ranking = ranked(device.pipeline, device.batches, [0.0], offers, lambda _, latencies: latencies.max())
    rates = {}
    for setting in worth_a_run(ranking):
        with served_in_batches(device.pipeline, setting) as submit:
            rates[setting] = len(requests) / offer_all(submit, requests).makespan_s
    best = max(rates, key=lambda setting: rates[setting])
    log(f"{device.name}: the baseline's capacity is {rates[best]:.3g} requests/s, {best}")
    return best, rates[best]


def tuned(device: Device, offers: list[tuple[list[Generation], Seconds]], score: Score, what: str) -> Load:
    """The load with the setting with which the baseline scores best on it."""
    alone_s = np.mean([batch_seconds(device.pipeline, [Picture(request, 0)]) for request in offers[0][0]])
    waits = [float(share * alone_s) for share in WAITS]
    ranking = ranked(device.pipeline, device.batches, waits, offers, score)
    scores = {}
    for setting in worth_a_run(ranking):
        with served_in_batches(device.pipeline, setting) as submit:
            scores[setting] = score(offers[0][0], offer(submit, *offers[0]).latencies)
    best = min(scores, key=lambda setting: scores[setting])
    log(f"{device.name}: for {what} the baseline takes {best}")
    return Load(offers, best)


def worth_a_run(ranking: Sequence[tuple[float, Setting]]) -> list[Setting]:
    """The few settings that simulate best. Of settings with equal scores only the first counts."""
    distinct: dict[float, Setting] = {}
    for score, setting in ranking:
        distinct.setdefault(round(score, 9), setting)
    return [setting for score, setting in list(distinct.items())[:CONFIRMED] if score <= CLOSE * ranking[0][0]]
