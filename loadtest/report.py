"""Writes what derives from a run's records: summary.json, requests.csv, and a self-contained report.html."""

import csv
import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import plotly.graph_objects as go
import yaml
from plotly.offline import get_plotlyjs

from loadtest import charts
from loadtest.percentiles import PERCENTILES
from loadtest.records import MEANING, Run
from loadtest.scaling import PHASES
from loadtest.scenario import Scenario
from loadtest.summary import Summary, counted, seconds, summarize
from loadtest.sweep import Level
from loadtest.timeline_chart import over_time

PAGE = Path(__file__).with_name("report.html")
SMALL_PRINT = '<p class="note">Small: the 95 % confidence interval of the percentile, for independent requests.</p>'
COLUMNS = (
    *("id", "kind", "endpoint", "outcome", "status", "intended", "sent", "first_byte", "preview", "done"),
    *("latency", "latency_from_sent", "send_lag", "pictures", "bytes", "digest", "moves", "restarts", "error"),
)
LATENCIES = (
    ("latency", "from the intended time"),
    ("latency_from_sent", "from the sent time"),
    ("first_byte", "to the first byte"),
    ("first_preview", "to the first preview"),
    ("ingress_wait", "waited in the ingress"),
    ("replica_wait", "waited in the replica"),
    ("send_lag", "send lag"),
)


def write(run: Run) -> Summary:
    summary = summarize(run)
    (run.folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    write_csv(run)
    (run.folder / "report.html").write_text(page(run, summary))
    return summary


def write_csv(run: Run) -> None:
    with (run.folder / "requests.csv").open("w", newline="") as file:
        rows = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        rows.writeheader()
        for record in sorted(run.records, key=lambda record: record.id):
            sent = (
                {}
                if record.sent is None
                else {"latency_from_sent": record.done - record.sent, "send_lag": record.sent - record.intended}
            )
            rows.writerow(vars(record) | {"latency": record.latency, **sent})


def page(run: Run, summary: Summary) -> str:
    scenario = Scenario.model_validate(run.head["scenario"])
    figures = [
        section("Over time", over_time(run, scenario)),
        section("Latency by percentile", charts.distribution(summary)) if summary["latency"] else "",
        section("Histogram of latencies", charts.latencies_by_kind(run.records)) if summary["latency"] else "",
    ]
    if summary["scale_ups"]:
        parts = "".join(f"<li><b>{name}</b> {meaning}</li>" for name, meaning in PHASES.items())
        words = "From overload of the running replicas to the first picture of each new replica:"
        explained = f"<p>{words}</p><ul class=parts>{parts}</ul>"
        figures.insert(1, section("Scale-ups", charts.scale_ups(summary), explained))
    return Template(PAGE.read_text()).substitute(
        title=escape(f"{summary['scenario']}: load test of {summary['url']}"),
        heading=escape(summary["scenario"]),
        facts=facts(run, summary),
        verdict=verdict(summary),
        tiles="".join(tile(*values) for values in tiles(summary)),
        percentiles=percentile_table(summary) + SMALL_PRINT,
        kinds=kinds_table(summary),
        errors=errors_table(summary),
        figures="".join(figures),
        scenario=escape(yaml.safe_dump(run.head["scenario"], sort_keys=False)),
        plotly=get_plotlyjs(),
    )


def sweep_page(name: str, url: str, levels: Sequence[Level], objective_s: float, knee: float | None) -> str:
    rows = []
    for level in sorted(levels, key=lambda level: level.rate):
        latency = level.summary["latency"] or {}
        quantiles = [seconds(latency.get(p)) for p in ("p50", "p95", "p99")]
        share = f"{level.summary['goodput_share'] or 0.0:.1%}"
        rows.append([f"{level.rate:.3g}/s", *quantiles, share, "holds" if level.held else level.why])
    conclusion = f"The knee is at {knee:.3g} requests a second." if knee else "Not even the first rate holds."
    figure = charts.sweep([level.rate for level in levels], [level.summary for level in levels], objective_s, knee)
    return Template(PAGE.read_text()).substitute(
        title=escape(f"{name}: sweep of {url}"),
        heading=escape(f"{name}: a sweep"),
        facts=escape(f"{url} · a rate holds if 95 % are answered within {objective_s:g} s and nothing fails"),
        verdict=f'<p class="verdict {"good" if knee else "bad"}">{escape(conclusion)}</p>',
        tiles="",
        percentiles=table(["offered", "p50", "p95", "p99", "goodput", ""], rows),
        kinds="",
        errors="",
        figures=section("Latency over the rate", figure),
        scenario=escape("Each rate has a folder beside this file, with its own report and scenario."),
        plotly=get_plotlyjs(),
    )


def section(title: str, figure: go.Figure, text: str = "") -> str:
    drawn = figure.to_html(
        full_html=False, include_plotlyjs=False, config={"displayModeBar": False, "responsive": True}
    )
    return f"<section><h2>{escape(title)}</h2>{text}{drawn}</section>"


def facts(run: Run, summary: Summary) -> str:
    model = (run.head.get("model") or {}).get("id")
    parts = [
        summary["started"],
        summary["url"],
        f"model {model}" if model else None,
        f"{counted(summary['requests'], summary['planned'])} requests",
        f"{summary['moved']} changed replicas, {summary['restarted']} began again in another",
        f"{summary['compared']} compared with an earlier answer for the same seed",
        f"{summary['sessions']} sessions, as it was resumed" if summary["sessions"] > 1 else None,
    ]
    return " · ".join(escape(part) for part in parts if part)


def verdict(summary: Summary) -> str:
    lines = [("bad", f"This run is invalid: {reason}.") for reason in summary["invalid"]]
    if summary["failed"]:
        counts = ", ".join(f"{count} {name}" for name, count in summary["outcomes"].items() if name != "ok")
        lines.append(("bad", f"{summary['failed']} of {summary['requests']} requests failed: {counts}."))
    if not summary["complete"]:
        lines.append(("warn", f"The run did not end by itself ({summary['ended']}); it can be resumed."))
    if not lines:
        lines = [("good", "Every request was sent on time and got its pictures.")]
    return "".join(f'<p class="verdict {kind}">{escape(text)}</p>' for kind, text in lines)


def tiles(summary: Summary) -> Iterable[tuple[str, str, str]]:
    latency = summary["latency"] or {}
    yield "completed", f"{summary['completed_per_s']:.3g}/s", f"offered {summary['offered_per_s']:.3g}/s"
    yield "images", f"{summary['images_per_s']:.3g}/s", f"{summary['images']} in {summary['duration_s']:.0f} s"
    for name in ("p50", "p95", "p99"):
        yield name, seconds(latency.get(name)), "latency" if latency.get(name) is not None else "too few requests"
    if summary["goodput_share"] is not None:
        yield "goodput", f"{summary['goodput_share']:.1%}", f"within {seconds(summary['objective_s'])}"
    yield "failed", str(summary["failed"]), f"of {summary['requests']}"
    if most := summary["most"]:
        yield "replicas", f"{most['replicas']}", f"at most, on {most['nodes']} node{'s' * (most['nodes'] != 1)}"
    if summary["images_per_chip_s"] is not None:
        yield "per chip", f"{summary['images_per_chip_s']:.3g}", "images/s, as declared"
    if summary["usd_per_1000_images"] is not None:
        yield "cost", f"${summary['usd_per_1000_images']:.2f}", "for 1,000 images"


def tile(name: str, value: str, detail: str) -> str:
    return f"<div class=tile><span>{escape(name)}</span><b>{escape(value)}</b><i>{escape(detail)}</i></div>"


def percentile_table(summary: Summary) -> str:
    heads = ["", "count", "mean", *(f"p{p:g}" for p in PERCENTILES), "max"]
    rows = []
    for key, name in LATENCIES:
        if latency := summary[key]:
            quantiles = [with_interval(latency, f"p{p:g}") for p in PERCENTILES]
            rows.append([name, str(latency["count"]), seconds(latency["mean"]), *quantiles, seconds(latency["max"])])
    return table(heads, rows)


def with_interval(latency: Summary, name: str) -> str:
    """A percentile, and on a second line its 95 % confidence interval."""
    if latency[name] is None:
        return seconds(None)
    low, high = latency["between"][name]
    return f"{seconds(latency[name])}\n{seconds(low)} to {seconds(high)}"


def kinds_table(summary: Summary) -> str:
    if len(summary["kinds"]) < 2:
        return ""
    rows = []
    for name, kind in summary["kinds"].items():
        latency = kind["latency"] or {}
        good = "–" if kind["goodput_share"] is None else f"{kind['goodput_share']:.1%}"
        quantiles = [seconds(latency.get(p)) for p in ("p50", "p95", "p99")]
        rows.append([name, f"{kind['ok']} of {kind['requests']}", *quantiles, good])
    return "<h3>By kind of request</h3>" + table(["", "answered", "p50", "p95", "p99", "goodput"], rows)


def errors_table(summary: Summary) -> str:
    if not summary["errors"]:
        return ""
    rows = [
        [
            error["outcome"],
            MEANING[error["outcome"]],
            str(error["status"] or "–"),
            str(error["count"]),
            error["example"],
        ]
        for error in summary["errors"]
    ]
    return "<h3>Failures</h3>" + table(["", "meaning", "status", "count", "for example"], rows, "words")


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]], kind: str = "") -> str:
    head = "".join(f"<th>{escape(heading)}</th>" for heading in heads)
    body = "".join("<tr>" + "".join(map(table_cell, row)) + "</tr>" for row in rows)
    return f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def table_cell(cell: Any) -> str:
    """A table cell. A second line of its text becomes small print."""
    first, _, second = str(cell).partition("\n")
    return f"<td>{escape(first)}" + (f"<small>{escape(second)}</small>" if second else "") + "</td>"
