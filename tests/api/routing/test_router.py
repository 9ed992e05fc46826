"""The queue, the book and the router over a clock that the test moves. One row of a request takes a replica a second a
step, and two rows fit into a step."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import pytest

from app.api.errors import ApiError
from app.api.messages import Report, SizeCosts
from app.api.routing.book import AVOID_S
from app.api.routing.costs import SizeModel, Work, rows_at_once
from app.api.routing.page import AHEAD, SILENT, Sent
from app.api.routing.queue import Ticket
from app.api.routing.router import Router, level
from app.diffusion.samplers import SAMPLERS, Schedule, evaluations, make_table, samplers_for
from app.types import Edit, Generation

SIZE = "64x64"
COSTS = SizeCosts({1: 1.0, 2: 1.0, 4: 2.0}, {1: 0.0, 2: 0.0, 4: 0.0}, {1: 0.0})


def report(
    name: str,
    unfinished: int = 0,
    backlog_s: float = 0.0,
    *,
    healthy: bool = True,
    sizes: Mapping[str, SizeCosts] = MappingProxyType({SIZE: COSTS}),
) -> Report:
    return Report(name, sizes, unfinished, backlog_s, healthy)


class Cluster:
    """A router, and where it has sent requests."""

    def __init__(self, *replicas: str, max_waiting: int = 100) -> None:
        self.router = Router(max_waiting, self.send)
        self.placed: list[tuple[Ticket, str, Sent, float]] = []
        self.router.book.list(replicas, 0.0)
        for name in replicas:
            self.router.report(report(name), 0.0)

    def send(self, ticket: Ticket, replica: str, sent: Sent, ahead_s: float) -> None:
        self.placed.append((ticket, replica, sent, ahead_s))

    def ask(self, steps: int, now: float = 0.0, *, key: str | None = None, images: int = 1, rows: int = 1) -> Ticket:
        ticket = self.router.ticket(Work(SIZE, images, rows, steps), now, key)
        self.router.queue.add(ticket)
        self.router.pump(now)
        return ticket

    def answer(self, index: int, now: float) -> None:
        _, _, sent, _ = self.placed[index]
        self.router.answered(sent)
        self.router.pump(now)

    @property
    def where(self) -> list[str]:
        return [replica for _, replica, _, _ in self.placed]


def test_only_buckets_that_gain_rows_per_second_count() -> None:
    assert rows_at_once(COSTS.step_s) == 2
    assert rows_at_once({1: 1.0, 2: 1.5, 4: 2.0}) == 4


def test_an_edit_costs_its_encodes_and_its_share_of_the_steps() -> None:
    model = SizeModel(replace(COSTS, encode_image_s=5.0, reference_step_s={1: 3.0, 2: 3.0, 4: 6.0}))
    pixels = np.zeros((64, 64, 3), np.uint8)
    plain = Generation("a", "", 64, 64, 20, 1.0, 0, "euler", 1)
    begins = Work.of(replace(plain, edit=Edit(pixels, strength=0.6)))
    looks = Work.of(replace(plain, edit=Edit(references=(pixels, pixels)), references=2))
    assert (begins.steps, begins.encodes, begins.looks) == (12, 1, False)
    assert (looks.steps, looks.encodes, looks.looks) == (20, 2, True)
    assert [model.alone_s(work) for work in (Work.of(plain), begins, looks)] == [20.0, 12 + 5.0, 3 * 20 + 10.0]
    assert model.device_s(begins) == 12 * model.row_s + 5.0
    assert model.device_s(looks) == 3 * 20 * model.row_s + 10.0


def test_a_request_goes_to_the_replica_that_finishes_it_first() -> None:
    cluster = Cluster("a", "b")
    cluster.ask(50, images=2)
    cluster.ask(4)
    cluster.ask(4)
    cluster.ask(30)
    assert cluster.where == ["a", "b", "b", "b"]


def test_equal_requests_spread_evenly_and_the_rest_waits_in_the_ingress() -> None:
    cluster = Cluster("a", "b")
    for _ in range(20):
        cluster.ask(10)
    held = round(2 * (1 + AHEAD))
    assert sorted(cluster.where) == ["a"] * held + ["b"] * held
    assert len(cluster.router.queue) == 20 - 2 * held


def test_a_replica_that_starts_takes_from_what_waits_at_once() -> None:
    cluster = Cluster("a")
    for _ in range(20):
        cluster.ask(10)
    cluster.router.book.list(["a", "b"], 1.0)
    cluster.router.report(report("b"), 1.0)
    cluster.router.pump(1.0)
    assert cluster.where.count("b") == 2 * (1 + AHEAD)


def test_shorter_work_waits_less_but_ageing_lets_nobody_starve() -> None:
    cluster = Cluster("a")
    for _ in range(4):
        cluster.ask(10)
    long, short = cluster.ask(40), cluster.ask(10)
    late = cluster.ask(10, now=200.0)
    for index in range(3):
        cluster.answer(index, 200.0)
    assert [ticket for ticket, *_ in cluster.placed[4:]] == [short, long, late]
    waited = cluster.placed[5]
    assert waited[3] == pytest.approx(40.0), "what it has waited counts in the replica: 200 s, weighted by ageing"


def test_a_short_request_that_would_overtake_does_not_wait_behind_a_full_replica() -> None:
    cluster = Cluster("a")
    for _ in range(3):
        cluster.ask(50, rows=2)
    cluster.ask(4)
    assert len(cluster.placed) == 3 and len(cluster.router.queue) == 1


def test_the_book_predicts_what_is_left_and_is_empty_when_all_is_answered() -> None:
    cluster = Cluster("a")
    cluster.ask(10)
    cluster.ask(10)
    (replica,) = cluster.router.book.replicas.values()
    assert replica.backlog_s() == pytest.approx(10.0)
    replica.move_on(6.0)
    assert replica.backlog_s() == pytest.approx(4.0)
    cluster.answer(0, 10.0)
    cluster.answer(1, 10.0)
    assert replica.backlog_s() == 0 and not cluster.router.queue.active


def test_a_report_corrects_the_book_within_bounds() -> None:
    cluster = Cluster("a")
    cluster.ask(10)
    (replica,) = cluster.router.book.replicas.values()
    cluster.router.report(report("a", 1, 7.5), 0.0)
    assert replica.backlog_s() == pytest.approx(7.5)
    cluster.router.report(report("a", 1, 100.0), 0.0)
    assert replica.backlog_s() == pytest.approx(15.0)


def test_what_other_ingress_replicas_sent_counts_until_it_is_done() -> None:
    cluster = Cluster("a", "b")
    cluster.router.report(report("a", 3, 30.0), 0.0)
    for _ in range(4):
        cluster.ask(10)
    assert cluster.where == ["b"] * 4
    busy = cluster.router.book.replicas["a"]
    busy.move_on(30.0)
    assert busy.backlog_s() == 0


def test_stalled_failed_and_silent_replicas_get_nothing() -> None:
    cluster = Cluster("a", "b")
    cluster.router.report(report("a", healthy=False), 0.0)
    cluster.ask(10)
    assert cluster.where == ["b"]
    cluster.router.report(report("a"), 0.0)
    cluster.router.book.avoid("a", 0.0)
    cluster.ask(10)
    assert cluster.where == ["b", "b"]
    assert cluster.router.book.usable(AVOID_S + 1) == [*cluster.router.book.replicas.values()]
    cluster.router.book.replicas["b"].missed = SILENT
    cluster.ask(10, now=AVOID_S + 1)
    assert cluster.where == ["b", "b", "a"]


def test_what_a_lost_replica_had_is_returned_and_forgotten() -> None:
    cluster = Cluster("a", "b")
    cluster.ask(10)
    (sent,) = cluster.router.book.list(["b"], 0.0)
    assert sent is cluster.placed[0][2] and [*cluster.router.book.replicas] == ["b"]
    cluster.answer(0, 0.0)
    assert not cluster.router.queue.active


def test_a_request_that_comes_again_goes_first_and_to_a_full_replica_too() -> None:
    cluster = Cluster("a")
    for _ in range(8):
        cluster.ask(10)
    again = cluster.router.ticket(Work(SIZE, 1, 1, 50), 0.0, None, again=True)
    cluster.router.queue.add(again)
    cluster.router.pump(0.0)
    assert cluster.placed[-1][0] is again


def test_a_key_that_floods_does_not_delay_another_ones_request() -> None:
    cluster = Cluster("a")
    for _ in range(50):
        cluster.ask(10, key="flood")
    ticket = cluster.ask(10, key="rare", now=1.0)
    placed = cluster.placed[-1]
    assert placed[0] is ticket, "it does not wait for a place"
    assert placed[3] > 0, "and goes ahead of the others in the replica"


def test_keys_share_the_device_time_and_an_idle_key_saves_none_up() -> None:
    cluster = Cluster("a")
    for _ in range(30):
        cluster.ask(10, key="a")
    for _ in range(30):
        cluster.ask(20, key="b")
    used_s = {"a": 0.0, "b": 0.0}
    for index in range(40):
        ticket, *_ = cluster.placed[index]
        used_s[ticket.key or ""] += ticket.device_s
        cluster.answer(index, 0.0)
    assert used_s["a"] == pytest.approx(used_s["b"], rel=0.25)
    cluster.ask(10, key="late")
    assert cluster.router.queue.used_s["late"] >= min(used_s.values()) * 0.7


def test_a_deadline_is_checked_over_all_replicas_starting_ones_too() -> None:
    cluster = Cluster("a", "b")
    for _ in range(8 + 20):
        cluster.ask(10)
    ticket = cluster.router.ticket(Work(SIZE, 1, 1, 10), 0.0)
    alone_s = 20 * 5 / 2 + 20 + 10  # what waits, on two replicas; what they have; its own steps
    assert cluster.router.answer_s(ticket, 0.0) == pytest.approx(alone_s + 0.0, rel=0.05)
    with pytest.raises(ApiError) as refused:
        cluster.router.admit(ticket, 60.0, 0.0)
    assert refused.value.code == "deadline_unmeetable"
    assert refused.value.retry_after_s == pytest.approx(alone_s - 60.0, rel=0.1)
    cluster.router.starting = {"c": 10.0, "d": 10.0}
    cluster.router.admit(ticket, 60.0, 0.0)


def test_a_full_queue_counts_every_replica() -> None:
    cluster = Cluster("a", "b", max_waiting=3)
    while len(cluster.router.queue) < 6:
        cluster.ask(10)
    ticket = cluster.router.ticket(Work(SIZE, 1, 1, 10), 0.0)
    with pytest.raises(ApiError) as refused:
        cluster.router.admit(ticket, 1000.0, 0.0)
    assert refused.value.code == "queue_full"
    assert refused.value.retry_after_s == pytest.approx(2.5), "a request of five device-seconds leaves for two replicas"
    cluster.router.starting = {"c": 10.0}
    cluster.router.admit(ticket, 1000.0, 0.0)


def test_work_fills_replicas_like_water() -> None:
    assert level([5.0, 1.0], 0.0) == 1.0
    assert level([1.0, 5.0], 2.0) == 3.0
    assert level([1.0, 5.0], 8.0) == 7.0


def test_the_seconds_alone_count_rounds_of_a_bucket() -> None:
    model = SizeModel(COSTS)
    assert model.alone_s(Work(SIZE, 2, 1, 10)) == 10.0
    assert model.alone_s(Work(SIZE, 2, 2, 10)) == 20.0


@pytest.mark.parametrize("name", [*SAMPLERS])
def test_evaluations_are_the_rows_of_a_samplers_table(name: str) -> None:
    schedule = Schedule("DDIMScheduler")
    assert name in samplers_for(schedule)
    for steps in (1, 2, 7):
        assert evaluations(name, steps) == len(make_table(name, steps, schedule))


def test_work_counts_rows_images_and_evaluations() -> None:
    generation = Generation("a", "", 64, 32, 10, 4.0, 0, "heun", 3)
    assert Work.of(generation) == Work("64x32", 3, 2, 19)
