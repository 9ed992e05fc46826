"""How many requests are expected, from those that arrived lately."""

import pytest

from app.engine.arrival_rate import ArrivalRate


def test_expected_arrivals_follow_the_rate_and_the_load_of_late() -> None:
    arrivals = ArrivalRate()
    assert arrivals.expected(0.0, backlog_s=1.0) == 0
    for second in range(100):
        arrivals.note(second, device_s=9.0 if second < 50 else 0.5)  # the earlier ones are forgotten
    # At half load, a backlog of 3 s keeps the device busy for 6 s, and one request arrives in each.
    assert arrivals.expected(100.0, backlog_s=3.0) == pytest.approx(6.0)
    assert arrivals.expected(100.0, backlog_s=0.0) == 0
    assert arrivals.expected(1000.0, backlog_s=3.0) < 0.2


def test_overload_counts_for_much_but_stays_finite() -> None:
    arrivals = ArrivalRate()
    for second in range(10):
        arrivals.note(second, device_s=2.0)
    assert arrivals.expected(10.0, backlog_s=1.0) == pytest.approx(20.0)
