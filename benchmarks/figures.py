"""A figure: our value over the baseline's in each run, and the bar that the median ratio must meet."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from benchmarks.report import spread, write


@dataclass
class Figure:
    """Each run adds a pair of values. A figure without a bar is only reported."""

    device: str
    workload: str
    name: str
    bar: float | None
    at_most: bool = True
    against: str = ""  # what the baseline is
    ours: list[float] = field(default_factory=list)
    baseline: list[float] = field(default_factory=list)

    def add(self, ours: float, baseline: float) -> None:
        self.ours.append(float(ours))
        self.baseline.append(float(baseline))

    @property
    def ratios(self) -> list[float]:
        return [ours / baseline for ours, baseline in zip(self.ours, self.baseline, strict=True)]

    @property
    def met(self) -> bool | None:
        if self.bar is None:
            return None
        median = float(np.median(self.ratios))
        return median <= self.bar if self.at_most else median >= self.bar

    def facts(self) -> dict[str, Any]:
        return asdict(self) | {"ratio": spread(self.ratios), "met": self.met}


def table_of(figures: Sequence[Figure], title: str) -> Table:
    """A section for each device, with medians and the range of the ratios."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False, padding=0)
    for heading in ("workload", "figure", "ours", "baseline", "ratio", "spread", "bar"):
        table.add_column(heading, no_wrap=True)
    for device, group in groupby(figures, key=lambda figure: figure.device):
        table.add_section()
        table.add_row(f"[bold]{device}[/bold]")
        for figure in group:
            ratios, verdict = figure.ratios, "met" if figure.met else "MISSED"
            table.add_row(
                figure.workload,
                figure.name,
                f"{np.median(figure.ours):.3g}",
                f"{np.median(figure.baseline):.3g}",
                f"{np.median(ratios):.3f}",
                f"{min(ratios):.2f}–{max(ratios):.2f}",
                "" if figure.bar is None else f"{'≤' if figure.at_most else '≥'} {figure.bar:g} {verdict}",
            )
    return table


def missed(figures: Sequence[Figure]) -> bool:
    return any(figure.met is False for figure in figures)


def conclude(
    name: str,
    title: str,
    figures: Sequence[Figure],
    machine: dict[str, Any],
    arguments: dict[str, Any],
    complete: bool = True,
    **facts: Any,
) -> int:
    """Prints and writes the figures, and returns the exit status. An incomplete run gets a file of its own."""
    result = {"machine": machine, "arguments": arguments, "figures": [figure.facts() for figure in figures], **facts}
    write(name if complete else f"{name}-part", result, table_of(figures, title))
    return 1 if missed(figures) else 0
