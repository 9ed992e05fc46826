"""Computes Retry-After for refused requests, so that their clients do not all return at once.

Each refused request reserves the time that its work needs, after the requests that were refused before it. Knows
nothing of HTTP, Ray or engines.
"""

import random
import time
from collections import deque
from collections.abc import Callable

from app.types import Generation

REMEMBERED = 64  # finished requests, which give the speed of the device
JITTER = 0.25  # of the wait: spreads clients that were refused at the same time
LONGEST_S = 300.0


class RetryAfter:
    """The reserved time, and the speed of the device."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self.clock = clock
        self.uniform = uniform
        self.reserved_until = 0.0
        self.finished_work: deque[tuple[float, float]] = deque(maxlen=REMEMBERED)

    def finished(self, generation: Generation, device_s: float) -> None:
        """Records a request that took `device_s` seconds of a device."""
        self.finished_work.append((work(generation), device_s))

    def seconds(self, generation: Generation, soonest_s: float, replicas: int) -> float:
        """`soonest_s` is when a place should be free, as the refusal says. `replicas` work at the same time."""
        now = self.clock()
        before_s = max(self.reserved_until - now, 0.0)  # for requests that were refused earlier
        needed_s = self.needed_s(generation, soonest_s) / max(1, replicas)
        self.reserved_until = now + min(before_s + needed_s, LONGEST_S)
        wait_s = soonest_s + before_s
        if before_s + needed_s > LONGEST_S:  # too far away to predict, so spread the clients
            return self.uniform(LONGEST_S / 2, LONGEST_S)
        return wait_s * (1 + self.uniform(0, JITTER))

    def needed_s(self, generation: Generation, soonest_s: float) -> float:
        """Device-seconds of the request, at the speed of recently finished ones."""
        if not self.finished_work:
            return soonest_s  # until the next request begins: about as long as one request takes
        total_work, device_s = map(sum, zip(*self.finished_work, strict=True))
        return work(generation) * device_s / total_work


def work(generation: Generation) -> float:
    """Steps x rows x pixels. An edit takes a share of the steps; the speed counts encodes, as seconds have them."""
    share = generation.edit.strength if generation.edit and generation.edit.strength is not None else 1.0
    steps = generation.n * generation.num_inference_steps * share
    return float(steps * generation.rows * generation.width * generation.height)
