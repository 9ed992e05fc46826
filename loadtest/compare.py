"""Compares two runs side by side, with ratios."""

from collections.abc import Iterator, Sequence

from rich.table import Table
from rich.text import Text

from loadtest.percentiles import PERCENTILES
from loadtest.summary import Summary, seconds

Row = tuple[str, float | None, float | None, bool]  # name, value of A, value of B, whether the values are seconds


def rows(a: Summary, b: Summary) -> Iterator[Row]:
    for name, key in (
        ("requests", "counted"),
        ("offered a second", "offered_per_s"),
        ("completed a second", "completed_per_s"),
        ("images a second", "images_per_s"),
        ("failed", "failed"),
        ("goodput, share", "goodput_share"),
        ("images a second and chip", "images_per_chip_s"),
        ("dollars for 1,000 images", "usd_per_1000_images"),
    ):
        if a[key] is not None or b[key] is not None:
            yield name, a[key], b[key], False
    for key, name in (("latency", "latency"), ("first_preview", "first preview")):
        if a[key] or b[key]:
            for part in ("mean", *(f"p{p:g}" for p in PERCENTILES), "max"):
                yield f"{name} {part}", (a[key] or {}).get(part), (b[key] or {}).get(part), True


def table(a: Summary, b: Summary, names: Sequence[str]) -> Table:
    comparison = Table(box=None, padding=(0, 2), header_style="bold")
    for heading in ("", *names, "B / A"):
        comparison.add_column(heading, justify="left" if not heading else "right")
    for name, of_a, of_b, are_seconds in rows(a, b):
        show = seconds if are_seconds else plain
        comparison.add_row(name, show(of_a), show(of_b), Text(ratio(of_a, of_b)))
    return comparison


def plain(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def ratio(a: float | None, b: float | None) -> str:
    return f"{b / a:.3g}" if a and b is not None else "–"


def differences(a: Summary, b: Summary) -> Iterator[str]:
    """The reasons why the two runs are not comparable."""
    for name, summary in (("A", a), ("B", b)):
        for reason in summary["invalid"]:
            yield f"{name} is invalid: {reason}."
        if not summary["complete"]:
            yield f"{name} did not end by itself ({summary['ended']})."
    if a["scenario"] != b["scenario"]:
        yield f"A is a run of {a['scenario']}, B one of {b['scenario']}."
