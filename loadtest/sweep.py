"""Raises the rate until the server no longer keeps up, then bisects to find the knee. Knows nothing of HTTP."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from loadtest.summary import Summary

KEEPS_UP = 0.95  # share of the requests that must be answered within the objective
HALVINGS = 3


@dataclass(frozen=True)
class Level:
    rate: float
    summary: Summary
    held: bool
    why: str


def judge(summary: Summary, objective_s: float) -> tuple[bool, str]:
    """Whether the server holds the level, and if not, why.

    It holds if nothing failed and 95 % of the answers came within the objective. Latency counts from the intended
    times, so a late generator can make a level fail but never hold.
    """
    blame = "; but the generator itself was late" if summary["invalid"] else ""
    if summary["failed"]:
        return False, f"{summary['failed']} requests failed{blame}"
    if (share := summary["goodput_share"] or 0.0) < KEEPS_UP:
        return False, f"only {share:.1%} were answered within {objective_s:g} s{blame}"
    return True, ""


def sweep(
    run: Callable[[float], Summary], first: float, factor: float, most: float, objective_s: float
) -> Iterator[Level]:
    """Yields the levels in the order of their runs. The knee is the highest level that held."""
    rate, held = first, 0.0
    while rate <= most:
        level = measured(run, rate, objective_s)
        yield level
        if not level.held:
            break
        held, rate = rate, rate * factor
    else:
        return
    low, high = held, rate
    for _ in range(HALVINGS if held else 0):
        middle = (low * high) ** 0.5
        level = measured(run, middle, objective_s)
        yield level
        low, high = (middle, high) if level.held else (low, middle)


def measured(run: Callable[[float], Summary], rate: float, objective_s: float) -> Level:
    summary = run(rate)
    return Level(rate, summary, *judge(summary, objective_s))
