"""Draws a soak test over time: the memory of each process, and the outcomes of the requests.

Needs the packages of requirements/dev.txt.
"""

from collections import Counter, defaultdict
from pathlib import Path

import matplotlib
import numpy as np

from benchmarks.soak.records import Result, Run
from benchmarks.soak.verdict import AS_EXPECTED, BUSY, LOST, by_process

matplotlib.use("agg")
from matplotlib import pyplot

NAMED = 9  # kinds of process with a colour of their own: those with the most memory
DPI = 80
COLOURS = {"as expected": "tab:green", "shed": "tab:orange", "lost with a replica": "tab:purple", "wrong": "tab:red"}


def draw(run: Run, path: Path) -> None:
    figure, (memory, requests) = pyplot.subplots(
        2, 1, figsize=(10, 6.5), sharex=True, layout="constrained", height_ratios=(2.2, 1)
    )
    series = by_process(run)
    peaks: dict[str, float] = defaultdict(float)
    for (kind, _, _), points in series.items():
        peaks[kind] = max(peaks[kind], *(process.private for _, process in points))
    named = sorted(peaks, key=lambda kind: -peaks[kind])[:NAMED]
    colours = {kind: f"C{i}" for i, kind in enumerate(named)}
    labelled: set[str] = set()
    for (kind, _, _), points in sorted(series.items(), key=lambda pair: -peaks[pair[0][0]]):
        label = (kind if kind in colours else "others") if kind not in labelled else None
        if kind not in colours:
            label = None if "others" in labelled else "others"
            labelled.add("others")
        labelled.add(kind)
        times, megabytes = zip(*((t / 60, process.private / 2**20) for t, process in points), strict=True)
        memory.semilogy(times, megabytes, color=colours.get(kind, "0.75"), linewidth=1.2, label=label)
    for kill in run.kills:
        for axis in (memory, requests):
            axis.axvline(kill.t / 60, color="tab:red", linewidth=0.6, linestyle=":")
    memory.set(ylabel="memory of each process, MB", title="Soak test; dotted lines: a replica was killed")
    memory.legend(fontsize="small", ncols=2, loc="center left", bbox_to_anchor=(1.0, 0.5))
    memory.grid(alpha=0.3, which="both")
    counts: dict[str, Counter[int]] = {name: Counter() for name in COLOURS}
    for result in run.results:
        counts[colour_key(result)][int(result.done // 60)] += 1
    minutes = np.arange(max((minute for each in counts.values() for minute in each), default=0) + 1)
    bottom = np.zeros(len(minutes))
    for name, each in counts.items():
        heights = np.array([each[int(minute)] for minute in minutes], float)
        requests.bar(minutes + 0.5, heights, 0.9, bottom, color=COLOURS[name], label=f"{name}: {int(heights.sum())}")
        bottom += heights
    requests.set(xlabel="minutes", ylabel="requests a minute")
    requests.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    requests.grid(alpha=0.3)
    figure.savefig(path, dpi=DPI)
    pyplot.close(figure)


def colour_key(result: Result) -> str:
    if result.outcome in AS_EXPECTED:
        return "as expected"
    return "shed" if result.code in BUSY else "lost with a replica" if result.code in LOST else "wrong"
