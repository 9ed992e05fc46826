"""What a replica tells of its load to the ingress, and what it hears of the queue there for the autoscaling policy."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from app.api.messages import QueueState, Report, SizeCosts
from app.engine.engine import Engine

FORGET_S = 10.0  # an ingress replica that has not polled for so long has nothing that waits, or has gone


def load_of(engine: Engine, replica: str, start_s: float) -> Report:
    stats = engine.stats()
    sizes = {name: size_costs(size) for name, size in stats["sizes"].items()}
    return Report(replica, sizes, stats["unfinished"], stats["backlog_s"], engine.healthy, start_s)


def size_costs(size: Mapping[str, Any]) -> SizeCosts:
    """Of the engine's statistics, whose keys are texts as they go into JSON."""
    tables = ("step_s", "launch_s", "decode_s", "reference_step_s")
    costs: dict[str, Any] = {name: {int(key): s for key, s in size[name].items()} for name in tables}
    return SizeCosts(**costs, encode_image_s=size["encode_image_s"])


class Queues:
    """The queues of all ingress replicas, as they have told this replica."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.latest: dict[str, tuple[QueueState, float]] = {}

    def note(self, queue: QueueState) -> None:
        self.latest[queue.ingress] = queue, self.clock()

    def totals(self) -> dict[str, float]:
        """The sums over the ingress replicas that have polled lately, as plain numbers for Serve."""
        now = self.clock()
        self.latest = {name: (state, at) for name, (state, at) in self.latest.items() if now - at < FORGET_S}
        numbers = [asdict(state) for state, _ in self.latest.values()]
        return {name: float(sum(state[name] for state in numbers)) for name in ("waiting", "waiting_s", "arriving")}
