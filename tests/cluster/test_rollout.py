"""Old replicas that make room for new ones, where no node comes. The cluster is what Serve and Ray would say."""

from collections import Counter
from typing import Any

import pytest

from cluster import nodes
from cluster.dashboard import Dashboard, Details, Late
from cluster.nodes import Nodes
from cluster.rollout import PATIENCE_S, Room, crowded, with_room
from tests.cluster.test_deploy import WAITING, app, details, replica

WANTED: Details = {"applications": [{"name": "app", "import_path": "x:y"}]}


def updating(status: str = "UPDATING", **changes: Any) -> Details:
    state = {"message": WAITING, "target_num_replicas": 2, "replicas": [replica(), replica("STARTING", "r2")]}
    return details(app=app("DEPLOYING", status, **state | changes))


class Cluster:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.pending, self.sent = 0.0, list[str](), list[Details]()
        monkeypatch.setattr(nodes, "status", lambda dashboard: Nodes(Counter(), self.pending))
        self.room = Room(Dashboard(""), WANTED, lambda dashboard, config: self.sent.append(config), lambda: self.now)

    def look(self, now: float, seen: Details) -> None:
        self.now = now
        self.room.look(seen)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(monkeypatch)


def test_an_old_replica_ends_first_where_no_node_comes_and_the_config_is_put_back(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    for now in (0.0, PATIENCE_S, PATIENCE_S + 1):
        cluster.look(now, updating())
    assert "No node has room for a new replica of app/Model beside the old ones" in capsys.readouterr().out
    (sent,) = cluster.sent
    (deployment,) = sent["applications"][0]["deployments"]
    assert deployment == {"name": "Model", "rolling_update_percentage": 1.0}
    cluster.room.restore()
    assert cluster.sent[-1] == WANTED == {"applications": [{"name": "app", "import_path": "x:y"}]}


def test_nothing_ends_while_a_node_is_coming_or_before_it_could_have_been_asked_for(cluster: Cluster) -> None:
    cluster.pending = ["tpu, starting"]
    for now in (0.0, PATIENCE_S, 10 * PATIENCE_S):
        cluster.look(now, updating())
    cluster.pending = []
    cluster.look(11 * PATIENCE_S, updating())
    cluster.look(12 * PATIENCE_S - 1, updating())
    cluster.room.restore()
    assert not cluster.sent


def test_a_head_that_is_busy_is_asked_again(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(dashboard: Dashboard) -> Nodes:
        raise Late("it is busy")

    cluster.look(0.0, updating())
    with monkeypatch.context() as patch:
        patch.setattr(nodes, "status", late)
        cluster.look(PATIENCE_S / 2, updating())
    cluster.look(PATIENCE_S, updating())
    assert len(cluster.sent) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"message": "Deployment 'Model' has 1 replicas that have taken more than 30s to initialize."},
        {"replicas": [replica("STARTING", "r2")]},
        {"target_num_replicas": 1},
        {"status": "UPSCALING"},
    ],
)
def test_only_a_rollout_that_old_replicas_hold_up_needs_room(changes: dict[str, Any]) -> None:
    assert dict(crowded(updating()))
    assert not dict(crowded(updating(**changes)))


def test_as_few_old_replicas_end_as_serve_lets() -> None:
    """Serve stops int(share x target) replicas at a time, without those that are still to come."""
    for target, running in ((2, 1), (5, 4), (10, 7)):
        states = [replica(name=f"r{i}") for i in range(running)]
        (share,) = dict(crowded(updating(target_num_replicas=target, replicas=states))).values()
        assert int(share * target) - (target - running) == 1
    wanted: Details = {"applications": [{"name": "app", "deployments": [{"name": "Model", "num_replicas": 5}]}]}
    (application,) = with_room(wanted, {("app", "Model"): 0.5})["applications"]
    assert application["deployments"] == [{"name": "Model", "num_replicas": 5, "rolling_update_percentage": 0.5}]
