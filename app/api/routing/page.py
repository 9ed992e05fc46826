"""A page of the book: what one replica has been sent and has not answered, and how it will go on. Plain code."""

import bisect
import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from app.api.messages import Report
from app.api.routing.costs import SizeModel, Work

# Rows that wait inside a replica, over those that it runs. More would bind requests early; fewer make short requests
# wait that could overtake. These and the next numbers are the best of simulations of four replicas (docs/routing.md).
AHEAD = 1.0
FAIR_AHEAD = 2.0  # likewise for requests of a key that has less than its share
SHORT, SHORT_AHEAD = 0.3, 0.5  # short: at most this part of the longest one's remaining work; and its rows before it
OTHERS = 0.5  # what a second counts by which a request delays others, over one by which it ends later itself
MOST_HELD = 3  # requests for each row that it runs, with those that are about to be answered
LEAST_STEPS = 0.25  # an image keeps so many until it is answered
SILENT = 4  # polls without an answer


@dataclass(eq=False)
class Sent:
    """A request that a replica has. `left`: the steps of each of its images, with those that its decode counts as."""

    work: Work
    left: list[float]
    order_s: float  # of ageing and priority: what counts beside its remaining device-seconds
    key: str | None = None
    rests_until: float = -math.inf  # it stays where it is until then

    @property
    def rows_left(self) -> int:
        """Rows of the images that are not about to be answered."""
        return self.work.rows * sum(not self.is_done(index) for index in range(len(self.left)))

    def is_done(self, index: int) -> bool:
        return self.left[index] <= LEAST_STEPS


@dataclass(eq=False)
class Replica:
    """A page of the book."""

    id: str
    models: Mapping[str, SizeModel]
    at: float  # up to when `sent` has been moved on
    seen: float  # when it was first listed
    sent: list[Sent] = field(default_factory=list)
    foreign_s: float = 0.0  # device-seconds that it reports and that other ingress replicas sent
    healthy: bool = True
    avoided_until: float = -math.inf
    report: Report | None = None
    missed: int = 0  # polls that it has not answered, since its latest report

    @property
    def silent(self) -> bool:
        return self.missed >= SILENT

    @property
    def rows_at_once(self) -> int:
        return max((model.rows_at_once for model in self.models.values()), default=1)

    def usable(self, now: float) -> bool:
        return bool(self.models) and self.healthy and now >= self.avoided_until

    def left_s(self, sent: Sent) -> float:
        return self.models[sent.work.size].device_s(sent.work, sum(sent.left))

    def backlog_s(self) -> float:
        return sum(map(self.left_s, self.sent)) + self.foreign_s

    @property
    def slots(self) -> int:
        return max((model.slots for model in self.models.values()), default=1)

    def rows_held(self) -> int:
        return sum(sent.rows_left for sent in self.sent)

    def has_room(self, work: Work, order_s: float, ahead: float = AHEAD) -> bool:
        """Whether the replica should get the request now, rather than later or than another replica.

        It holds what it runs and about a bucket more. A short request that would overtake there does not wait for this,
        as long as the engine has a slot for it. An idle replica has room for any request.
        """
        if len(self.sent) >= MOST_HELD * self.rows_at_once:
            return False
        unfinished = [(sent, rows) for sent in self.sent if (rows := sent.rows_left)]
        foreign = self.foreign_s / self.row_way_s()
        if not unfinished and not foreign:
            return True
        own_rows = work.rows * work.images
        if sum(rows for _, rows in unfinished) + foreign + own_rows <= self.rows_at_once * (1 + ahead):
            return True
        images = sum(rows // sent.work.rows for sent, rows in unfinished)
        own_s = self.models[work.size].device_s(work)
        longest_s = max((self.left_s(sent) for sent, _ in unfinished), default=0.0)
        if images + work.images > self.slots or own_s > SHORT * longest_s:
            return False
        before = sum(rows for sent, rows in unfinished if self.rank(sent) <= own_s + order_s)
        return before + foreign + own_rows <= self.rows_at_once * (1 + SHORT_AHEAD)

    def row_way_s(self) -> float:
        """Device-seconds of a typical row's way through: foreign work counts as rows by this."""
        own = [self.left_s(sent) / sent.work.rows / len(sent.left) for sent in self.sent]
        return sum(own) / len(own) if own else 1.0

    def move_on(self, now: float) -> None:
        """Predicts what the replica has done since the last time."""
        left_s, self.at = max(0.0, now - self.at), max(now, self.at)
        self.foreign_s = max(0.0, self.foreign_s - left_s)
        while left_s > 0 and (running := self.running()):
            pace = {size: len(images) / sum(map(len, running.values())) for size, images in running.items()}
            steps_s: dict[str, float] = {}
            spans = []
            for size, images in running.items():
                rows = sum(sent.work.rows for sent, _ in images)
                steps_s[size] = self.models[size].step_s(rows) / pace[size]
                spans.append(steps_s[size] * min(sent.left[index] - LEAST_STEPS for sent, index in images))
            span_s = min(left_s, max(min(spans), 1e-6))
            for size, images in running.items():
                for sent, index in images:
                    sent.left[index] = max(LEAST_STEPS, sent.left[index] - span_s / steps_s[size])
            left_s -= span_s

    def running(self) -> dict[str, list[tuple[Sent, int]]]:
        """The images that share the next step of each size."""
        images: dict[str, list[tuple[Sent, int]]] = {}
        rows: dict[str, int] = {}
        for sent in sorted(self.sent, key=self.rank):
            size = sent.work.size
            for index in range(len(sent.left)):
                taken = rows.get(size, 0) + sent.work.rows
                if not sent.is_done(index) and taken <= max(self.models[size].rows_at_once, sent.work.rows):
                    images.setdefault(size, []).append((sent, index))
                    rows[size] = taken
        return images

    def rank(self, sent: Sent) -> float:
        return self.left_s(sent) + sent.order_s

    def all_steps(self, work: Work) -> list[float]:
        """Of each image of a request that has not begun."""
        return [self.models[work.size].steps(work)] * work.images

    def ends_s(self, size: str, order: Sequence[Sent], step_s: float) -> list[float]:
        """When requests would be done, in seconds from now: a list schedule of rows over the places of a step."""
        free = [0.0] * self.models[size].rows_at_once
        ends = []
        for sent in order:
            rows = min(sent.work.rows, len(free))
            for left in sent.left:
                begins = max([heapq.heappop(free) for _ in range(rows)])
                for _ in range(rows):
                    heapq.heappush(free, begins + left * step_s)
            ends.append(begins + max(sent.left) * step_s)
        return ends

    def added_s(self, work: Work, order_s: float, left: Sequence[float] | None = None) -> tuple[float, float]:
        """Seconds until a request would be done here, and the seconds by which it delays the others, in sum.

        `left`: the steps of each of its images, if it has begun elsewhere.
        """
        model = self.models[work.size]
        new = Sent(work, [*(left or self.all_steps(work))], order_s)
        own = sorted((sent for sent in self.sent if sent.work.size == work.size), key=self.rank)
        others_s = sum(self.left_s(sent) for sent in self.sent if sent.work.size != work.size) + self.foreign_s
        rows = sum(sent.rows_left for sent in own)
        index = bisect.bisect_right([self.rank(sent) for sent in own], self.rank(new))
        without_s = self.ends_s(work.size, own, model.step_s(rows)) if own else []
        ends_s = self.ends_s(work.size, [*own[:index], new, *own[index:]], model.step_s(rows + new.rows_left))
        finish_s = ends_s.pop(index)
        return finish_s + others_s, sum(ends_s) - sum(without_s)

    def cost_s(self, work: Work, order_s: float, left: Sequence[float] | None = None) -> float:
        """What the choice of a replica minimises."""
        finish_s, harm_s = self.added_s(work, order_s, left)
        return finish_s + OTHERS * harm_s
