"""When the replicas that are on their way should be ready, by how long earlier ones took. Plain code."""

from collections.abc import Set

START_S = 60.0  # of a replica, until a first one has measured it
OVERDUE = 0.25  # a replica that should be ready by now takes so much of its start longer


class Starts:
    def __init__(self) -> None:
        self.start_s = START_S
        self.first_seen: dict[str, float] = {}
        self.have_run: set[str] = set()

    def ready_at(self, names: Set[str], known: Set[str], now: float) -> dict[str, float]:
        """The replicas among `names`, which are up, that neither run nor are `known` to the book."""
        starting = names - self.have_run - known
        self.first_seen = {name: self.first_seen.get(name, now) for name in starting}
        self.have_run &= names | known
        return {name: max(seen + self.start_s, now + OVERDUE * self.start_s) for name, seen in self.first_seen.items()}
