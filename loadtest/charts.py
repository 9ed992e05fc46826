"""Draws the charts of the reports with plotly, all but the chart over time, which is in timeline_chart.py."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from hdrh.histogram import HdrHistogram

from loadtest.records import Record
from loadtest.scaling import PHASES
from loadtest.summary import Summary

INK, GRID, BLUE, AMBER, GREEN, RED, GREY = "#1f2933", "#e4e7eb", "#2563eb", "#d97706", "#059669", "#dc2626", "#9aa5b1"
PHASE_COLOURS = ("#d97706", "#7c3aed", "#2563eb", "#0891b2", "#0d9488", "#65a30d", "#db2777")
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


def styled(figure: go.Figure, height: int) -> go.Figure:
    figure.update_layout(
        height=height,
        margin={"l": 64, "r": 56, "t": 36, "b": 44},
        paper_bgcolor="white",
        plot_bgcolor="white",
        font={"family": FONT, "size": 12, "color": INK},
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0, "font": {"size": 11}},
        hoverlabel={"font": {"family": FONT}},
    )
    figure.update_xaxes(gridcolor=GRID, zeroline=False, linecolor=GRID)
    figure.update_yaxes(gridcolor=GRID, zeroline=False, linecolor=GRID)
    return figure


def distribution(summary: Summary) -> go.Figure:
    """Latency by percentile, as HDR plots show it: each further nine gets the same width."""
    figure = go.Figure()
    series = (
        ("from the intended time", "latency", BLUE, "solid"),
        ("from the sent time", "latency_from_sent", GREY, "dash"),
        ("first preview", "first_preview", GREEN, "solid"),
    )
    deepest = 1.0
    for name, key, colour, dash in series:
        if not summary[key]:
            continue
        histogram = HdrHistogram.decode(summary[key]["hdr"])
        count = histogram.total_count
        nines = np.linspace(0, max(1.0, np.log10(count)), 200)
        deepest = max(deepest, float(nines[-1]))
        shares = 100 * (1 - 10**-nines)
        values = [histogram.get_value_at_percentile(share) / 1e6 for share in shares]
        figure.add_trace(
            go.Scatter(
                x=nines,
                y=values,
                customdata=shares,
                name=name,
                mode="lines",
                line={"color": colour, "dash": dash, "width": 2},
                hovertemplate="%{customdata:.5~g} % within %{y:.3g} s",
            )
        )
    marks = [
        (0, "0 %"),
        (np.log10(2), "50 %"),
        (1, "90 %"),
        (np.log10(20), "95 %"),
        (2, "99 %"),
        (3, "99.9 %"),
        (4, "99.99 %"),
    ]
    marks = [(at, name) for at, name in marks if at <= deepest + 0.05]
    figure.update_xaxes(tickvals=[at for at, _ in marks], ticktext=[name for _, name in marks], title_text="percentile")
    figure.update_yaxes(title_text="latency, s", rangemode="tozero")
    return styled(figure, 380)


def latencies_by_kind(records: Sequence[Record]) -> go.Figure:
    """A histogram of latencies, stacked by kind of request."""
    good = [record for record in records if record.outcome == "ok"]
    figure = go.Figure()
    if good:
        shortest, longest = min(record.latency for record in good), max(record.latency for record in good)
        bins = {"start": shortest, "size": max(longest - shortest, 1e-3) / 60}
        for kind in sorted({record.kind for record in good}):
            latencies = [record.latency for record in good if record.kind == kind]
            figure.add_trace(go.Histogram(x=latencies, name=kind[:60], xbins=bins))
    figure.update_layout(
        barmode="stack", bargap=0.05, showlegend=True, colorway=[BLUE, AMBER, GREEN, "#7c3aed", "#db2777"]
    )
    figure.update_xaxes(title_text="latency, s", rangemode="tozero")
    figure.update_yaxes(title_text="requests")
    return styled(figure, 380)


def scale_ups(summary: Summary) -> go.Figure:
    """A bar for each replica that started, from overload to its first picture."""
    replicas = summary["scale_ups"]
    figure = go.Figure()
    names = [
        f"replica {i} on {replica['node_type']}{' (new node)' if replica['new_node'] else ''}"
        for i, replica in enumerate(replicas, 1)
    ]
    for phase, colour in zip(PHASES, PHASE_COLOURS, strict=True):
        bases, widths = [], []
        for replica in replicas:
            before = [
                seconds or 0.0
                for name, seconds in replica["phases"].items()
                if list(PHASES).index(name) < list(PHASES).index(phase)
            ]
            bases.append(replica["began"] + sum(before))
            widths.append(replica["phases"][phase] or 0.0)
        figure.add_trace(
            go.Bar(
                y=names,
                x=widths,
                base=bases,
                name=phase,
                orientation="h",
                marker={"color": colour},
                text=[f"{width:.1f}" if width >= 1 else "" for width in widths],
                textposition="inside",
                insidetextanchor="middle",
                textangle=0,
                customdata=widths,
                hovertemplate="%{customdata:.2f} s<extra>" + phase + "</extra>",
            )
        )
    figure.update_layout(barmode="overlay", legend={"traceorder": "normal"})
    figure.update_xaxes(title_text="seconds of the run; the labels are the seconds of each phase")
    figure.update_yaxes(autorange="reversed")
    styled(figure, 130 + 56 * len(replicas))
    figure.update_layout(margin={"l": 220})
    return figure


def sweep(rates: Sequence[float], summaries: Sequence[Summary], objective_s: float, knee: float | None) -> go.Figure:
    """Latency over the offered rate."""
    figure = go.Figure()
    order = np.argsort(rates)
    for name, colour in (("p50", BLUE), ("p95", AMBER)):
        values = [(summaries[i]["latency"] or {}).get(name) for i in order]
        trace = go.Scatter(
            x=[rates[i] for i in order], y=values, name=name, line={"color": colour}, mode="lines+markers"
        )
        figure.add_trace(trace)
    figure.add_hline(y=objective_s, line={"color": GREEN, "dash": "dash", "width": 1})
    if knee is not None:
        figure.add_vline(x=knee, line={"color": INK, "dash": "dot", "width": 1}, annotation_text=f"knee {knee:.3g}/s")
    figure.update_xaxes(title_text="requests a second, offered", rangemode="tozero")
    figure.update_yaxes(title_text="latency, s; dashed: the objective", type="log", dtick="D2")
    return styled(figure, 420)
