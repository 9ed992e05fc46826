"""Draws requests from a seed, and offers them to a server in this process in an open loop."""

import gc
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from app.engine.virtual import RealClock
from app.types import Generation, Size
from loadtest.arrivals import Seconds

Submit = Callable[[Generation], "Future[Any]"]  # its result is an array of pixels, or has one as `pixels`

GUIDANCE_SCALE = 4.0
MIXED_STEPS = (4, 8, 20, 50)
MIXED_KINDS = tuple(itertools.product(MIXED_STEPS, (1.0, GUIDANCE_SCALE), (1, 2, 3, 4)))
HEAD_START_S = 0.05  # from the start of `offer` to time 0 of the arrivals
TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Offered:
    """The outcome of a load. `send_lag_s` is the longest delay of a send, which latencies include."""

    latencies: Seconds  # from the intended arrival to the last picture of the request
    makespan_s: float
    send_lag_s: float


def request(size: Size, seed: int, *, steps: int, guidance_scale: float = GUIDANCE_SCALE, n: int = 1) -> Generation:
    return Generation(
        prompt=f"a red house under a yellow sun, number {seed}",  # no two requests share a cached prompt
        negative_prompt="",
        width=size[0],
        height=size[1],
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        seed=seed,
        sampler=None,
        n=n,
    )


def equal_requests(count: int, size: Size, *, steps: int, guidance_scale: float) -> list[Generation]:
    return [request(size, seed, steps=steps, guidance_scale=guidance_scale) for seed in range(count)]


def mixed_requests(count: int, size: Size, rng: np.random.Generator) -> list[Generation]:
    """Requests of 32 kinds: 4 numbers of steps, guided or not, 1 to 4 images. Each 32 in a row have every kind once."""
    deals = -(-count // len(MIXED_KINDS))
    kinds = [MIXED_KINDS[card] for _ in range(deals) for card in rng.permutation(len(MIXED_KINDS))]
    return [
        request(size, seed, steps=kind[0], guidance_scale=kind[1], n=kind[2]) for seed, kind in enumerate(kinds[:count])
    ]


def offer(submit: Submit, requests: Sequence[Generation], arrivals: Seconds) -> Offered:
    """Sends each request at its time, whether or not earlier ones are done, and waits for all of them."""
    finished = np.zeros(len(requests))
    errors: list[BaseException] = []
    done = threading.Semaphore(0)

    def note(index: int, future: "Future[Any]") -> None:
        finished[index] = time.monotonic()
        error = future.exception()
        if error is None:
            result = future.result()
            if len(getattr(result, "pixels", result)) != requests[index].n:
                error = AssertionError(f"{requests[index]} got {result}")
        if error is not None:
            errors.append(error)
        done.release()

    gc.collect()
    clock = RealClock()
    began = clock() + HEAD_START_S
    intended = began + arrivals
    lag = 0.0
    for index, (generation, at) in enumerate(zip(requests, intended, strict=True)):
        clock.reach(at)
        lag = max(lag, clock() - at)
        submit(generation).add_done_callback(lambda future, index=index: note(index, future))  # type: ignore[misc]
    for _ in requests:
        if not done.acquire(timeout=TIMEOUT_S):
            raise TimeoutError(f"No request was answered within {TIMEOUT_S:g} s.")
    if errors:
        raise errors[0]
    return Offered(finished - intended, float(finished.max() - began), lag)


def offer_all(submit: Submit, requests: Sequence[Generation]) -> Offered:
    """Sends all requests at once, which measures throughput at saturation."""
    return offer(submit, requests, np.zeros(len(requests)))
