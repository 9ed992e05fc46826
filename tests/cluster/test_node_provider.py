"""The local cluster without Ray: its autoscaler config, node provider and metadata server, and `ray status` as text."""

import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler.tags import TAG_RAY_USER_NODE_TYPE
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

from cluster import ROOT, auth_token, node_watcher, nodes, shell_environment
from cluster.cli import UserError
from cluster.dashboard import Dashboard, Refused
from cluster.local import autoscaler_config, metadata_server, node_provider
from cluster.local.autoscaler_config import Timings
from cluster.local.metadata_server import Metadata
from cluster.local.node_provider import NOTICE_S, LocalNodeProvider, OutOfStock
from cluster.local.state import new

CLUSTERS = [ROOT / "cluster.yaml", *sorted((ROOT / "configs").glob("cluster-*.yaml"))]
each_cluster = pytest.mark.parametrize("path", CLUSTERS, ids=[path.stem for path in CLUSTERS])
TAGS = {TAG_RAY_USER_NODE_TYPE: "ray_tpu"}


# What the autoscaler is told


@each_cluster
def test_the_local_cluster_has_the_node_types_of_the_file_and_ray_accepts_them(path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    read = AutoscalingConfig(
        autoscaler_config.autoscaling(autoscaler_config.read(path), Timings()), skip_content_hash=True
    )
    head, tpu = (read.get_node_type_configs()[name] for name in ("head", "ray_tpu"))
    declared = content["available_node_types"]["ray_tpu"]
    slice_name = declared["node_config"]["acceleratorType"]
    assert head.resources == {"CPU": 0} and read.get_head_node_type() == "head"
    assert tpu.resources == declared["resources"] | {f"TPU-{slice_name}-head": 1}, "as the launcher adds it"
    assert tpu.labels == declared["labels"]
    assert (tpu.min_worker_nodes, tpu.max_worker_nodes) == (declared["min_workers"], declared["max_workers"])
    assert read.get_max_num_worker_nodes() == content["max_workers"]
    assert read.get_idle_timeout_s() == content["idle_timeout_minutes"] * 60


def test_nothing_of_google_is_left_in_it() -> None:
    text = yaml.safe_dump(autoscaler_config.autoscaling(autoscaler_config.read(CLUSTERS[0]), Timings()))
    assert not any(word in text for word in ("gcp", "ubuntu", "machineType", "pip", "ray start", "auth_token"))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("applications: []", "has no available_node_types"),
        ("- 1", "has no available_node_types"),
        ("a: [", "not YAML"),
        (CLUSTERS[0].read_text().replace("v5litepod-4 #", "banana #"), "got banana"),
    ],
    ids=["serve config", "list", "broken", "banana"],
)
def test_a_file_that_is_no_cluster_file_starts_nothing(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=reason):
        autoscaler_config.read(path)


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match=r"nowhere.yaml cannot be read: .* TWIN="):
        autoscaler_config.read(Path("nowhere.yaml"))


@pytest.mark.parametrize(
    ("name", "text", "bounds"),
    [
        ("idle_minutes", "0", "between 0.05 and 1440, got 0."),
        ("launch_s", "-1", "between 0 and 3600, got -1."),
        ("stock_out", "1.5", "between 0 and 1, got 1.5."),
        ("preemption", "often", "a number between 0 and 1, got often."),
        ("launch_s", "nan", "between 0 and 3600, got nan."),
    ],
)
def test_a_timing_out_of_bounds_is_refused_with_the_bounds(name: str, text: str, bounds: str) -> None:
    with pytest.raises(UserError, match=f"{name.upper()} must be {bounds}"):
        autoscaler_config.timings({name: text}, Timings())


def test_what_is_not_given_stays_as_it_was() -> None:
    before = Timings(launch_s=5, stock_out=1)
    assert autoscaler_config.timings({"stock_out": "0", "idle_minutes": "0.5"}, before) == Timings(
        idle_minutes=0.5, launch_s=5
    )
    assert str(before) == "LAUNCH_S=5, STOCK_OUT=1"


def test_idle_minutes_take_the_place_of_the_files() -> None:
    config = autoscaler_config.autoscaling(autoscaler_config.read(CLUSTERS[0]), Timings(idle_minutes=0.5))
    assert config["idle_timeout_minutes"] == 0.5


# The node provider


class StartedNode:
    """Stands in for Ray's Node, which starts processes."""

    def __init__(self, *args: object, **options: object) -> None:
        self.all_processes: dict[str, list[Any]] = {}
        self.ended = False

    def kill_all_processes(self, **options: object) -> None:
        self.ended = True


@pytest.fixture
def provider(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalNodeProvider]:
    monkeypatch.setenv("RAY_FAKE_CLUSTER", "1")
    monkeypatch.setattr(node_provider, "Node", StartedNode)
    monkeypatch.setattr(node_provider, "watch", lambda node, metadata: None)
    monkeypatch.setattr(LocalNodeProvider, "preempt_forever", lambda self: None)
    config = autoscaler_config.autoscaling(
        autoscaler_config.read(CLUSTERS[0]),
        Timings(),
        gcs_address="127.0.0.1:1",
        metadata_port=0,
        config_file=str(tmp_path / "autoscaling.yaml"),
    )
    autoscaler_config.write(config, tmp_path / "autoscaling.yaml")
    provider = LocalNodeProvider(config["provider"], "local")
    yield provider
    provider.server.shutdown()
    provider.server.server_close()


def behave(provider: LocalNodeProvider, **timings: float) -> None:
    """Changes timings as `make up STOCK_OUT=...` does while the cluster is up."""
    config = yaml.safe_load(provider.config_file.read_text())
    config["provider"]["timings"].update(timings)
    autoscaler_config.write(config, provider.config_file)


def create(provider: LocalNodeProvider, count: int = 1) -> None:
    provider.create_node_with_resources_and_labels({}, TAGS, count, {"CPU": 8, "TPU": 4}, {})


def test_the_head_is_there_and_nodes_are_added_beside_it(provider: LocalNodeProvider) -> None:
    assert provider.node_tags("head")[TAG_RAY_USER_NODE_TYPE] == "head"
    create(provider, 2)
    assert provider.workers() == ["ray_tpu-1", "ray_tpu-2"]
    assert provider.node_tags("ray_tpu-2")[TAG_RAY_USER_NODE_TYPE] == "ray_tpu"
    provider.terminate_node("ray_tpu-1")
    assert provider.non_terminated_nodes({}) == ["head", "ray_tpu-2"]


def test_a_stock_out_refuses_every_node_until_it_ends(provider: LocalNodeProvider) -> None:
    behave(provider, stock_out=1)
    with pytest.raises(OutOfStock, match="no more capacity for ray_tpu"):
        create(provider)
    assert provider.workers() == []
    behave(provider, stock_out=0)
    create(provider)
    assert provider.workers() == ["ray_tpu-1"]


def test_a_stock_out_refuses_about_as_many_as_it_should(
    provider: LocalNodeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    behave(provider, stock_out=0.3)
    draws = iter([0.31, 0.99, 0.29])
    monkeypatch.setattr("random.random", lambda: next(draws))
    with pytest.raises(OutOfStock):
        create(provider, 3)
    assert provider.workers() == ["ray_tpu-1", "ray_tpu-2"]


@pytest.mark.slow
def test_a_node_takes_its_time_to_come(provider: LocalNodeProvider, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    behave(provider, launch_s=90)
    create(provider)
    assert slept == [90]


def test_a_node_that_is_taken_away_has_notice_first(provider: LocalNodeProvider) -> None:
    create(provider, 2)
    node = provider._nodes["ray_tpu-1"]["node"]
    provider.preempt("ray_tpu-1")
    assert provider.metadata.value("ray_tpu-1", "preempted") == "TRUE"
    when = provider.preempted["ray_tpu-1"]
    provider.preempt("ray_tpu-1")
    assert provider.preempted["ray_tpu-1"] == when, "a second notice gives no more time"
    provider.preempt_some(when - 1, lambda: 1.0)
    assert provider.workers() == ["ray_tpu-1", "ray_tpu-2"] and not node.ended
    provider.preempt_some(when, lambda: 1.0)
    assert provider.workers() == ["ray_tpu-2"] and node.ended
    assert NOTICE_S == 30


def test_notices_that_come_while_others_end_are_all_kept(provider: LocalNodeProvider) -> None:
    """Notices arrive by HTTP, each in its own thread."""
    before, failed = sys.getswitchinterval(), list[RuntimeError]()
    names = [f"ray_tpu-{i}" for i in range(20000)]

    def notify() -> None:
        for name in names:
            provider.preempt(name)

    notices = threading.Thread(target=notify)
    sys.setswitchinterval(1e-6)
    try:
        notices.start()
        while notices.is_alive():
            try:
                provider.preempt_some(0, lambda: 1.0)
            except RuntimeError as error:
                failed.append(error)
    finally:
        sys.setswitchinterval(before)
        notices.join()
    assert not failed and len(provider.preempted) == len(names)


def test_nodes_are_taken_away_by_chance_as_often_as_is_said(provider: LocalNodeProvider) -> None:
    create(provider)
    behave(provider, preemption=0)
    provider.preempt_some(0, lambda: 0.0)
    assert not provider.preempted
    behave(provider, preemption=0.5)
    a_second = 1 - 0.5 ** (1 / 60)
    provider.preempt_some(0, lambda: a_second + 1e-9)
    assert not provider.preempted
    provider.preempt_some(0, lambda: a_second - 1e-9)
    assert set(provider.preempted) == {"ray_tpu-1"}


# Its metadata server, asked as the watcher asks Google's


@pytest.fixture
def google() -> Iterator[tuple[Metadata, str]]:
    served = Metadata(lambda: ["ray_tpu-1"], lambda node: served.take(node), "secret")
    server = served.serve(0)
    yield served, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_the_watcher_hears_of_a_change_as_soon_as_it_comes(google: tuple[Metadata, str]) -> None:
    served, address = google
    assert node_watcher.ask(f"{address}/ray_tpu-1", "maintenance-event", "0")[0] == "NONE"
    value, tag = node_watcher.ask(f"{address}/ray_tpu-1", "preempted", "0")
    assert value == "FALSE"
    threading.Timer(0.1, served.take, ["ray_tpu-1"]).start()
    assert node_watcher.ask(f"{address}/ray_tpu-1", "preempted", tag)[0] == "TRUE"
    assert served.value("ray_tpu-2", "preempted") == "FALSE"


def test_a_node_is_taken_away_by_name(google: tuple[Metadata, str]) -> None:
    served, address = google
    ours = Dashboard(address, headers={"Authorization": "Bearer secret"})
    with ours.open("/ray_tpu-1/preempted", method="PUT"):
        assert served.taken == {"ray_tpu-1"}
    with pytest.raises(UserError, match="404: There is no node ray_tpu-9"):
        ours.open("/ray_tpu-9/preempted", method="PUT")


@pytest.mark.parametrize("token", ["", "Bearer ", "Bearer secre", "secret", "Bearer s\u00e9cret"])
def test_who_has_not_the_clusters_token_takes_no_node_away(google: tuple[Metadata, str], token: str) -> None:
    served, address = google
    stranger = Dashboard(address, headers={"Authorization": token} if token else {})
    for method, path in (("PUT", "/ray_tpu-1/preempted"), ("GET", "/")):
        with pytest.raises(Refused, match=f"answers {403 if token else 401}"):
            stranger.open(path, method=method)
    assert not served.taken
    served.token = ""  # where none was given, nobody's is right
    with pytest.raises(Refused):
        Dashboard(address, headers={"Authorization": "Bearer "}).open("/")


@pytest.mark.parametrize("seconds", ["1e9", "inf", "nan", "soon", ""])
def test_no_question_waits_for_longer_than_googles(seconds: str) -> None:
    assert metadata_server.seconds(seconds) == 60
    assert metadata_server.seconds("5") == 5


# What is read out of Ray's words

STATUS = """======== Autoscaler status: 2026-11-24 20:24:51.1 ========
Node status
---------------------------------------------------------------
Active:
 1 ray_tpu
Idle:
 1 head
 1 ray_tpu
Pending:
 ray_tpu, 1 launching
 930bad47-c38b-4ead-85f6-2f17086fc506: ray_tpu,
Recent failures:
 ray_tpu: NodeTerminated (instance_id: ray_tpu-1)
 ray_tpu: LaunchFailed (latest_attempt: 20:24:40) - launch failed

Resources
---------------------------------------------------------------
Total Usage:
 0.0/8.0 CPU
Pending Demands:
 (no resource demands)
"""


def test_the_nodes_are_read_out_of_ray_status() -> None:
    status = nodes.parsed(STATUS)
    assert status.running == Counter(ray_tpu=2, head=1)
    assert [*status.rows()] == ["1 head, 2 ray_tpu", "pending: ray_tpu, 1 launching; ray_tpu, starting"]
    assert [*nodes.parsed("No cluster status.").rows()] == ["none yet"]


def test_of_the_autoscalers_log_only_what_it_does_is_told() -> None:
    log = """2026-11-24 20:21:26,469\tWARNING util.py:279 -- Dropping the empty legacy field head_node.
2026-11-24 20:21:26,479\tINFO event_logger.py:77 -- Adding 1 node(s) of type ray_tpu.
2026-11-24 20:21:27,479\tINFO event_logger.py:77 -- Adding 1 node(s) of type ray_tpu.
2026-11-24 20:21:28,611\tINFO node_provider.py:485 -- Failed to launch 1 nodes of type ray_tpu: no more capacity
Traceback (most recent call last):"""
    assert [*nodes.events(iter(log.splitlines()))] == [
        "20:21:26  Adding 1 node(s) of type ray_tpu.",
        "20:21:28  Failed to launch 1 nodes of type ray_tpu: no more capacity",
    ]


def test_the_last_failure_is_told_until_a_node_has_come() -> None:
    failed, launched = "20:21:28  Failed to launch 1 nodes of type ray_tpu: x", "20:21:40  Launched 1 nodes of type y."
    assert nodes.failure([failed, "20:21:29  Adding 1 node(s) of type ray_tpu."]) == failed
    assert nodes.failure([failed, launched]) == nodes.failure([]) == ""


def test_the_address_is_nothing_but_lines_for_eval(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(Dashboard, "details", lambda self: {"http_options": {"host": "127.0.0.1", "port": 8001}})
    cluster = new(tmp_path, 8265)
    auth_token.create(cluster.token_file)
    shell_environment.export(cluster)
    output = capsys.readouterr().out
    assert all(line.startswith(("export ", "unset ")) for line in output.splitlines())
    assert cluster.token_file.read_text() not in output
    names = "$RAY_ADDRESS $RAY_DASHBOARD_ADDRESS $RAY_API_SERVER_ADDRESS $IMAGINE_URL"
    script = f'{output}\necho "{names}"; command -v ray; echo "$RAY_AUTH_MODE $RAY_AUTH_TOKEN_PATH $RAY_AUTH_TOKEN"'
    strays = os.environ | {"RAY_AUTH_TOKEN": "somebody-elses"}
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True, env=strays)
    addresses, ray, token = done.stdout.splitlines()
    assert addresses == f"{cluster.gcs_address} http://127.0.0.1:8265 http://127.0.0.1:8265 http://127.0.0.1:8001"
    assert token == f"token {tmp_path}/token "
    assert ray.startswith(shell_environment.path())
