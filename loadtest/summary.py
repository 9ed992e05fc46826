"""Summarizes a run: counts, rates, percentiles, goodput, cost, and whether the measurement itself is valid.

Latency counts from the time at which a request was intended to be sent. So a slow server that holds up the client
cannot shorten the measured latencies.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from hdrh.histogram import HdrHistogram

from loadtest.percentiles import distribution, histogram_of, supported
from loadtest.records import OUTCOMES, Record, Run
from loadtest.scaling import backdated, chip_seconds, scale_ups
from loadtest.scenario import Scenario

MOST_ERRORS = 20  # kinds in the report
LAG_SHARE, LAG_FLOOR_S = 0.01, 0.001  # p99 of the send lag may be this share of the median latency, or this
Summary = dict[str, Any]


def summarize(run: Run) -> Summary:
    scenario = Scenario.model_validate(run.head["scenario"])
    records = sorted(run.records, key=lambda record: record.intended)
    within_window = window(records, scenario)
    answered = [record for record in within_window if record.outcome == "ok"]
    began, ended = bounds(within_window)
    duration = max(ended - began, 1e-9)
    outcomes = Counter(record.outcome for record in records)
    pictures = sum(record.pictures for record in answered)
    within = [
        record for record in answered if scenario.objective_s is not None and record.latency <= scenario.objective_s
    ]
    latency = histogram_of(record.latency for record in answered)
    from_sent = histogram_of(record.done - record.sent for record in answered if record.sent is not None)
    lag = histogram_of(record.sent - record.intended for record in within_window if record.sent is not None)
    return {
        "scenario": run.head["name"],
        "url": run.head["url"],
        "started": run.head["started"],
        "complete": run.ended == "complete",
        "ended": run.ended or "killed",
        "sessions": len(run.sessions),
        "planned": run.head["planned"],
        "requests": len(records),
        "counted": len(within_window),
        "outcomes": {name: outcomes[name] for name in OUTCOMES if outcomes[name]},
        "failed": len(records) - outcomes["ok"],
        "compared": sum(record.compared for record in records),
        "duration_s": duration,
        "offered_per_s": len(within_window) / max(intended_span(within_window), 1e-9),
        "completed_per_s": len(answered) / duration,
        "images": pictures,
        "images_per_s": pictures / duration,
        "objective_s": scenario.objective_s,
        "goodput_per_s": len(within) / duration if scenario.objective_s is not None else None,
        "goodput_share": len(within) / max(len(within_window), 1) if scenario.objective_s is not None else None,
        "latency": distribution(latency),
        "latency_from_sent": distribution(from_sent),
        "first_byte": distribution(
            histogram_of(record.first_byte - record.intended for record in answered if record.first_byte is not None)
        ),
        "first_preview": distribution(
            histogram_of(record.preview - record.intended for record in answered if record.preview is not None)
        ),
        "ingress_wait": distribution(histogram_of(waits(answered, "ingress"))),
        "replica_wait": distribution(histogram_of(waits(answered, "queue"))),
        "moved": sum(record.moves > 0 for record in answered),
        "restarted": sum(record.restarts > 0 for record in answered),
        "send_lag": distribution(lag),
        "invalid": invalid(lag, latency, outcomes["client_overload"]),
        "kinds": kinds(within_window, scenario),
        "server": server_parts(answered),
        "errors": errors(records),
        "scale_ups": [
            asdict(scale_up) | {"total": scale_up.total} for scale_up in scale_ups(with_load(run), run.moment)
        ],
        "most": most(run),
        **cost(run, scenario, pictures, began, ended),
    }


def window(records: Sequence[Record], scenario: Scenario) -> list[Record]:
    """The records outside warm-up and cool-down."""
    last = (
        max((record.intended for record in records), default=0.0)
        if scenario.duration_s is None
        else scenario.duration_s
    )
    return [record for record in records if scenario.warmup_s <= record.intended <= last - scenario.cooldown_s]


def bounds(records: Sequence[Record]) -> tuple[float, float]:
    if not records:
        return 0.0, 0.0
    return min(record.intended for record in records), max(record.done for record in records)


def intended_span(records: Sequence[Record]) -> float:
    """The length of the schedule, including a mean gap after the last request."""
    if len(records) < 2:
        return 0.0
    return (records[-1].intended - records[0].intended) * len(records) / (len(records) - 1)


def invalid(lag: HdrHistogram, latency: HdrHistogram, overloaded: int) -> list[str]:
    """The reasons why this run measured its own client instead of the server. A valid run has none."""
    reasons = []
    if lag.total_count and latency.total_count:
        highest = max(p for p in (50.0, 90.0, 95.0, 99.0) if p == 50 or supported(lag.total_count, p))
        late, median = lag.get_value_at_percentile(highest) / 1e6, latency.get_value_at_percentile(50) / 1e6
        allowed = max(LAG_FLOOR_S, LAG_SHARE * median)
        if late > allowed:
            reasons.append(
                f"requests were sent late: p{highest:g} of the send lag is {seconds(late)}, and "
                f"{seconds(allowed)} is allowed (1 % of the median latency, or {seconds(LAG_FLOOR_S)} if that is more)"
            )
    if overloaded:
        reasons.append(f"{overloaded} requests were never sent, as this machine had too many open")
    return reasons


def kinds(records: Sequence[Record], scenario: Scenario) -> dict[str, Summary]:
    grouped: dict[str, list[Record]] = {}
    for record in records:
        grouped.setdefault(record.kind, []).append(record)
    by_kind = {}
    for name, group in grouped.items():
        answered = [record for record in group if record.outcome == "ok"]
        within = sum(scenario.objective_s is not None and record.latency <= scenario.objective_s for record in answered)
        by_kind[name] = {
            "requests": len(group),
            "ok": len(answered),
            "goodput_share": within / len(group) if scenario.objective_s is not None else None,
            "latency": distribution(histogram_of(record.latency for record in answered)),
            "first_preview": distribution(
                histogram_of(record.preview - record.intended for record in answered if record.preview is not None)
            ),
        }
    return by_kind


def server_parts(records: Sequence[Record]) -> dict[str, float]:
    """Mean seconds of each part of the work, as the server reports them."""
    names = sorted({name for record in records for name in record.server or {}})
    return {
        name: float(np.mean([record.server[name] for record in records if record.server and name in record.server]))
        for name in names
    }


def waits(records: Sequence[Record], place: str) -> list[float]:
    """Seconds that answered requests waited there, as the server reports them."""
    return [record.server[place] for record in records if record.server and place in record.server]


def errors(records: Sequence[Record]) -> list[Summary]:
    """The kinds of failure, each with an example. Messages that differ only in numbers are the same kind."""
    counts: Counter[tuple[str, int | None, str]] = Counter()
    examples: dict[tuple[str, int | None, str], str] = {}
    for record in records:
        if record.outcome != "ok":
            key = record.outcome, record.status, re.sub(r"\d+", "0", record.error or "")
            counts[key] += 1
            examples.setdefault(key, record.error or "")
    return [
        {"outcome": key[0], "status": key[1], "count": count, "example": examples[key]}
        for key, count in counts.most_common(MOST_ERRORS)
    ]


def in_flight(records: Sequence[Record], times: Sequence[float]) -> list[int]:
    """The number of requests in flight at each time, as this client counts them."""
    sent = np.sort([record.sent for record in records if record.sent is not None])
    done = np.sort([record.done for record in records if record.sent is not None])
    flying = np.searchsorted(sent, times, side="right") - np.searchsorted(done, times, side="right")
    return [int(count) for count in flying]


def with_load(run: Run) -> list[dict[str, Any]]:
    """The samples of the cluster, each with the number of requests in flight."""
    samples = backdated(run.timeline, run.moment)
    flying = in_flight(run.records, [sample["t"] for sample in samples])
    return [sample | {"in_flight": count} for sample, count in zip(samples, flying, strict=True)]


def most(run: Run) -> dict[str, int]:
    """The highest and the final number of replicas and of nodes."""
    running = [sample["running"] for sample in run.timeline if "running" in sample]
    nodes = [sum(sample["nodes"].values()) for sample in run.timeline if "nodes" in sample]
    if not running or not nodes:
        return {}
    return {
        "replicas": max(running),
        "replicas_at_end": running[-1],
        "nodes": max(nodes),
        "nodes_at_end": nodes[-1],
    }


def cost(run: Run, scenario: Scenario, pictures: int, began: float, ended: float) -> Summary:
    """Images per chip-second, with the chips declared to Serve, and dollars if the scenario has a price."""
    declared = [sample["chips"] for sample in run.timeline if sample.get("chips")]
    chips = scenario.price.chips_per_replica or (declared[-1] if declared else None)
    used = chip_seconds(with_load(run), chips, began, ended) if chips else 0.0
    if not used or not chips:
        return {"chips_per_replica": chips, "images_per_chip_s": None, "usd_per_1000_images": None}
    price = scenario.price.chip_hour_usd
    dollars = used / 3600 * price / pictures * 1000 if price and pictures else None
    return {"chips_per_replica": chips, "images_per_chip_s": pictures / used, "usd_per_1000_images": dollars}


def seconds(value: float | None) -> str:
    """Formats a duration for people: 45.6 µs, 12.3 ms, 1.23 s."""
    if value is None or math.isnan(value):
        return "–"
    if value < 0.001:
        return f"{value * 1e6:.3g} µs"
    if value < 1:
        return f"{value * 1e3:.3g} ms"
    return f"{value:.3g} s" if value < 100 else f"{value:.0f} s"


def counted(some: int, planned: int | None) -> str:
    return str(some) if planned is None else f"{some} of {planned}"
