"""Which requests change replicas. A row of a request takes a replica a second a step, and two rows fit into a step."""

from app.api.messages import SizeCosts
from app.api.routing.book import REST_STEPS
from tests.api.routing.test_router import SIZE, Cluster, report

RESTED = REST_STEPS * 2.0
SLOW = SizeCosts({1: 3.0, 2: 3.0, 4: 6.0}, {1: 0.0, 2: 0.0, 4: 0.0}, {1: 0.0})


def joined(cluster: Cluster, name: str, now: float) -> None:
    cluster.router.book.list([*cluster.router.book.replicas, name], now)
    cluster.router.report(report(name), now)


def held(cluster: Cluster, name: str) -> list[int]:
    return [sent.work.steps for sent in cluster.router.book.replicas[name].sent]


def test_a_replica_that_starts_gets_half_of_what_another_has() -> None:
    cluster = Cluster("a")
    for _ in range(4):
        cluster.ask(50)
    joined(cluster, "b", RESTED)
    moves = cluster.router.rebalance(RESTED)
    assert [(move.source, move.target) for move in moves] == [("a", "b")] * 2
    assert held(cluster, "a") == held(cluster, "b") == [50, 50]
    assert not cluster.router.rebalance(RESTED), "they are on their way"


def test_images_in_progress_move_from_a_replica_that_falls_behind() -> None:
    cluster = Cluster("a")
    cluster.ask(50)
    joined(cluster, "b", RESTED)
    assert not cluster.router.rebalance(RESTED), "it would end no sooner"
    late = RESTED + 5
    cluster.router.report(report("a", sizes={SIZE: SLOW}), late)
    (move,) = cluster.router.rebalance(late)
    assert move.target == "b" and 0 < sum(move.sent.left) < 50


def test_nothing_moves_that_has_just_come_or_is_about_to_end_or_while_requests_wait() -> None:
    cluster = Cluster("a")
    for _ in range(4):
        cluster.ask(50)
    joined(cluster, "b", 1.0)
    assert not cluster.router.rebalance(1.0)
    cluster = Cluster("a")
    for _ in range(3):
        cluster.ask(5)
    joined(cluster, "b", RESTED)
    assert not cluster.router.rebalance(RESTED)
    cluster = Cluster("a")
    for _ in range(4):
        cluster.ask(50)
    joined(cluster, "b", RESTED)
    cluster.router.queue.add(cluster.router.ticket(cluster.placed[0][0].work, RESTED))
    assert not cluster.router.rebalance(RESTED)


def test_busy_replicas_keep_what_they_have() -> None:
    cluster = Cluster("a", "b")
    for steps in (50, 50, 50, 50, 50, 50):
        cluster.ask(steps)
    assert not cluster.router.rebalance(RESTED)


def test_an_answer_takes_a_request_out_of_the_book_wherever_it_was_to_be() -> None:
    cluster = Cluster("a")
    for _ in range(4):
        cluster.ask(50)
    joined(cluster, "b", RESTED)
    cluster.router.rebalance(RESTED)
    for index in range(4):
        cluster.answer(index, RESTED)
    assert not held(cluster, "a") and not held(cluster, "b") and not cluster.router.queue.active


def test_what_comes_again_counts_by_the_steps_that_are_left_and_by_its_age() -> None:
    cluster = Cluster("a")
    work = cluster.ask(50).work
    again = cluster.router.ticket(work, 100.0, None, True, 80.0, [9])
    assert again.left == (9.0,) and again.device_s == 4.5
    assert again.order_s == cluster.router.ticket(work, 20.0).order_s
