"""When those whose requests were refused should come back, so that they do not all come at once.

Each refused request is booked into the time behind those that were refused before it, for as long as its work needs.
Knows nothing of HTTP, Ray or engines.
"""

import random
import time
from collections import deque
from collections.abc import Callable

from app.types import Generation

REMEMBERED = 64  # finished requests, from which the speed of the device is taken
JITTER = 0.25  # of the wait: clients that were refused in one instant do not come back in one
LONGEST_S = 300.0


class RetryTimes:
    """The queue in which clients wait at home."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self.clock = clock
        self.uniform = uniform
        self.booked_until = 0.0
        self.finished_work: deque[tuple[float, float]] = deque(maxlen=REMEMBERED)

    def finished(self, generation: Generation, device_s: float) -> None:
        """A request was answered and took so many seconds of a device."""
        self.finished_work.append((work(generation), device_s))

    def retry_after_s(self, generation: Generation, soonest_s: float, replicas: int) -> float:
        """`soonest_s`: when there should be a place for one, as the refusal says; `replicas` work at the same time."""
        now = self.clock()
        before_s = max(self.booked_until - now, 0.0)  # what those who were refused before still need
        needed_s = self.needed_s(generation, soonest_s) / max(1, replicas)
        self.booked_until = now + min(before_s + needed_s, LONGEST_S)
        wait_s = soonest_s + before_s
        if before_s + needed_s > LONGEST_S:  # then it is anybody's guess, but not the same one for all
            return self.uniform(LONGEST_S / 2, LONGEST_S)
        return wait_s * (1 + self.uniform(0, JITTER))

    def needed_s(self, generation: Generation, soonest_s: float) -> float:
        """Device-seconds of the request, from the speed of those that were finished lately."""
        if not self.finished_work:
            return soonest_s  # until one of the queue begins: about as long as one takes
        done, device_s = map(sum, zip(*self.finished_work, strict=True))
        return work(generation) * device_s / done


def work(generation: Generation) -> float:
    """Steps of rows of pixels. A guided image has two rows."""
    rows = 2 if generation.guidance_scale > 1 else 1
    return float(generation.n * generation.num_inference_steps * rows * generation.width * generation.height)
