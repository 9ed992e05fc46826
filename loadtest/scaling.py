"""Breaks each scale-up down into phases, from the samples of cluster.py. Knows nothing of requests."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PHASES: Mapping[str, str] = {
    "decision": "from overload of the running replicas to a higher target",
    "node": "to a node for the replica",
    "process": "to the replica's constructor: worker process, imports",
    "weights": "to the model in memory",
    "compile": "to the end of warm-up: all programs loaded or compiled, and run once",
    "ready": "to Serve sending requests to the replica",
    "first image": "to the replica's first picture",
}


@dataclass(frozen=True)
class ScaleUp:
    """The start of a replica. Each phase begins when the previous one ends; a phase that was not seen is None."""

    replica: str
    node_type: str
    new_node: bool
    began: float  # seconds of the run
    phases: Mapping[str, float | None]

    @property
    def total(self) -> float:
        return sum(seconds or 0.0 for seconds in self.phases.values())


def scale_ups(samples: Sequence[Mapping[str, Any]], moment: Callable[[float], float]) -> list[ScaleUp]:
    """The scale-ups in the order of their ends. `moment` converts Unix times to seconds of the run."""
    with_replicas = [sample for sample in samples if "replicas" in sample]
    if not with_replicas:
        return []
    initial = set(with_replicas[0]["replicas"])
    result = []
    for replica, (first, _) in first_seen(with_replicas).items():
        if replica not in initial and (scale_up := broken_down(replica, first, with_replicas, samples, moment)):
            result.append(scale_up)
    return sorted(result, key=lambda scale_up: scale_up.began + scale_up.total)


def first_seen(with_replicas: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, float]]:
    seen: dict[str, tuple[int, float]] = {}
    for i, sample in enumerate(with_replicas):
        for replica in sample["replicas"]:
            seen.setdefault(replica, (i, sample["t"]))
    return seen


def broken_down(
    replica: str,
    first: int,
    with_replicas: Sequence[Mapping[str, Any]],
    samples: Sequence[Mapping[str, Any]],
    moment: Callable[[float], float],
) -> ScaleUp | None:
    decided = decision(with_replicas, first)
    if decided is None:  # it replaces another replica
        return None
    loaded = overload(with_replicas, decided)
    states = [(sample["t"], sample["replicas"][replica]) for sample in with_replicas if replica in sample["replicas"]]
    placed = next((state for _, state in reversed(states) if state.get("node")), None)
    starts = {node: facts for sample in samples for node, facts in sample.get("node_starts", {}).items()}
    node = starts.get(placed["node"]) if placed else None
    milestones: dict[str, float] = {}
    for sample in samples:
        milestones |= sample.get("milestones", {}).get(replica, {})
    running = next((t for t, state in states if state["state"] == "RUNNING"), None)
    if running is not None and "first_image" in milestones:  # the first picture may come before the next sample
        running = min(running, moment(milestones["first_image"]))
    # Serve says when it started the replica. A sample may come seconds later, if new nodes keep the dashboard busy.
    decided_at = min(
        [with_replicas[decided]["t"]] + [moment(state["since"]) for _, state in states if state.get("since")]
    )
    began = decided_at if loaded is None else min(loaded, decided_at)
    ends = {
        "decision": decided_at,
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
    new_node = bool(node and moment(node["since"]) > decided_at)
    return ScaleUp(replica, node["type"] if node else "?", new_node, began, phases)


def backdated(samples: Sequence[Mapping[str, Any]], moment: Callable[[float], float]) -> list[dict[str, Any]]:
    """Adds a sample at each time at which Serve started a replica, as Serve may not answer for seconds meanwhile."""
    result: list[dict[str, Any]] = []
    before: dict[str, Any] | None = None
    for sample in map(dict, samples):
        if before and "replicas" in sample:
            new = [state for name, state in sample["replicas"].items() if name not in before["replicas"]]
            since = sorted(moment(state["since"]) for state in new if state.get("since"))
            for count, t in enumerate(since, 1):
                if before["t"] < t < sample["t"]:
                    more = {"t": t, "target": sample["target"], "starting": before["starting"] + count}
                    result.append(before | more)
        if "replicas" in sample:
            before = sample
        result.append(sample)
    return sorted(result, key=lambda sample: sample["t"])


def decision(with_replicas: Sequence[Mapping[str, Any]], first: int) -> int | None:
    """The index of the last sample up to `first` in which the target rose; None if it did not."""
    for i in range(first, 0, -1):
        if with_replicas[i]["target"] > with_replicas[i - 1]["target"]:
            return i
    return None


def overload(with_replicas: Sequence[Mapping[str, Any]], decided: int) -> float | None:
    """Since when the load had been above the target of ongoing requests per replica."""
    since: float | None = None
    for sample in reversed(with_replicas[:decided]):
        wanted = sample.get("target_ongoing")
        if wanted is None or sample.get("in_flight", 0) <= wanted * sample["target"]:
            break
        since = sample["t"]
    return since


def chip_seconds(samples: Sequence[Mapping[str, Any]], chips: float, first: float, last: float) -> float:
    """Chip-seconds paid for from `first` to `last`, including starting and stopping replicas."""
    with_replicas = [sample for sample in samples if "running" in sample]
    ends = [sample["t"] for sample in with_replicas[1:]] + [last]
    used = 0.0
    for sample, end in zip(with_replicas, ends, strict=False):
        count = sample["running"] + sample["starting"] + sample["stopping"]
        used += count * max(0.0, min(end, last) - max(sample["t"], first))
    return chips * used
