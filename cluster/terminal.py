"""What commands print: lines, durations, and progress that suits both a terminal and a log file."""

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

QUIET_S = 10.0  # in a log file, how long a changed detail may wait
ALIVE_S = 30.0  # after how long without any news the last line is printed again


def say(text: str) -> None:
    print(text, flush=True)


def make_command(verbs: str, cluster: str = "local") -> str:
    """The make command for these verbs and a value of CLUSTER=."""
    return f"make {verbs}" + ("" if cluster == "local" else f" CLUSTER={cluster}")


def format_duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"


class Progress:
    """Shows rows of (name, state, detail). On a terminal they are redrawn in place.

    In a log file, a changed state is printed at once, a changed detail within QUIET_S, and every row each ALIVE_S.
    """

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.console = Console(highlight=False)
        self.live = Live(console=self.console, transient=True, auto_refresh=False) if self.console.is_terminal else None
        self.printed: dict[str, tuple[str, str, float]] = {}  # name -> state and detail last printed, and when

    def __enter__(self) -> Self:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.live:
            self.live.stop()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def show(self, rows: Mapping[str, tuple[str, str]]) -> None:
        if self.live:
            self.live.update(self.table(rows), refresh=True)
        else:
            self.print_changes(rows)

    def table(self, rows: Mapping[str, tuple[str, str]]) -> Table:
        table = Table.grid(padding=(0, 2), expand=True)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, style="dim", ratio=1, overflow="ellipsis")
        table.add_column(no_wrap=True, justify="right")
        for i, (name, (state, detail)) in enumerate(rows.items()):
            table.add_row(Text(name), Text(state), Text(detail), format_duration(self.elapsed) if i == 0 else "")
        return table

    def print_changes(self, rows: Mapping[str, tuple[str, str]]) -> None:
        for name, (state, detail) in rows.items():
            last_state, last_detail, at = self.printed.get(name, ("", "", 0.0))
            patience = ALIVE_S if detail == last_detail else QUIET_S if last_detail else 0.0
            if state != last_state or self.elapsed - at >= patience:
                self.printed[name] = (state, detail, self.elapsed)
                say("  ".join(filter(None, (f"{format_duration(self.elapsed):>8}", name, state, detail))))
