"""The values of Retry-After, on a clock that the tests set."""

from dataclasses import replace

from app.api.retry_after import JITTER, LONGEST_S, RetryAfter
from app.types import Generation

PLAIN = Generation("a", "", 64, 64, 10, 1.0, 0, None, 1)


class Clock:
    now = 50.0

    def __call__(self) -> float:
        return self.now


def on_clock(clock: Clock, share: float = 0.0) -> RetryAfter:
    return RetryAfter(clock, lambda low, high: low + share * (high - low))


def test_each_returns_when_the_work_of_earlier_ones_is_done() -> None:
    retry_after = on_clock(Clock())
    retry_after.finished(PLAIN, 2.0)
    assert [retry_after.seconds(PLAIN, 1.0, 1) for _ in range(4)] == [1.0, 3.0, 5.0, 7.0]


def test_expensive_requests_reserve_more_time() -> None:
    retry_after = on_clock(Clock())
    retry_after.finished(PLAIN, 2.0)
    dear = replace(PLAIN, guidance_scale=5.0, n=2, num_inference_steps=20)
    assert [retry_after.seconds(generation, 1.0, 1) for generation in (dear, PLAIN, PLAIN)] == [1.0, 17.0, 19.0]


def test_several_replicas_share_the_work() -> None:
    retry_after = on_clock(Clock())
    retry_after.finished(PLAIN, 2.0)
    assert [retry_after.seconds(PLAIN, 1.0, 4) for _ in range(3)] == [1.0, 1.5, 2.0]


def test_old_reservations_expire() -> None:
    clock = Clock()
    retry_after = on_clock(clock)
    retry_after.finished(PLAIN, 2.0)
    for _ in range(5):
        retry_after.seconds(PLAIN, 1.0, 1)
    clock.now += 4
    assert retry_after.seconds(PLAIN, 1.0, 1) == 7.0
    clock.now += 60
    assert retry_after.seconds(PLAIN, 1.0, 1) == 1.0


def test_a_long_wait_of_one_request_delays_no_other() -> None:
    retry_after = on_clock(Clock())
    retry_after.finished(PLAIN, 2.0)
    assert [retry_after.seconds(PLAIN, soonest_s, 1) for soonest_s in (60.0, 1.0)] == [60.0, 3.0]


def test_before_anything_has_finished_a_request_takes_as_long_as_its_wait() -> None:
    retry_after = on_clock(Clock())
    assert [retry_after.seconds(PLAIN, 1.5, 1) for _ in range(3)] == [1.5, 3.0, 4.5]


def test_random_jitter_spreads_simultaneous_refusals() -> None:
    for share in (0.0, 0.5, 1.0):
        retry_after = on_clock(Clock(), share)
        retry_after.finished(PLAIN, 2.0)
        assert retry_after.seconds(PLAIN, 8.0, 1) == 8.0 * (1 + share * JITTER)


def test_very_many_requests_are_spread_over_the_longest_wait() -> None:
    clock = Clock()
    retry_after = on_clock(clock, 0.5)
    retry_after.finished(PLAIN, 2.0)
    waits = [retry_after.seconds(PLAIN, 1.0, 1) for _ in range(1000)]
    assert max(waits) <= LONGEST_S * (1 + JITTER) and waits[-1] == 0.75 * LONGEST_S
    clock.now += LONGEST_S
    assert retry_after.seconds(PLAIN, 1.0, 1) < 2
