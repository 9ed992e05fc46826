"""How the commands speak: plain words, progress that suits a terminal and a log file, mistakes in one line."""

import errno
import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import NoReturn, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

QUIET_S = 10.0  # in a log file, how long news of details may wait
ALIVE_S = 30.0  # and after how long without any news a line is told again
# What the machine may say to any command that uses a file, and is no fault of the command's.
NO_WAY = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ELOOP}


class Stop(Exception):
    """The user's mistake or the machine's: the command ends with this sentence and exit status 1."""


def say(text: str) -> None:
    print(text, flush=True)


def make(verbs: str, cluster: str = "local") -> str:
    """What the user types for these verbs, `cluster` being what CLUSTER= says."""
    return f"make {verbs}" + ("" if cluster == "local" else f" CLUSTER={cluster}")


def run(command: Callable[[], None]) -> NoReturn:
    try:
        command()
    except Stop as reason:
        print(reason, file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr, flush=True)
        sys.exit(130)
    except BrokenPipeError:  # `make logs | head`
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:
        if error.errno not in NO_WAY or not error.filename:
            raise
        print(f"{error.filename} cannot be read or written: {error.strerror}.", file=sys.stderr, flush=True)
        sys.exit(1)
    sys.exit(0)


def span(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"


class Progress:
    """Rows of (name, state, detail). On a terminal they are redrawn in place; elsewhere a line is printed when a
    state changes, within QUIET_S when only a detail does, and every ALIVE_S when nothing does."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.console = Console(highlight=False)
        self.live = Live(console=self.console, transient=True, auto_refresh=False) if self.console.is_terminal else None
        self.told: dict[str, tuple[str, str, float]] = {}  # name -> state and detail last printed, and when

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
            self.tell(rows)

    def table(self, rows: Mapping[str, tuple[str, str]]) -> Table:
        table = Table.grid(padding=(0, 2), expand=True)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, style="dim", ratio=1, overflow="ellipsis")
        table.add_column(no_wrap=True, justify="right")
        for i, (name, (state, detail)) in enumerate(rows.items()):
            table.add_row(Text(name), Text(state), Text(detail), span(self.elapsed) if i == 0 else "")
        return table

    def tell(self, rows: Mapping[str, tuple[str, str]]) -> None:
        for name, (state, detail) in rows.items():
            told_state, told_detail, at = self.told.get(name, ("", "", 0.0))
            patience = ALIVE_S if detail == told_detail else QUIET_S if told_detail else 0.0
            if state != told_state or self.elapsed - at >= patience:
                self.told[name] = (state, detail, self.elapsed)
                say("  ".join(filter(None, (f"{span(self.elapsed):>8}", name, state, detail))))
