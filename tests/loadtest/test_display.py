"""The progress that a run shows."""

from io import StringIO
from typing import Any

from rich.console import Console

from loadtest.display import Display
from loadtest.records import Record
from loadtest.run import Clock, Progress

SAMPLES: list[dict[str, Any]] = [
    {"target": 3, "running": 1, "starting": 2, "stopping": 0},
    {"nodes": {"ray_tpu": 2}, "pending": 1},
    {"waiting": 7},
]


def record(number: int, outcome: Any) -> Record:
    return Record(number, "k", "generations", {}, number, number, None, None, number + 0.25, outcome)


def shown(terminal: bool) -> str:
    clock = Clock()
    clock.start()
    progress = Progress(planned=10, offered=5, records=[record(0, "ok"), record(1, "ok"), record(2, "shed")])
    console = Console(file=StringIO(), force_terminal=terminal, width=100)
    with Display("smoke", progress, clock, None, SAMPLES, console) as display:
        display.show()
        return " ".join(display.facts().values()) + console.file.getvalue()  # type: ignore[attr-defined]


def test_the_display_shows_rates_percentiles_failures_replicas_and_nodes() -> None:
    output = shown(terminal=True)
    for words in ("smoke", "5 of 10", "250 ms", "shed 1", "1 of 3 running, 2 starting", "2 ray_tpu, 1 to come", "7"):
        assert words in output


def test_in_a_log_file_the_display_is_a_line(capsys: Any) -> None:
    shown(terminal=False)
    (line,) = capsys.readouterr().out.splitlines()
    assert "in flight 2" in line and "failed shed 1" in line and "replicas 1 of 3 running, 2 starting" in line
