"""The charts of the report, drawn by plotly. Everything over time shares one axis, the seconds of the run."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from hdrh.histogram import HdrHistogram
from plotly.subplots import make_subplots

from loadtest.records import Record, Run
from loadtest.scaling import PHASES
from loadtest.scenario import Scenario
from loadtest.summary import Summary, in_flight, with_load

INK, GRID, BLUE, AMBER, GREEN, RED, GREY = "#1f2933", "#e4e7eb", "#2563eb", "#d97706", "#059669", "#dc2626", "#9aa5b1"
NODE_COLOURS = ("#7c3aed", "#c4b5fd", "#5b21b6", "#a78bfa")
PHASE_COLOURS = ("#d97706", "#7c3aed", "#2563eb", "#0891b2", "#0d9488", "#65a30d", "#db2777")
MOST_POINTS = 4000  # in the cloud of single requests
BINS = 120  # most bins of a rate
MOMENTS = 600  # at which requests in flight are counted
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


def over_time(run: Run, scenario: Scenario) -> go.Figure:
    """Rates and latencies, and under them what the cluster did."""
    samples = with_load(run)
    told = [one for one in samples if "running" in one]
    nodes_told = [one for one in samples if "nodes" in one]
    titles = ["Requests a second", "Latency from the intended time, s", "Requests in the system"]
    heights = [0.22, 0.32, 0.2]
    if told:
        titles += ["Replicas", "Nodes"]
        heights = [0.18, 0.28, 0.16, 0.22, 0.16]
    figure = make_subplots(
        rows=len(titles),
        cols=1,
        shared_xaxes=True,
        vertical_spacing=0.045,
        row_heights=heights,
        subplot_titles=titles,
        specs=[[{"secondary_y": i == 2}] for i in range(len(titles))],
    )
    rates(figure, run.records)
    cloud(figure, run.records, scenario)
    queue(figure, run.records, samples)
    if told:
        replicas(figure, told)
        nodes(figure, nodes_told)
    last = max([one.done for one in run.records] + [one["t"] for one in samples], default=1.0)
    figure.update_xaxes(range=[min(0.0, *(one["t"] for one in samples[:1])) - last * 0.01, last * 1.01])
    figure.update_xaxes(title_text="seconds of the run", row=len(titles), col=1)
    figure.update_annotations(x=0, xanchor="left", font={"size": 13, "color": INK})
    styled(figure, 260 + 190 * len(titles))
    figure.update_layout(hovermode="x unified", legend={"y": 1.03, "traceorder": "normal"})
    return figure


def rates(figure: go.Figure, records: Sequence[Record]) -> None:
    last = max((one.done for one in records), default=1.0)
    width = max(1.0, round(last / BINS))
    edges = np.arange(0, last + width, width)
    lines = (
        ("offered", [one.intended for one in records], GREY, "dot"),
        ("completed", [one.done for one in records if one.outcome == "ok"], BLUE, "solid"),
        ("failed", [one.done for one in records if one.outcome != "ok"], RED, "solid"),
    )
    for name, moments, colour, dash in lines:
        if not moments:
            continue
        counts, _ = np.histogram(moments, edges)
        line = {"color": colour, "dash": dash, "width": 2, "shape": "hvh"}
        trace = go.Scatter(x=edges[:-1] + width / 2, y=counts / width, name=name, line=line, mode="lines")
        figure.add_trace(trace, row=1, col=1)
    figure.update_yaxes(rangemode="tozero", row=1, col=1)


def cloud(figure: go.Figure, records: Sequence[Record], scenario: Scenario) -> None:
    """Every request, or an even part of them, but every failed one."""
    good = sorted((one for one in records if one.outcome == "ok"), key=lambda one: one.intended)
    bad = [one for one in records if one.outcome != "ok"]
    shown = good[:: -(-len(good) // MOST_POINTS) or 1]
    hover = "%{y:.3g} s<extra>%{text}</extra>"
    for name, some, colour, size in (("one request", shown, BLUE, 4), ("one that failed", bad, RED, 6)):
        if some:
            figure.add_trace(
                go.Scatter(
                    x=[one.intended for one in some],
                    y=[one.latency for one in some],
                    text=[f"request {one.id} {one.outcome} {one.kind}"[:80] for one in some],
                    hovertemplate=hover,
                    name=name,
                    mode="markers",
                    marker={"color": colour, "size": size, "opacity": 0.45},
                ),
                row=2,
                col=1,
            )
    if len(good) >= 20:
        times, latencies = np.array([one.intended for one in good]), np.array([one.latency for one in good])
        window = max(10, len(good) // 40)
        middles = range(0, len(good) - window + 1, max(1, window // 3))
        for name, share, colour in (("p50", 50, INK), ("p95", 95, AMBER)):
            values = [np.percentile(latencies[i : i + window], share) for i in middles]
            moments = [float(np.mean(times[i : i + window])) for i in middles]
            line = {"color": colour, "width": 2}
            figure.add_trace(
                go.Scatter(x=moments, y=values, name=f"{name} of {window} in a row", line=line), row=2, col=1
            )
    if scenario.objective_s and any(one.latency > scenario.objective_s / 2 for one in good):
        figure.add_hline(y=scenario.objective_s, line={"color": GREEN, "dash": "dash", "width": 1}, row=2, col=1)
    figure.update_yaxes(rangemode="tozero", row=2, col=1)


def queue(figure: go.Figure, records: Sequence[Record], samples: Sequence[Mapping[str, Any]]) -> None:
    """In flight as this client counts it; waiting, and how full the batches are, as the replicas do."""
    moments = [float(t) for t in np.linspace(0, max((one.done for one in records), default=0.0), MOMENTS)]
    flying = [*zip(moments, in_flight(records, moments), strict=True)]
    waiting = [(one["t"], one["waiting"]) for one in samples if "waiting" in one]
    fill = [(one["t"], one["bucket_fill"]) for one in samples if one.get("bucket_fill") is not None]
    for name, points, colour in (("in flight", flying, BLUE), ("waiting in replicas", waiting, AMBER)):
        line = {"color": colour, "width": 2}
        x, y = zip(*points, strict=True) if points else ((), ())
        figure.add_trace(go.Scatter(x=x, y=y, name=name, line=line, mode="lines"), row=3, col=1)
    if fill:
        x, y = zip(*fill, strict=True)
        line = {"color": GREEN, "width": 1, "dash": "dot"}
        figure.add_trace(
            go.Scatter(x=x, y=y, name="batch fill", line=line, mode="lines"), row=3, col=1, secondary_y=True
        )
    figure.update_yaxes(rangemode="tozero", row=3, col=1)
    figure.update_yaxes(
        range=[0, 1.05],
        tickvals=[0, 0.5, 1],
        tickformat=".0%",
        showgrid=False,
        row=3,
        col=1,
        secondary_y=True,
        title_text="batch fill",
    )


def replicas(figure: go.Figure, told: Sequence[Mapping[str, Any]]) -> None:
    x = [one["t"] for one in told]
    for name, colour in (("running", GREEN), ("starting", AMBER), ("stopping", GREY)):
        y = [one[name] for one in told]
        if not any(y):
            continue
        figure.add_trace(layer(x, y, name, "replicas", colour), row=4, col=1)
    line = {"shape": "hv", "dash": "dash", "width": 2, "color": INK}
    figure.add_trace(
        go.Scatter(x=x, y=[one["target"] for one in told], name="target", line=line, mode="lines"), row=4, col=1
    )
    whole_numbers(figure, 4, [one["target"] for one in told] + [one["running"] + one["starting"] for one in told])


def nodes(figure: go.Figure, told: Sequence[Mapping[str, Any]]) -> None:
    x = [one["t"] for one in told]
    types = sorted({name for one in told for name in one["nodes"]})
    for name, colour in zip(types, NODE_COLOURS * len(types), strict=False):
        y = [one["nodes"].get(name, 0) for one in told]
        figure.add_trace(layer(x, y, name, "nodes", colour), row=5, col=1)
    whole_numbers(figure, 5, [sum(one["nodes"].values()) for one in told])


def layer(x: Sequence[float], y: Sequence[int], name: str, group: str, colour: str) -> go.Scatter:
    """One of those that are stacked on one another."""
    line = {"shape": "hv", "width": 1, "color": colour}
    return go.Scatter(x=x, y=y, name=name, mode="lines", stackgroup=group, line=line)


def whole_numbers(figure: go.Figure, row: int, values: Sequence[int]) -> None:
    most = max(values, default=1)
    figure.update_yaxes(range=[0, most + 0.5], dtick=max(1, -(-most // 5)), row=row, col=1)


def distribution(summary: Summary) -> go.Figure:
    """Latency by percentile, on an axis that gives each further nine as much room, as HDR plots have it."""
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
        made = HdrHistogram.decode(summary[key]["hdr"])
        count = made.total_count
        nines = np.linspace(0, max(1.0, np.log10(count)), 200)
        deepest = max(deepest, float(nines[-1]))
        shares = 100 * (1 - 10**-nines)
        values = [made.get_value_at_percentile(share) / 1e6 for share in shares]
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


def histogram(records: Sequence[Record]) -> go.Figure:
    """How many requests took how long, each kind stacked."""
    good = [one for one in records if one.outcome == "ok"]
    figure = go.Figure()
    if good:
        latencies = [one.latency for one in good]
        width = max(max(latencies) - min(latencies), 1e-3) / 60
        for kind in sorted({one.kind for one in good}):
            some = [one.latency for one in good if one.kind == kind]
            figure.add_trace(go.Histogram(x=some, name=kind[:60], xbins={"start": min(latencies), "size": width}))
    figure.update_layout(
        barmode="stack", bargap=0.05, showlegend=True, colorway=[BLUE, AMBER, GREEN, "#7c3aed", "#db2777"]
    )
    figure.update_xaxes(title_text="latency, s", rangemode="tozero")
    figure.update_yaxes(title_text="requests")
    return styled(figure, 380)


def scale_ups(summary: Summary) -> go.Figure:
    """A bar for each replica that came, from overload to its first picture."""
    found = summary["scale_ups"]
    figure = go.Figure()
    names = [
        f"replica {i} on {one['node_type']}{' (new node)' if one['new_node'] else ''}" for i, one in enumerate(found, 1)
    ]
    for phase, colour in zip(PHASES, PHASE_COLOURS, strict=True):
        bases, widths = [], []
        for one in found:
            before = [
                seconds or 0.0
                for name, seconds in one["phases"].items()
                if list(PHASES).index(name) < list(PHASES).index(phase)
            ]
            bases.append(one["began"] + sum(before))
            widths.append(one["phases"][phase] or 0.0)
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
    figure.update_xaxes(title_text="seconds of the run; the figures are the seconds that each part took")
    figure.update_yaxes(autorange="reversed")
    styled(figure, 130 + 56 * len(found))
    figure.update_layout(margin={"l": 220})
    return figure


def sweep(rates: Sequence[float], summaries: Sequence[Summary], objective_s: float, knee: float | None) -> go.Figure:
    """Latency over the rate that is offered, up to where it is no longer held."""
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
