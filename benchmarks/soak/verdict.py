"""Judges the records of a soak test: whether it passed, and if not, why.

Memory means private memory: RSS without files and shared memory. Its trend is the median of the slopes between all
pairs of samples of a process (Theil and Sen), which jumps and short peaks do not affect. The first minutes of a process
do not count, and a process with a short life has no trend. The verdict lists the kinds without a trend.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.soak.records import Kill, Process, Result, Run, Sample

BUSY = {"queue_full", "deadline_unmeetable"}  # codes of the 503 of an overloaded server
LOST = {"replica_lost", "model_not_ready"}  # codes of a server that has lost a replica
AS_EXPECTED = {"ok", "left", "unread"}
AFTERMATH_S = 15.0  # how long after recovery requests may still fail because of a kill
RECOVERY_S = 180.0
LEAST_ANSWERED = 0.5  # share of the requests for pictures
EXAMPLES = 3

WARMUP_S = 300.0  # of a process
LEAST_LIFE_S = 600.0  # after warm-up; a shorter life has no trend
LEAST_GROWTH_MB = 10.0  # less growth is no leak, whatever the slope
MOST_MB_PER_HOUR: Mapping[str, float] = {"replica": 100.0, "ingress": 40.0, "proxy": 40.0}
MOST_MB_PER_HOUR_OF_OTHERS = 60.0  # Ray's own processes fill tables of tasks, actors and events up to a limit
MOST_FDS_MORE, MOST_THREADS_MORE = 40, 30  # of the same process, idle after the load over idle before it
MOST_POINTS = 600  # of a process, for the pairs

Series = dict[tuple[str, int, float], list[tuple[float, Process]]]  # by kind, pid, start: moment, process


@dataclass(frozen=True)
class Trend:
    kind: str
    mb_per_hour: float
    grown_mb: float  # growth by that slope in `seen_s`
    seen_s: float
    most: float  # MB per hour

    @property
    def leaks(self) -> bool:
        return self.mb_per_hour > self.most and self.grown_mb > LEAST_GROWTH_MB


@dataclass(frozen=True)
class Verdict:
    reasons: Sequence[str]  # for failing; empty if the test passed
    notes: Sequence[str]
    figures: Mapping[str, Any]

    @property
    def passed(self) -> bool:
        return not self.reasons


def judge(run: Run) -> Verdict:
    series = by_process(run)
    trends, not_judged = trends_of(series)
    reasons = [
        *unfinished_business(run),
        *wrong_results(run.results, run.kills),
        *slow_recoveries(run),
        *(leak(trend) for trend in trends if trend.leaks),
        *more_handles(run),
    ]
    notes = [f"memory of {', '.join(not_judged)} is not judged: no process lived long enough"] if not_judged else []
    return Verdict(reasons, notes, figures(run, series, trends))


def unfinished_business(run: Run) -> Iterable[str]:
    if not run.ends:
        yield "the test was stopped early; it can continue"
        return
    if run.ends["unfinished"] != 0:
        yield f"{run.ends['unfinished']} requests were still unfinished a minute after the load"
    if run.ends.get("compiles_after_ready"):
        yield f"{run.ends['compiles_after_ready']} programs were compiled while serving"


def wrong_results(results: Sequence[Result], kills: Sequence[Kill]) -> Iterable[str]:
    """Results that are neither correct nor a legitimate refusal nor explained by a kill."""
    bad: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        if result.outcome == "bad_image":
            bad["wrong pictures"].append(result)
        elif result.outcome == "timeout":
            bad["requests without any answer"].append(result)
        elif not explained(result, kills):
            bad["unexplained errors"].append(result)
    for what, group in bad.items():
        examples = "; ".join(
            f"{each.kind} at {each.at:.0f} s: {each.outcome}, {each.error}" for each in group[:EXAMPLES]
        )
        yield f"{len(group)} {what}, such as {examples}"
    wanted = [result for result in results if result.kind in ("equal", "mixed", "stream")]
    answered = sum(result.outcome == "ok" for result in wanted)
    if answered < LEAST_ANSWERED * len(wanted) or not wanted:
        yield f"only {answered} of {len(wanted)} requests for pictures were answered"


def explained(result: Result, kills: Sequence[Kill]) -> bool:
    """Whether a result is legitimate. The server may shed load any time, and lose requests while a replica is dead."""
    if result.outcome in AS_EXPECTED or (result.outcome == "shed" and result.code in BUSY):
        return True
    if result.outcome not in ("shed", "server_error", "wrong_answer") or result.code not in LOST:
        return False
    return any(result.done >= kill.t and result.at <= end_of(kill) for kill in kills)


def end_of(kill: Kill) -> float:
    return (kill.t + RECOVERY_S if kill.recovered is None else kill.recovered) + AFTERMATH_S


def slow_recoveries(run: Run) -> Iterable[str]:
    for kill in run.kills:
        if kill.recovered is None and run.ends:
            yield f"after the kill at {kill.t:.0f} s no other replica answered within {RECOVERY_S:.0f} s"


def by_process(run: Run) -> Series:
    series: Series = defaultdict(list)
    for sample in run.samples:
        for process in sample.processes:
            series[process.kind, process.pid, process.started].append((sample.t, process))
    return series


def trends_of(series: Series) -> tuple[list[Trend], list[str]]:
    """The steepest trend of each kind of process, and the kinds of which none lived long enough."""
    worst: dict[str, Trend] = {}
    for (kind, _, _), points in series.items():
        times = np.array([t for t, _ in points])
        memory = np.array([process.private for _, process in points]) / 2**20
        warm = times >= times[0] + WARMUP_S
        if not warm.any() or (seen_s := float(times[-1] - times[warm][0])) < LEAST_LIFE_S:
            continue
        slope = slope_of(times[warm], memory[warm]) * 3600
        most = MOST_MB_PER_HOUR.get(kind, MOST_MB_PER_HOUR_OF_OTHERS)
        trend = Trend(kind, slope, slope * seen_s / 3600, seen_s, most)
        if kind not in worst or trend.mb_per_hour > worst[kind].mb_per_hour:
            worst[kind] = trend
    kinds = {kind for kind, _, _ in series}
    return sorted(worst.values(), key=lambda trend: -trend.mb_per_hour), sorted(kinds - {*worst})


def slope_of(times: np.ndarray, values: np.ndarray) -> float:
    """Theil, 1950, and Sen, 1968: the median of the slopes between all pairs."""
    step = -(-len(times) // MOST_POINTS)
    times, values = times[::step], values[::step]
    i, j = np.triu_indices(len(times), 1)
    apart = times[j] > times[i]
    return float(np.median((values[j] - values[i])[apart] / (times[j] - times[i])[apart]))


def leak(trend: Trend) -> str:
    return (
        f"the memory of {trend.kind} grows by {trend.mb_per_hour:.0f} MB an hour, {trend.grown_mb:.0f} MB in the "
        f"{trend.seen_s / 60:.0f} minutes that count; {trend.most:.0f} MB an hour are allowed"
    )


def more_handles(run: Run) -> Iterable[str]:
    """Processes with too many more open files or threads after the load than before it."""
    before, after = (
        {(process.kind, process.pid, process.started): process for process in last.processes}
        for last in (last_of(run, "before"), last_of(run, "after"))
    )
    for key, process in after.items():
        if key not in before:
            continue
        for what, more, most in (
            ("open files", process.fds - before[key].fds, MOST_FDS_MORE),
            ("threads", process.threads - before[key].threads, MOST_THREADS_MORE),
        ):
            if more > most:
                yield f"{key[0]} (process {key[1]}) has {more} {what} more than before the load; {most} are allowed"


def last_of(run: Run, phase: str) -> Sample:
    return next((sample for sample in reversed(run.samples) if sample.phase == phase), Sample(0.0, phase, ()))


def figures(run: Run, series: Series, trends: Sequence[Trend]) -> dict[str, Any]:
    outcomes: dict[str, Counter[str]] = defaultdict(Counter)
    for result in run.results:
        refused = result.outcome in ("shed", "server_error") and result.code
        outcomes[result.kind][f"{result.status} {result.code}" if refused else result.outcome] += 1
    peaks: dict[str, dict[str, float]] = defaultdict(lambda: {"mb": 0.0, "fds": 0, "threads": 0})
    for (kind, _, _), points in series.items():
        for _, process in points:
            peak = peaks[kind]
            peak["mb"] = max(peak["mb"], process.private / 2**20)
            peak["fds"], peak["threads"] = max(peak["fds"], process.fds), max(peak["threads"], process.threads)
    return {
        "minutes": run.reached_s / 60,
        "sessions": run.sessions,
        "requests": len(run.results),
        "compared": sum(result.compared for result in run.results),
        "outcomes": {kind: dict(counts.most_common()) for kind, counts in sorted(outcomes.items())},
        "kills": [{"t": kill.t, "recovered_s": kill.recovered and kill.recovered - kill.t} for kill in run.kills],
        "peaks": dict(sorted(peaks.items())),
        "trends": {
            trend.kind: {"mb_per_hour": trend.mb_per_hour, "minutes": trend.seen_s / 60, "most": trend.most}
            for trend in trends
        },
        "end": dict(run.ends),
    }
