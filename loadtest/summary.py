"""What a run came to: counts, rates, percentiles, goodput, cost, and whether its own clocks can be trusted.

Percentiles come from HDR histograms of microseconds (three significant digits), which the summary carries, so that
those of several runs can be added up. Latency counts from the time at which a request was intended to be sent: a
client that is held up by a slow server must not shorten what it measures.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from hdrh.histogram import HdrHistogram

from loadtest.records import OUTCOMES, Record, Run
from loadtest.scaling import backdated, chip_seconds, scale_ups
from loadtest.scenario import Scenario

PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)
HIGHEST_US = 24 * 3600 * 1_000_000
DIGITS = 3
MOST_ERRORS = 20  # kinds that are told
LAG_SHARE, LAG_FLOOR_S = 0.01, 0.001  # of the median latency that the send lag's p99 may be, and what always is fine
Summary = dict[str, Any]


def summarize(run: Run) -> Summary:
    scenario = Scenario.model_validate(run.head["scenario"])
    records = sorted(run.records, key=lambda one: one.intended)
    within_window = window(records, scenario)
    answered = [one for one in within_window if one.outcome == "ok"]
    began, ended = bounds(within_window)
    duration = max(ended - began, 1e-9)
    outcomes = Counter(one.outcome for one in records)
    pictures = sum(one.pictures for one in answered)
    within = [one for one in answered if scenario.objective_s is not None and one.latency <= scenario.objective_s]
    latency = histogram(one.latency for one in answered)
    from_sent = histogram(one.done - one.sent for one in answered if one.sent is not None)
    lag = histogram(one.sent - one.intended for one in within_window if one.sent is not None)
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
        "compared": sum(one.compared for one in records),
        "duration_s": duration,
        "offered_per_s": len(within_window) / max(intended_span(within_window), 1e-9),
        "completed_per_s": len(answered) / duration,
        "images": pictures,
        "images_per_s": pictures / duration,
        "objective_s": scenario.objective_s,
        "goodput_per_s": len(within) / duration if scenario.objective_s is not None else None,
        "goodput_share": len(within) / max(len(within_window), 1) if scenario.objective_s is not None else None,
        "latency": told(latency),
        "latency_from_sent": told(from_sent),
        "first_byte": told(histogram(one.first_byte - one.intended for one in answered if one.first_byte is not None)),
        "first_preview": told(histogram(one.preview - one.intended for one in answered if one.preview is not None)),
        "send_lag": told(lag),
        "invalid": invalid(lag, latency, outcomes["client_overload"]),
        "kinds": kinds(within_window, scenario),
        "server": server_parts(answered),
        "errors": errors(records),
        "scale_ups": [asdict(one) | {"total": one.total} for one in scale_ups(with_load(run), run.moment)],
        "most": most(run),
        **cost(run, scenario, pictures, began, ended),
    }


def window(records: Sequence[Record], scenario: Scenario) -> list[Record]:
    """Without what was sent to warm up, or while it ran out."""
    last = max((one.intended for one in records), default=0.0) if scenario.duration_s is None else scenario.duration_s
    return [one for one in records if scenario.warmup_s <= one.intended <= last - scenario.cooldown_s]


def bounds(records: Sequence[Record]) -> tuple[float, float]:
    if not records:
        return 0.0, 0.0
    return min(one.intended for one in records), max(one.done for one in records)


def intended_span(records: Sequence[Record]) -> float:
    """As long as the schedule would be if one more request came at the end."""
    if len(records) < 2:
        return 0.0
    return (records[-1].intended - records[0].intended) * len(records) / (len(records) - 1)


def histogram(seconds: Iterable[float]) -> HdrHistogram:
    made = HdrHistogram(1, HIGHEST_US, DIGITS)
    for one in seconds:
        made.record_value(min(HIGHEST_US, max(1, round(one * 1e6))))
    return made


def told(made: HdrHistogram) -> Summary | None:
    """In seconds. A percentile that less than one request lies beyond is the maximum in disguise, so it is None."""
    if not made.total_count:
        return None
    count = made.total_count
    return {
        "count": count,
        "mean": made.get_mean_value() / 1e6,
        "min": made.get_min_value() / 1e6,
        "max": made.get_max_value() / 1e6,
        **{f"p{p:g}": made.get_value_at_percentile(p) / 1e6 if supported(count, p) else None for p in PERCENTILES},
        "between": {f"p{p:g}": between_95(made, p) for p in PERCENTILES if supported(count, p)},
        "hdr": made.encode().decode(),
    }


def between_95(made: HdrHistogram, percentile: float) -> tuple[float, float]:
    """Where the percentile of all requests like these is, with a confidence of 95 %: the order statistics between which
    the binomial distribution puts its rank. That takes them as independent, which in one queue they are not quite."""
    count, share = made.total_count, percentile / 100
    reach = 1.96 * math.sqrt(count * share * (1 - share))
    ranks = max(1.0, count * share - reach), min(float(count), count * share + reach + 1)
    low, high = (made.get_value_at_percentile(100 * rank / count) / 1e6 for rank in ranks)
    return low, high


def supported(count: int, percentile: float) -> bool:
    """Whether at least one request lies beyond it."""
    return count * (100 - percentile) >= 100 - 1e-6


def invalid(lag: HdrHistogram, latency: HdrHistogram, overloaded: int) -> list[str]:
    """Why this run measured its own client rather than the server; empty where it did not."""
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
    for one in records:
        grouped.setdefault(one.kind, []).append(one)
    found = {}
    for name, group in grouped.items():
        answered = [one for one in group if one.outcome == "ok"]
        within = sum(scenario.objective_s is not None and one.latency <= scenario.objective_s for one in answered)
        found[name] = {
            "requests": len(group),
            "ok": len(answered),
            "goodput_share": within / len(group) if scenario.objective_s is not None else None,
            "latency": told(histogram(one.latency for one in answered)),
            "first_preview": told(histogram(one.preview - one.intended for one in answered if one.preview is not None)),
        }
    return found


def server_parts(records: Sequence[Record]) -> dict[str, float]:
    """Means of what the server says that each part took, in seconds."""
    names = sorted({name for one in records for name in one.server or {}})
    return {
        name: float(np.mean([one.server[name] for one in records if one.server and name in one.server]))
        for name in names
    }


def errors(records: Sequence[Record]) -> list[Summary]:
    """Each kind of failure, those whose words differ only in numbers together, with an example."""
    counts: Counter[tuple[str, int | None, str]] = Counter()
    examples: dict[tuple[str, int | None, str], str] = {}
    for one in records:
        if one.outcome != "ok":
            key = one.outcome, one.status, re.sub(r"\d+", "0", one.error or "")
            counts[key] += 1
            examples.setdefault(key, one.error or "")
    return [
        {"outcome": key[0], "status": key[1], "count": count, "example": examples[key]}
        for key, count in counts.most_common(MOST_ERRORS)
    ]


def in_flight(records: Sequence[Record], times: Sequence[float]) -> list[int]:
    """At each moment, as this client counts them."""
    sent = np.sort([one.sent for one in records if one.sent is not None])
    done = np.sort([one.done for one in records if one.sent is not None])
    flying = np.searchsorted(sent, times, side="right") - np.searchsorted(done, times, side="right")
    return [int(count) for count in flying]


def with_load(run: Run) -> list[dict[str, Any]]:
    """The samples, each with the requests that were in flight."""
    samples = backdated(run.timeline, run.moment)
    flying = in_flight(run.records, [sample["t"] for sample in samples])
    return [sample | {"in_flight": count} for sample, count in zip(samples, flying, strict=True)]


def most(run: Run) -> dict[str, int]:
    """Replicas and nodes at their most and in the end."""
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
    """Per chip as declared to Serve, and in dollars where the scenario has a price."""
    declared = [sample["chips"] for sample in run.timeline if sample.get("chips")]
    chips = scenario.price.chips_per_replica or (declared[-1] if declared else None)
    used = chip_seconds(with_load(run), chips, began, ended) if chips else 0.0
    if not used or not chips:
        return {"chips_per_replica": chips, "images_per_chip_s": None, "usd_per_1000_images": None}
    price = scenario.price.chip_hour_usd
    dollars = used / 3600 * price / pictures * 1000 if price and pictures else None
    return {"chips_per_replica": chips, "images_per_chip_s": pictures / used, "usd_per_1000_images": dollars}


def merged(summaries: Sequence[Summary]) -> Summary | None:
    """The latency of several runs together."""
    whole = histogram([])
    for one in summaries:
        if one["latency"]:
            whole.decode_and_add(one["latency"]["hdr"].encode())
    return told(whole)


def seconds(value: float | None) -> str:
    """For people: 45.6 µs, 12.3 ms, 1.23 s."""
    if value is None or math.isnan(value):
        return "–"
    if value < 0.001:
        return f"{value * 1e6:.3g} µs"
    if value < 1:
        return f"{value * 1e3:.3g} ms"
    return f"{value:.3g} s" if value < 100 else f"{value:.0f} s"


def counted(some: int, planned: int | None) -> str:
    return str(some) if planned is None else f"{some} of {planned}"
