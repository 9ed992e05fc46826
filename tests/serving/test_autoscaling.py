"""The rule that decides how many replicas there are, on a clock that the test moves."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve.autoscaling_policy import _apply_autoscaling_config as apply_autoscaling_config
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from app.api.messages import QueueState
from app.serving.autoscaling import PATIENCE, Load, Memory, PredictedWait, Rule, decide
from app.serving.load import FORGET_S, Queues
from cluster import ROOT

RULE = Rule(objective_s=10.0, hold_s=60.0, start_s=30.0)


def wish(memory: Memory, now: float, backlog_s: float, arriving: float, running: int, most: int = 100) -> int:
    return decide(RULE, Load(backlog_s, arriving, running, 30.0), memory, now, 1, most)[0]


def test_a_backlog_is_spread_so_that_it_is_done_within_the_objective_once_the_replicas_have_started() -> None:
    assert wish(Memory(), 0.0, 0.0, 0.0, 1) == 1
    assert wish(Memory(), 0.0, 30.0, 0.0, 1) == 1, "the replica that runs will have done it by then"
    assert wish(Memory(), 0.0, 130.0, 0.0, 1) == 4, "100 s are left then, for the objective and half a start"
    assert wish(Memory(), 0.0, 130.0, 0.0, 4) == 1


def test_what_arrives_needs_replicas_for_good() -> None:
    assert wish(Memory(), 0.0, 0.0, 0.5, 1) == 1
    assert wish(Memory(), 0.0, 0.0, 3.0, 4) >= 4
    assert wish(Memory(), 0.0, 0.0, 3.0, 1) > wish(Memory(), 0.0, 0.0, 3.0, 4), "60 s of work pile up meanwhile"


def test_a_rising_load_counts_as_what_it_will_be() -> None:
    memory = Memory()
    for second in range(60):
        wish(memory, float(second), 0.0, second / 15, 5)
    steady = Memory()
    for second in range(60):
        wish(steady, float(second), 0.0, 4.0, 5)
    assert wish(memory, 60.0, 0.0, 4.0, 5) > wish(steady, 60.0, 0.0, 4.0, 5)


def test_fewer_replicas_must_suffice_for_a_while() -> None:
    memory = Memory()
    high = wish(memory, 0.0, 0.0, 3.5, 4)
    assert wish(memory, 59.0, 0.0, 0.1, high) == high
    assert wish(memory, 61.0, 0.0, 0.1, high) == 1


def test_measured_starts_replace_the_first_guess() -> None:
    memory = Memory()
    wish(memory, 0.0, 130.0, 0.0, 1)
    wish(memory, 80.0, 130.0, 0.0, 2)
    assert [*memory.starts] == [80.0]


def test_a_stock_out_is_remembered_and_nothing_is_given_back_meanwhile() -> None:
    memory = Memory()
    assert wish(memory, 0.0, 500.0, 0.0, 2) > 3
    late = PATIENCE * 30.0 + 1
    assert wish(memory, late, 500.0, 0.0, 2) == 3
    assert wish(memory, late + 100.0, 0.0, 0.0, 2) == 3, "as many as run and one"
    assert wish(memory, late + 101.0, 500.0, 0.0, 3) > 4, "a start ends it"


def test_bounds_hold() -> None:
    assert wish(Memory(), 0.0, 1e6, 50.0, 1, most=4) == 4


@pytest.mark.parametrize("arguments", [{"objective_s": 0}, {"hold_s": -1}, {"start_s": float("inf")}])
def test_wrong_arguments_are_refused_with_their_range(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(arguments))} must be a number of at least"):
        Rule(**arguments)


def context(**metrics: dict[str, float]) -> Any:
    bounds = {"capacity_adjusted_min_replicas": 1, "capacity_adjusted_max_replicas": 8}
    return SimpleNamespace(aggregated_metrics=metrics, current_num_replicas=2, target_num_replicas=2, **bounds)


def test_the_policy_explains_each_change_once(caplog: pytest.LogCaptureFixture) -> None:
    published: list[str] = []
    policy = PredictedWait(start_s=30.0, publish=published.append, clock=lambda: 0.0)
    load = context(backlog_s={"a": 50.0, "b": 50.0}, waiting_s={"a": 100.0, "b": 100.0}, start_s={"a": 30.0})
    with caplog.at_level(logging.INFO, logger="ray.serve"):
        wanted = policy(load)[0]
        assert policy(load)[0] == wanted == 6
    (line,) = caplog.messages
    assert published == [line]
    assert line.startswith("2 run, 6 wanted: 200.0 device-seconds wait or run;")


def test_the_policy_never_raises_and_keeps_the_number_instead(caplog: pytest.LogCaptureFixture) -> None:
    policy = PredictedWait(publish=lambda why: None)
    broken = SimpleNamespace(target_num_replicas=3)
    assert policy(broken) == policy(broken) == (3, {})
    assert len(caplog.messages) == 1, "it logs the failure once"


def test_serve_takes_the_policy_by_its_name_and_arguments() -> None:
    policy: Any = {"policy_function": "app.serving.autoscaling:PredictedWait", "policy_kwargs": {"objective_s": 5}}
    config: Any = AutoscalingConfig(min_replicas=1, max_replicas=4, policy=policy)
    assert config.policy.get_policy()(objective_s=5).rule.objective_s == 5


@pytest.mark.filterwarnings("ignore:The `metrics_interval_s` field")
def test_serves_own_wrapper_passes_the_wish_on_at_once_within_the_bounds() -> None:
    scaling: list[dict[str, Any]] = yaml.safe_load((ROOT / "serve_config.yaml").read_text())["applications"][0][
        "deployments"
    ]
    config = AutoscalingConfig(**scaling[1]["autoscaling_config"])
    deployment = DeploymentID("StableDiffusion", "text-to-image")
    replicas = [ReplicaID(name, deployment) for name in "ab"]
    policy = PredictedWait(start_s=30.0, publish=lambda why: None, clock=lambda: 0.0)
    metrics = {"backlog_s": dict.fromkeys(replicas, 300.0), "waiting_s": dict.fromkeys(replicas, 500.0)}
    context = AutoscalingContext(
        deployment_id=deployment,
        deployment_name=deployment.name,
        app_name=deployment.app_name,
        current_num_replicas=2,
        target_num_replicas=2,
        running_replicas=replicas,
        total_num_requests=4.0,
        total_queued_requests=0.0,
        aggregated_metrics=metrics,
        raw_metrics={},
        capacity_adjusted_min_replicas=config.min_replicas,
        capacity_adjusted_max_replicas=config.max_replicas,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=0.0,
        config=config,
    )
    assert apply_autoscaling_config(policy)(context)[0] == config.max_replicas


def test_a_replica_passes_on_what_waits_in_every_ingress_until_it_is_silent() -> None:
    now = [0.0]
    queues = Queues(lambda: now[0])
    queues.note(QueueState("a", 2, 5.0, 0.5))
    queues.note(QueueState("b", 1, 1.0, 0.25))
    assert queues.totals() == {"waiting": 3.0, "waiting_s": 6.0, "arriving": 0.75}
    now[0] = FORGET_S + 1
    assert queues.totals() == {"waiting": 0.0, "waiting_s": 0.0, "arriving": 0.0}
