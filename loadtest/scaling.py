"""Where the time of each scale-up went, from the samples of cluster.py. Knows nothing of requests."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PHASES: Mapping[str, str] = {
    "decision": "from more load than the running replicas are meant for to a higher target",
    "node": "to a node for the replica",
    "process": "to its constructor: the worker process, imports",
    "weights": "to the model in memory",
    "compile": "to all programs loaded or compiled, and run once",
    "ready": "to Serve sending it requests",
    "first image": "to the first picture it has drawn",
}


@dataclass(frozen=True)
class ScaleUp:
    """One replica. A phase lasts from the end of the one before it; None where that was not seen."""

    replica: str
    node_type: str
    new_node: bool
    began: float  # seconds of the run
    phases: Mapping[str, float | None]

    @property
    def total(self) -> float:
        return sum(seconds or 0.0 for seconds in self.phases.values())


def scale_ups(samples: Sequence[Mapping[str, Any]], moment: Callable[[float], float]) -> list[ScaleUp]:
    """`moment` makes seconds of the run out of Unix times."""
    told = [sample for sample in samples if "replicas" in sample]
    if not told:
        return []
    there = set(told[0]["replicas"])
    found = []
    for replica, (first, _) in first_seen(told).items():
        if replica not in there and (one := broken_down(replica, first, told, samples, moment)):
            found.append(one)
    return sorted(found, key=lambda one: one.began + one.total)


def first_seen(told: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, float]]:
    seen: dict[str, tuple[int, float]] = {}
    for i, sample in enumerate(told):
        for replica in sample["replicas"]:
            seen.setdefault(replica, (i, sample["t"]))
    return seen


def broken_down(
    replica: str,
    first: int,
    told: Sequence[Mapping[str, Any]],
    samples: Sequence[Mapping[str, Any]],
    moment: Callable[[float], float],
) -> ScaleUp | None:
    decided = decision(told, first)
    if decided is None:  # it replaces another one: no scale-up
        return None
    loaded = overload(told, decided)
    states = [(sample["t"], sample["replicas"][replica]) for sample in told if replica in sample["replicas"]]
    placed = next((state for _, state in reversed(states) if state.get("node")), None)
    starts = {node: facts for sample in samples for node, facts in sample.get("node_starts", {}).items()}
    node = starts.get(placed["node"]) if placed else None
    milestones: dict[str, float] = {}
    for sample in samples:
        milestones |= sample.get("milestones", {}).get(replica, {})
    running = next((t for t, state in states if state["state"] == "RUNNING"), None)
    if running is not None and "first_image" in milestones:  # between two samples it may have drawn already
        running = min(running, moment(milestones["first_image"]))
    # Serve says when it began the replica; a sample may be seconds late where the dashboard is busy with new nodes.
    asked = min([told[decided]["t"]] + [moment(state["since"]) for _, state in states if state.get("since")])
    began = asked if loaded is None else min(loaded, asked)
    ends = {
        "decision": asked,
        "node": moment(node["since"]) if node else None,
        "process": moment(milestones["constructor"]) if "constructor" in milestones else None,
        "weights": moment(milestones["weights"]) if "weights" in milestones else None,
        "compile": moment(milestones["warm"]) if "warm" in milestones else None,
        "ready": running,
        "first image": moment(milestones["first_image"]) if "first_image" in milestones else None,
    }
    phases: dict[str, float | None] = {}
    before = began
    for name, end in ends.items():
        phases[name] = None if end is None else max(0.0, end - before)
        before = before if end is None else max(before, end)
    new_node = bool(node and moment(node["since"]) > asked)
    return ScaleUp(replica, node["type"] if node else "?", new_node, began, phases)


def backdated(samples: Sequence[Mapping[str, Any]], moment: Callable[[float], float]) -> list[dict[str, Any]]:
    """The samples, and one more at each moment since when Serve says that a new replica starts: while it starts some,
    it may take seconds to answer."""
    found: list[dict[str, Any]] = []
    before: dict[str, Any] | None = None
    for sample in map(dict, samples):
        if before and "replicas" in sample:
            new = {name: one for name, one in sample["replicas"].items() if name not in before["replicas"]}
            since = sorted(moment(one["since"]) for one in new.values() if one.get("since"))
            for count, t in enumerate(since, 1):
                if before["t"] < t < sample["t"]:
                    more = {"t": t, "target": sample["target"], "starting": before["starting"] + count}
                    found.append(before | more)
        if "replicas" in sample:
            before = sample
        found.append(sample)
    return sorted(found, key=lambda one: one["t"])


def decision(told: Sequence[Mapping[str, Any]], first: int) -> int | None:
    """The sample in which the target rose above what had been there, the last before the replica appeared."""
    for i in range(first, 0, -1):
        if told[i]["target"] > told[i - 1]["target"]:
            return i
    return None


def overload(told: Sequence[Mapping[str, Any]], decided: int) -> float | None:
    """Since when there had been more requests than the target means for the replicas that there were."""
    since: float | None = None
    for sample in reversed(told[:decided]):
        wanted = sample.get("target_ongoing")
        if wanted is None or sample.get("in_flight", 0) <= wanted * sample["target"]:
            break
        since = sample["t"]
    return since


def chip_seconds(samples: Sequence[Mapping[str, Any]], chips: float, first: float, last: float) -> float:
    """Of the replicas that were there from `first` to `last`, starting and draining ones included: what is paid for."""
    told = [sample for sample in samples if "running" in sample]
    ends = [sample["t"] for sample in told[1:]] + [last]
    used = 0.0
    for sample, end in zip(told, ends, strict=False):
        there = sample["running"] + sample["starting"] + sample["stopping"]
        used += there * max(0.0, min(end, last) - max(sample["t"], first))
    return chips * used
