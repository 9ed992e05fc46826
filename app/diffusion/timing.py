"""Times steps and decodes on the device at hand: what each takes, what a launch adds, what a call costs the host.

Knows nothing of pipelines: it gets functions that dispatch work and one that waits for it.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median_low
from typing import Any, NamedTuple

from app.types import DispatchCost

SPREAD = 0.05  # between the last two rounds of every program; clocks that ramp up have settled by then
LAST_ROUNDS = 3  # whose quickest run counts: other work on the machine only makes a run longer
# A dispatch of several steps, beside that of a single one, shows what a launch adds. Steps that take longer than
# SLOW_S, or larger ones than the smallest if the budget is used up, are timed singly.
SEVERAL_S, MOST_STEPS, SLOW_S = 0.05, 16, 0.5


class Timed(NamedTuple):
    """Seconds by row bucket or by decode bucket. A dispatch takes launch + count x step; a decode includes its call."""

    step_s: dict[int, float]
    launch_s: dict[int, float]
    decode_s: dict[int, float]
    dispatch_cost: DispatchCost


@dataclass
class Program:
    """A dispatch that is timed again and again."""

    dispatch: Callable[[], Any]
    calls: list[float] = field(default_factory=list)  # seconds until the call returned
    totals: list[float] = field(default_factory=list)  # seconds until the device was done

    def run(self, wait: Callable[[Any], None], clock: Callable[[], float]) -> None:
        began = clock()
        done = self.dispatch()
        returned = clock()
        wait(done)
        self.calls.append(returned - began)
        self.totals.append(clock() - began)

    @property
    def call_s(self) -> float:
        return min(self.calls[-LAST_ROUNDS:])

    @property
    def total_s(self) -> float:
        return min(self.totals[-LAST_ROUNDS:])

    @property
    def settled(self) -> bool:
        return len(self.totals) > 1 and abs(self.totals[-1] - self.totals[-2]) <= SPREAD * self.totals[-1]


def timed(
    step: Callable[[int, int], Any],
    decode: Callable[[int], Any],
    wait: Callable[[Any], None],
    row_buckets: Sequence[int],
    decode_buckets: Sequence[int],
    *,
    budget_s: float,
    clock: Callable[[], float] = time.perf_counter,
) -> Timed:
    """`step` dispatches a number of steps of so many rows, `decode` a decode of so many images.

    The programs take turns, so that other work on the machine does not make one of them look slow beside the others. No
    round begins after `budget_s`.
    """
    single = {rows: Program(lambda rows=rows: step(rows, 1)) for rows in row_buckets}  # type: ignore[misc]
    decodes = {images: Program(lambda images=images: decode(images)) for images in decode_buckets}  # type: ignore[misc]
    programs = [*single.values(), *decodes.values()]
    for program in programs:
        program.run(wait, clock)
        program.calls.clear()  # the first run does not count
        program.totals.clear()
    began = clock()
    for program in programs:
        program.run(wait, clock)
    buckets = single if clock() - began < budget_s else [min(single)]
    counts = {rows: several(single[rows].total_s) for rows in buckets if single[rows].total_s <= SLOW_S}
    multiple = {rows: Program(lambda rows=rows: step(rows, counts[rows])) for rows in counts}  # type: ignore[misc]
    for program in multiple.values():
        program.run(wait, clock)
    programs += multiple.values()
    while clock() - began < budget_s and not all(program.settled for program in programs):
        for program in programs:
            program.run(wait, clock)
    return fitted(single, multiple, counts, {images: program.total_s for images, program in decodes.items()})


def several(step_s: float) -> int:
    """How many steps a dispatch of several has."""
    return min(MOST_STEPS, max(2, round(SEVERAL_S / max(step_s, SEVERAL_S / MOST_STEPS))))


def fitted(
    single: dict[int, Program], multiple: dict[int, Program], counts: dict[int, int], decode_s: dict[int, float]
) -> Timed:
    """What follows from dispatches of one step, and of several.

    A call that takes longer the more steps it dispatches waits for the device.
    """
    step_s = {rows: program.total_s for rows, program in single.items()}
    launch_s = dict.fromkeys(single, 0.0)
    waiting = [] if multiple else [program.call_s / program.total_s for program in single.values()]
    for rows, program in multiple.items():
        longer_s = max(program.total_s - single[rows].total_s, 0.0)
        step_s[rows] = min(longer_s / (counts[rows] - 1), single[rows].total_s) or single[rows].total_s
        waiting.append((program.call_s - single[rows].call_s) / longer_s if longer_s else 0.0)
    blocks = median_low(waiting) > 0.5
    host_s = 0.0 if blocks else median_low([program.call_s for program in single.values()])
    for rows in multiple:
        launch_s[rows] = max(single[rows].total_s - step_s[rows] - host_s, 0.0)
    for rows in set(single) - set(multiple):  # a launch depends little on the bucket
        launch_s[rows] = launch_s[min(multiple)] if multiple else 0.0
        step_s[rows] = max(step_s[rows] - launch_s[rows] - host_s, 0.0)
    return Timed(step_s, launch_s, decode_s, DispatchCost(blocks, host_s))
