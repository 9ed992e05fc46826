"""Shows the progress of a run: redrawn in place on a terminal, or a line every few seconds in a log file."""

import time
from collections import Counter
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from loadtest.percentiles import add, histogram_of
from loadtest.run import Clock, Progress
from loadtest.summary import counted, seconds

LINE_S = 5.0  # between lines in a log file
RECENT_S = 5.0  # over which rates are averaged


@dataclass
class Display:
    title: str
    progress: Progress
    clock: Clock
    duration_s: float | None
    samples: list[dict[str, Any]]  # grows while the run goes on
    console: Console = field(default_factory=lambda: Console(highlight=False))
    live: Live | None = None
    last_line: float = 0.0  # when it was printed
    note: str = ""
    seen: int = 0
    rates: list[tuple[float, int, int]] = field(default_factory=list)  # moment, offered, completed

    def __post_init__(self) -> None:
        self.latency = histogram_of([])
        self.outcomes: Counter[str] = Counter()

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self.live = Live(console=self.console, auto_refresh=False, transient=True)
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.live:
            self.live.stop()

    def show(self) -> None:
        self.catch_up()
        if self.live:
            self.live.update(self.picture(), refresh=True)
        elif time.monotonic() - self.last_line >= LINE_S:
            self.last_line = time.monotonic()
            print("  ".join(f"{name} {value}" for name, value in self.facts().items()), flush=True)

    def catch_up(self) -> None:
        for record in self.progress.records[self.seen :]:
            self.outcomes[record.outcome] += 1
            if record.outcome == "ok":
                add(self.latency, record.latency)
        self.seen = len(self.progress.records)
        now = time.monotonic()
        self.rates = [rate for rate in self.rates if rate[0] >= now - RECENT_S] or self.rates[-1:]
        self.rates.append((now, self.progress.offered, self.outcomes["ok"]))

    def facts(self) -> dict[str, str]:
        (then, offered_then, done_then), (now, offered, done) = self.rates[0], self.rates[-1]
        span = max(now - then, 1e-9) if len(self.rates) > 1 else float("inf")
        quantiles = " / ".join(seconds(self.latency.get_value_at_percentile(p) / 1e6) for p in (50, 95, 99))
        failed = " ".join(f"{name} {count}" for name, count in self.outcomes.items() if name != "ok")
        facts = {
            "time": f"{max(0.0, self.clock()):.0f} s",
            "sent": counted(self.progress.offered, self.progress.planned),
            "in flight": str(self.progress.in_flight),
            "offered": f"{(offered - offered_then) / span:.3g}/s",
            "completed": f"{(done - done_then) / span:.3g}/s",
            "p50 / p95 / p99": quantiles if self.latency.total_count else "–",
            "failed": failed or "none",
        }
        sample = next((sample for sample in reversed(self.samples) if "running" in sample), None)
        if sample:
            facts["replicas"] = (
                f"{sample['running']} of {sample['target']} running"
                + (f", {sample['starting']} starting" if sample["starting"] else "")
                + (f", {sample['stopping']} stopping" if sample["stopping"] else "")
            )
        sample = next((sample for sample in reversed(self.samples) if "nodes" in sample), None)
        if sample:
            nodes = ", ".join(f"{count} {name}" for name, count in sample["nodes"].items()) or "none"
            facts["nodes"] = nodes + (f", {sample['pending']} to come" if sample["pending"] else "")
        waiting = next((sample["waiting"] for sample in reversed(self.samples) if "waiting" in sample), None)
        if waiting is not None:
            facts["queue"] = str(waiting)
        if self.note:
            facts["now"] = self.note
        return facts

    def picture(self) -> Group:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", justify="right")
        table.add_column()
        for name, value in self.facts().items():
            style = "red" if name == "failed" and value != "none" else ""
            table.add_row(name, Text(value, style=style))
        total, done = self.progress.planned or 1, len(self.progress.records)
        if self.duration_s:
            total, done = round(self.duration_s * 10), round(min(self.duration_s, max(0.0, self.clock())) * 10)
        return Group(Text(self.title, style="bold"), ProgressBar(total=total, completed=done, width=60), table)
