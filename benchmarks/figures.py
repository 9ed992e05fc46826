"""A figure: ours over theirs, run by run, and the bar that the ratio is held to."""

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
    """Each run adds a pair. Bars hold for the median ratio; `bar` None: told, not held to."""

    device: str
    workload: str
    name: str
    bar: float | None
    at_most: bool = True
    against: str = ""  # what stands behind `theirs`
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)

    def add(self, ours: float, theirs: float) -> None:
        self.ours.append(float(ours))
        self.theirs.append(float(theirs))

    @property
    def ratios(self) -> list[float]:
        return [ours / theirs for ours, theirs in zip(self.ours, self.theirs, strict=True)]

    @property
    def met(self) -> bool | None:
        if self.bar is None:
            return None
        median = float(np.median(self.ratios))
        return median <= self.bar if self.at_most else median >= self.bar

    def facts(self) -> dict[str, Any]:
        return asdict(self) | {"ratio": spread(self.ratios), "met": self.met}


def table_of(figures: Sequence[Figure], title: str) -> Table:
    """One section for each device; medians, and the range of the runs' ratios."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False, padding=0)
    for heading in ("workload", "figure", "ours", "theirs", "ratio", "spread", "bar"):
        table.add_column(heading, no_wrap=True)
    for device, those in groupby(figures, key=lambda figure: figure.device):
        table.add_section()
        table.add_row(f"[bold]{device}[/bold]")
        for figure in those:
            ratios, verdict = figure.ratios, "met" if figure.met else "MISSED"
            table.add_row(
                figure.workload,
                figure.name,
                f"{np.median(figure.ours):.3g}",
                f"{np.median(figure.theirs):.3g}",
                f"{np.median(ratios):.3f}",
                f"{min(ratios):.2f}–{max(ratios):.2f}",
                "" if figure.bar is None else f"{'≤' if figure.at_most else '≥'} {figure.bar:g} {verdict}",
            )
    return table


def missed(figures: Sequence[Figure]) -> bool:
    return any(figure.met is False for figure in figures)


def conclude(
    name: str, title: str, figures: Sequence[Figure], here: dict[str, Any], arguments: dict[str, Any], complete: bool
) -> int:
    """Shows and writes the figures, those of a run in part beside those of a whole one; the exit status."""
    result = {"machine": here, "arguments": arguments, "figures": [figure.facts() for figure in figures]}
    write(name if complete else f"{name}-part", result, table_of(figures, title))
    return 1 if missed(figures) else 0
