"""The number of replicas, by how long requests are predicted to wait. Serve's controller runs it.

    autoscaling_config:
      policy:
        policy_function: app.serving.autoscaling:PredictedWait
        policy_kwargs: {objective_s: 10}

The backlog and what will have arrived by then must be done within `objective_s` of the time at which a replica that is
wanted now would be ready. How long that takes is measured: from the wish to the replica, with the node where one has to
come. Replicas are removed only when fewer have sufficed for a while.

Ray pickles this module by value, so at its top it imports the standard library alone. An exception in a policy stops
the updates of all applications; `__call__` raises none.
"""

import logging
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

logger = logging.getLogger("ray.serve")  # of the controller, which calls the policy ten times a second

MOST_LOAD = 0.85  # of replicas in the long run, however long requests may wait
# What piles up while a replica starts is over the objective anyway. It is done within so much of the start's time more.
DRAIN = 0.5
ARRIVALS_S = 60.0  # the trend of what arrives is that of so long
SAMPLE_S = 1.0  # between two samples of it
STARTS = 8  # starts that are remembered
PATIENCE = 3.0  # starts that take so many times longer than usual mean that there are no nodes
STOCK_OUT_S = 600.0  # for so long no more are wanted than run and one, and none of those is given back


@dataclass(frozen=True)
class Load:
    """What the replicas report, in device-seconds; `arriving` are those of a second."""

    backlog_s: float
    arriving: float
    running: int
    start_s: float  # of a replica, without its node


@dataclass
class Memory:
    """What the policy has seen."""

    wanted: int = 0
    since: float = 0.0  # when more were wanted than ran
    starts: deque[float] = field(default_factory=lambda: deque(maxlen=STARTS))  # seconds from a wish to a replica
    arrivals: deque[tuple[float, float]] = field(default_factory=deque)  # when, and how much arrived in a second
    wishes: deque[tuple[float, int]] = field(default_factory=deque)  # of the last `hold_s`
    stocked_out_until: float = -math.inf
    running: int = 0


@dataclass(frozen=True)
class Rule:
    """The arguments of the policy in the YAML file."""

    objective_s: float = 10.0
    hold_s: float = 180.0
    start_s: float = 120.0

    def __post_init__(self) -> None:
        for name, least in (("objective_s", 0.1), ("hold_s", 0.0), ("start_s", 0.0)):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not least <= value < math.inf:
                raise ValueError(f"{name} must be a number of at least {least:g}, got {value!r}.")


def decide(rule: Rule, load: Load, memory: Memory, now: float, least: int, most: int) -> tuple[int, str]:
    """The number of replicas, and why."""
    observe(rule, load, memory, now)
    lead_s = usual_start_s(rule, load, memory)
    ahead = expected(memory.arrivals, lead_s)
    coming = max(0, memory.wanted - load.running)
    spent_s = min(lead_s, now - memory.since) if coming else 0.0  # of the time until then, in which those work too
    left_s = max(0.0, load.backlog_s + (ahead - load.running) * lead_s - coming * spent_s)
    steady = max(ahead / MOST_LOAD, replicas_for(ahead, rule.objective_s))
    needed = math.ceil(steady + left_s / (rule.objective_s + DRAIN * lead_s) - 1e-6)
    if load.backlog_s > 0 or ahead > 0:
        needed = max(needed, 1)
    memory.wishes.append((now, needed))
    stocked_out = now < memory.stocked_out_until
    hold_s = max(rule.hold_s, STOCK_OUT_S) if stocked_out else rule.hold_s
    while memory.wishes[0][0] < now - hold_s:
        memory.wishes.popleft()
    wanted = max(wish for _, wish in memory.wishes)
    if stocked_out:
        wanted = min(wanted, load.running + 1)
    wanted = min(max(wanted, least), most)
    if wanted > load.running and memory.wanted <= memory.running:
        memory.since = now
    memory.wanted = wanted
    parts = [
        f"{load.backlog_s:.1f} device-seconds wait or run",
        f"{load.arriving:.2f} arrive a second, {ahead:.2f} in {lead_s:.0f} s",
        f"{needed} would keep the wait within {rule.objective_s:g} s",
    ]
    if wanted != needed:
        parts.append("none started in time, so no more are wanted" if stocked_out else f"bounds and hold give {wanted}")
    return wanted, f"{load.running} run, {wanted} wanted: {'; '.join(parts)}."


def observe(rule: Rule, load: Load, memory: Memory, now: float) -> None:
    """Notes what arrives, and how long the latest start took or is taking."""
    if not memory.arrivals or now - memory.arrivals[-1][0] >= SAMPLE_S:
        memory.arrivals.append((now, load.arriving))
    while memory.arrivals[0][0] < now - ARRIVALS_S:
        memory.arrivals.popleft()
    usual_s = usual_start_s(rule, load, memory)
    if load.running > memory.running and memory.wanted > memory.running:
        memory.starts.append(now - memory.since)
        memory.since = now
        memory.stocked_out_until = -math.inf
    elif memory.wanted > load.running and now - memory.since > PATIENCE * usual_s:
        memory.stocked_out_until = now + STOCK_OUT_S
        memory.since = now
    memory.running = load.running


def usual_start_s(rule: Rule, load: Load, memory: Memory) -> float:
    """Seconds from a wish to a replica: the longest of the latest starts, or the config's guess."""
    return max(load.start_s, max(memory.starts) if memory.starts else rule.start_s)


def expected(arrivals: Iterable[tuple[float, float]], lead_s: float) -> float:
    """Device-seconds that will arrive in a second: a mean of late, or more where it has been rising beyond chance."""
    rates = [rate for _, rate in arrivals]
    half = len(rates) // 2
    earlier, recent = rates[:half], rates[half:]
    mean = statistics.fmean(recent)
    if len(rates) < ARRIVALS_S / SAMPLE_S / 2:
        return mean
    rise = mean - statistics.fmean(earlier) - statistics.pstdev(recent)
    return mean + min(max(0.0, rise) * 2 * lead_s / ARRIVALS_S, mean)


def replicas_for(load: float, objective_s: float, service_s: float = 1.0) -> float:
    """The replicas with which a mean request waits half of the objective in the long run, by Sakasegawa's M/G/n.

    Sakasegawa 1977: a wait is about s / n * u^(sqrt(2 (n + 1)) - 1) / (1 - u), at a utilization of u = load / n.
    """
    count = max(1, math.ceil(load))
    while count < 1000:
        used = load / count
        if used < 1 and service_s / count * used ** (math.sqrt(2 * (count + 1)) - 1) / (1 - used) <= objective_s / 2:
            break
        count += 1
    return float(count) if load > 0 else 0.0


class PredictedWait:
    """The policy as Serve calls it. `publish` tells others of a decision that has changed."""

    def __init__(
        self,
        objective_s: float = 10.0,
        hold_s: float = 180.0,
        start_s: float = 120.0,
        publish: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`objective_s`: how long a request may wait. `hold_s`: fewer replicas must suffice for so long before some
        are removed. `start_s`: of a node and a replica, until a first start has been measured."""
        self.rule = Rule(objective_s, hold_s, start_s)
        self.memory = Memory()
        self.publish = publish or publish_decision
        self.clock = clock
        self.failed = False

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        try:
            before = self.memory.wanted
            bounds = ctx.capacity_adjusted_min_replicas, ctx.capacity_adjusted_max_replicas
            wanted, why = decide(self.rule, load_of(ctx), self.memory, self.clock(), *bounds)
            if wanted != before:
                logger.info(why)
                self.publish(why)
            self.failed = False
            return wanted, {}
        except Exception:
            if not self.failed:
                logger.exception("The autoscaling policy failed; the number of replicas stays.")
            self.failed = True
            return ctx.target_num_replicas, {}


def load_of(ctx: Any) -> Load:
    """Every replica reports its own backlog, and the same queues of the ingress."""
    metrics: Mapping[str, Mapping[Any, float]] = ctx.aggregated_metrics or {}

    def values(name: str) -> list[float]:
        return [value for value in metrics.get(name, {}).values() if math.isfinite(value)]

    backlog_s = sum(values("backlog_s")) + max(values("waiting_s"), default=0.0)
    arriving, start_s = (max(values(name), default=0.0) for name in ("arriving", "start_s"))
    return Load(backlog_s, arriving, ctx.current_num_replicas, start_s)


def publish_decision(why: str) -> None:
    """For GET /v1/stats: the ingress reads it there."""
    from app.ray_internals.key_value import AUTOSCALING, write

    write(AUTOSCALING, why)
