"""The applications that `make bench-cluster` compares, without a cluster."""

from typing import Any

import pytest
from ray.serve._private.build_app import build_app

from benchmarks.paced import Pace
from benchmarks.paced_cluster import application


@pytest.mark.parametrize(("routed", "router"), [(True, "ReplicaRouter"), (False, "PowerOfTwoChoicesRequestRouter")])
def test_the_baseline_has_serves_own_router(routed: bool, router: str) -> None:
    built = build_app(application(Pace(), 2, routed=routed), name="paced", default_runtime_env={})
    configs: dict[str, Any] = {deployment.name: deployment._deployment_config for deployment in built.deployments}
    assert configs["StableDiffusion"].num_replicas == 2
    assert configs["StableDiffusion"].request_router_config.request_router_class.endswith(f":{router}")
