"""Which requests should change replicas: one has started or is idle, or another falls behind. Plain code.

A request moves where the choice of its replica, made again now, gains more than the move costs.
"""

from collections import Counter
from dataclasses import dataclass

from app.api.routing.book import Book
from app.api.routing.page import Replica, Sent

MOVE_STEPS = 4.0  # what a move takes, in steps' time: those in flight, the way, and the bytes out and in
LEAST_GAIN = 0.2  # of the time that the request has left; predictions are not exact
SLOWER = 1.5  # a replica whose steps take so many times longer falls behind
MOST_MOVES = 16  # at a time


@dataclass(frozen=True)
class Move:
    sent: Sent
    source: str
    target: str


def rebalance(book: Book, now: float) -> list[Move]:
    """Moves requests in the book to where they will be. What they gain is looked at one after the other."""
    replicas = book.usable(now)
    for replica in replicas:
        replica.move_on(now)
    moves: list[Move] = []
    while len(moves) < MOST_MOVES and (move := best_move(replicas, now)):
        book.replicas[move.source].sent.remove(move.sent)
        book.replicas[move.target].sent.append(move.sent)
        move.sent.rests_until = float("inf")  # until it has come
        moves.append(move)
    return moves


def best_move(replicas: list[Replica], now: float) -> Move | None:
    """The move that gains most, from any replica to the least busy one of those with rows to spare."""
    idle = [replica for replica in replicas if replica.rows_held() < replica.rows_at_once]
    if not idle:
        return None
    target = min(idle, key=lambda replica: (replica.backlog_s(), replica.id))
    gains_s = [
        (gained_s(sent, source, target), source.id, sent)
        for source in replicas
        if source is not target
        for sent in may_leave(source, target)
        if now >= sent.rests_until and sent.work.size in target.models
    ]
    gain_s, source, sent = max(gains_s, key=lambda gain: gain[:2], default=(0.0, "", None))
    return Move(sent, source, target.id) if sent and gain_s > 0 else None


def may_leave(source: Replica, target: Replica) -> list[Sent]:
    """The requests that wait there, at least in part; all where its steps take longer."""
    sizes = source.models.keys() & target.models.keys()
    if any(source.models[size].row_s > SLOWER * target.models[size].row_s for size in sizes):
        return source.sent[:]
    if source.rows_held() <= source.rows_at_once:
        return []
    running = Counter(sent for images in source.running().values() for sent, _ in images)
    return [sent for sent in source.sent if running[sent] * sent.work.rows < sent.rows_left]


def gained_s(sent: Sent, source: Replica, target: Replica) -> float:
    """Seconds that a move gains beyond what it must; negative where it does not pay."""
    step_s = source.models[sent.work.size].step_s(sent.work.rows)
    index = source.sent.index(sent)
    del source.sent[index]
    stays_s = source.cost_s(sent.work, sent.order_s, sent.left)
    source.sent.insert(index, sent)
    goes_s = target.cost_s(sent.work, sent.order_s, sent.left)
    return stays_s * (1 - LEAST_GAIN) - goes_s - MOVE_STEPS * step_s
