"""The book: what each replica has been sent and has not answered, in predicted device-seconds.

Between two answers the book moves on by prediction, as the replica's own engine would: the rows with the least
remaining work share its steps. What a replica reports, with each answer and when the ingress polls, corrects it: its
measured step times, and how much its own book says is left. Plain code; the caller reads the clock.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from app.api.messages import Report
from app.api.routing.costs import SizeModel, Work
from app.api.routing.page import AHEAD, LEAST_STEPS, Replica, Sent

MOST_CORRECTION = 2.0  # of the predicted remaining work, by one report
REST_STEPS = 5  # a request that has just come stays for so long
AVOID_S = 5.0  # a replica that could not take or keep a request gets nothing for so long


class Book:
    """The pages of all replicas."""

    def __init__(self) -> None:
        self.replicas: dict[str, Replica] = {}
        self._typical: Mapping[str, SizeModel] = {}

    def usable(self, now: float) -> list[Replica]:
        """The replicas that may get requests: not the silent ones, unless all are."""
        usable = [replica for replica in self.replicas.values() if replica.usable(now)]
        return [replica for replica in usable if not replica.silent] or usable

    def models(self) -> Mapping[str, SizeModel]:
        """Cost models of some replica, also after it has gone; empty until a first one has reported."""
        return self._typical

    def list(self, ids: Iterable[str], now: float) -> list[Sent]:
        """Takes up the replicas that run, and forgets the others. Returns what those had not answered."""
        running = set(ids)
        for name in running - self.replicas.keys():
            self.replicas[name] = Replica(name, {}, now, now)
        return [sent for name in self.replicas.keys() - running for sent in self.replicas.pop(name).sent]

    def report(self, report: Report, now: float) -> None:
        """Corrects a page by what its replica says."""
        replica = self.replicas.setdefault(report.replica, Replica(report.replica, {}, now, now))
        previous = replica.report
        if previous is None or previous.sizes != report.sizes:
            replica.models = self._typical = {size: SizeModel(costs) for size, costs in report.sizes.items()}
        replica.report, replica.healthy, replica.missed = report, report.healthy, 0
        replica.move_on(now)
        own_s = sum(map(replica.left_s, replica.sent))
        if report.unfinished > len(replica.sent):  # other ingress replicas send to it, too
            replica.foreign_s = max(0.0, report.backlog_s - own_s)
        else:
            replica.foreign_s = 0.0
        if report.unfinished == len(replica.sent) and own_s > 0:
            ratio = min(max(report.backlog_s / own_s, 1 / MOST_CORRECTION), MOST_CORRECTION)
            for sent in replica.sent:
                sent.left = [max(LEAST_STEPS, left * ratio) for left in sent.left]

    def avoid(self, name: str, now: float) -> None:
        """A replica that has just failed, or that ends, gets nothing for some seconds."""
        if name in self.replicas:
            self.replicas[name].avoided_until = now + AVOID_S

    def choose(
        self, work: Work, order_s: float, now: float, ahead: float = AHEAD, left: Sequence[float] | None = None
    ) -> Replica | None:
        """The replica that would finish the request first, among those that have room. Equal ones: the least busy."""
        roomy = []
        for replica in self.usable(now):
            if work.size in replica.models:
                replica.move_on(now)
                if replica.has_room(work, order_s, ahead):
                    roomy.append((replica.cost_s(work, order_s, left), replica.backlog_s(), replica.id))
        return self.replicas[min(roomy)[-1]] if roomy else None

    def send(
        self,
        replica: Replica,
        work: Work,
        order_s: float,
        key: str | None,
        now: float,
        left: Sequence[float] | None = None,
    ) -> Sent:
        replica.move_on(now)
        rests_until = now + REST_STEPS * replica.models[work.size].step_s(work.rows)
        sent = Sent(work, [*(left or replica.all_steps(work))], order_s, key, rests_until)
        replica.sent.append(sent)
        return sent

    def remove(self, sent: Sent) -> None:
        """An answer, a refusal or a failure: whatever it is, no replica has the request any longer."""
        for replica in self.replicas.values():
            if sent in replica.sent:
                replica.sent.remove(sent)

    def rows_of(self, key: str | None) -> int:
        return sum(sent.work.rows * len(sent.left) for _, sent in self.all_sent() if sent.key == key)

    def all_sent(self) -> Iterator[tuple[Replica, Sent]]:
        for replica in self.replicas.values():
            for sent in replica.sent:
                yield replica, sent
