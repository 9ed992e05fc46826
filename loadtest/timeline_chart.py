"""Draws the chart of a run over time: rates, latencies, queues, replicas and nodes share an axis of seconds."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from loadtest.charts import AMBER, BLUE, GREEN, GREY, INK, RED, styled
from loadtest.records import Record, Run
from loadtest.scenario import Scenario
from loadtest.summary import in_flight, with_load

NODE_COLOURS = ("#7c3aed", "#c4b5fd", "#5b21b6", "#a78bfa")
MOST_POINTS = 4000  # in the scatter plot of requests
BINS = 120  # at most, of a rate
MOMENTS = 600  # points of the curve of requests in flight

Samples = Sequence[Mapping[str, Any]]


def over_time(run: Run, scenario: Scenario) -> go.Figure:
    """Rates, latencies and requests in the system, and under them replicas and nodes if they are known."""
    samples = with_load(run)
    with_replicas = [sample for sample in samples if "running" in sample]
    with_nodes = [sample for sample in samples if "nodes" in sample]
    titles = ["Requests a second", "Latency from the intended time, s", "Requests in the system"]
    heights = [0.22, 0.32, 0.2]
    if with_replicas:
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
    if with_replicas:
        replicas(figure, with_replicas)
        nodes(figure, with_nodes)
    last = max([record.done for record in run.records] + [sample["t"] for sample in samples], default=1.0)
    figure.update_xaxes(range=[min(0.0, *(sample["t"] for sample in samples[:1])) - last * 0.01, last * 1.01])
    figure.update_xaxes(title_text="seconds of the run", row=len(titles), col=1)
    figure.update_annotations(x=0, xanchor="left", font={"size": 13, "color": INK})
    styled(figure, 260 + 190 * len(titles))
    figure.update_layout(hovermode="x unified", legend={"y": 1.03, "traceorder": "normal"})
    return figure


def rates(figure: go.Figure, records: Sequence[Record]) -> None:
    last = max((record.done for record in records), default=1.0)
    width = max(1.0, round(last / BINS))
    edges = np.arange(0, last + width, width)
    lines = (
        ("offered", [record.intended for record in records], GREY, "dot"),
        ("completed", [record.done for record in records if record.outcome == "ok"], BLUE, "solid"),
        ("failed", [record.done for record in records if record.outcome != "ok"], RED, "solid"),
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
    """Plots every failed request and at most MOST_POINTS others, with running percentiles."""
    good = sorted((record for record in records if record.outcome == "ok"), key=lambda record: record.intended)
    bad = [record for record in records if record.outcome != "ok"]
    shown = good[:: -(-len(good) // MOST_POINTS) or 1]
    hover = "%{y:.3g} s<extra>%{text}</extra>"
    for name, some, colour, size in (("a request", shown, BLUE, 4), ("a failed request", bad, RED, 6)):
        if some:
            figure.add_trace(
                go.Scatter(
                    x=[record.intended for record in some],
                    y=[record.latency for record in some],
                    text=[f"request {record.id} {record.outcome} {record.kind}"[:80] for record in some],
                    hovertemplate=hover,
                    name=name,
                    mode="markers",
                    marker={"color": colour, "size": size, "opacity": 0.45},
                ),
                row=2,
                col=1,
            )
    if len(good) >= 20:
        times, latencies = np.array([record.intended for record in good]), np.array([record.latency for record in good])
        window = max(10, len(good) // 40)
        middles = range(0, len(good) - window + 1, max(1, window // 3))
        for name, share, colour in (("p50", 50, INK), ("p95", 95, AMBER)):
            values = [np.percentile(latencies[i : i + window], share) for i in middles]
            moments = [float(np.mean(times[i : i + window])) for i in middles]
            line = {"color": colour, "width": 2}
            figure.add_trace(
                go.Scatter(x=moments, y=values, name=f"{name} of {window} in a row", line=line), row=2, col=1
            )
    if scenario.objective_s and any(record.latency > scenario.objective_s / 2 for record in good):
        figure.add_hline(y=scenario.objective_s, line={"color": GREEN, "dash": "dash", "width": 1}, row=2, col=1)
    figure.update_yaxes(rangemode="tozero", row=2, col=1)


def queue(figure: go.Figure, records: Sequence[Record], samples: Samples) -> None:
    """Requests in flight as this client counts them; waiting requests and batch fill as the server reports them."""
    moments = [float(t) for t in np.linspace(0, max((record.done for record in records), default=0.0), MOMENTS)]
    flying = [*zip(moments, in_flight(records, moments), strict=True)]
    waiting = [(sample["t"], sample["waiting"]) for sample in samples if "waiting" in sample]
    fill = [(sample["t"], sample["bucket_fill"]) for sample in samples if sample.get("bucket_fill") is not None]
    for name, points, colour in (("in flight", flying, BLUE), ("waiting", waiting, AMBER)):
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


def replicas(figure: go.Figure, samples: Samples) -> None:
    x = [sample["t"] for sample in samples]
    for name, colour in (("running", GREEN), ("starting", AMBER), ("stopping", GREY)):
        y = [sample[name] for sample in samples]
        if not any(y):
            continue
        figure.add_trace(layer(x, y, name, "replicas", colour), row=4, col=1)
    line = {"shape": "hv", "dash": "dash", "width": 2, "color": INK}
    figure.add_trace(
        go.Scatter(x=x, y=[sample["target"] for sample in samples], name="target", line=line, mode="lines"),
        row=4,
        col=1,
    )
    whole_numbers(
        figure,
        4,
        [sample["target"] for sample in samples] + [sample["running"] + sample["starting"] for sample in samples],
    )


def nodes(figure: go.Figure, samples: Samples) -> None:
    x = [sample["t"] for sample in samples]
    types = sorted({name for sample in samples for name in sample["nodes"]})
    for name, colour in zip(types, NODE_COLOURS * len(types), strict=False):
        y = [sample["nodes"].get(name, 0) for sample in samples]
        figure.add_trace(layer(x, y, name, "nodes", colour), row=5, col=1)
    whole_numbers(figure, 5, [sum(sample["nodes"].values()) for sample in samples])


def layer(x: Sequence[float], y: Sequence[int], name: str, group: str, colour: str) -> go.Scatter:
    """A layer of a stacked area chart."""
    line = {"shape": "hv", "width": 1, "color": colour}
    return go.Scatter(x=x, y=y, name=name, mode="lines", stackgroup=group, line=line)


def whole_numbers(figure: go.Figure, row: int, values: Sequence[int]) -> None:
    most = max(values, default=1)
    figure.update_yaxes(range=[0, most + 0.5], dtick=max(1, -(-most // 5)), row=row, col=1)
