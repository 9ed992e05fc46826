"""Writes what a plan changes in a serve config and in a cluster file, as YAML."""

import math
from pathlib import Path
from typing import Any

import yaml

from capacity.configs import Workload
from capacity.host_costs import label
from capacity.model_names import MODEL_NAMES
from capacity.planner import Plan
from cluster.config.cluster_config import ACCELERATOR_LABEL, RUNTIMES, Slice

ROOM = 32  # of max_ongoing_requests, above what the engine holds, for health questions
SPARE = 1.25  # replicas that the autoscaler may add beyond what the rate needs on average


def serve_fragment(plan: Plan, workload: Workload, rate: float) -> dict[str, Any]:
    """The part of a serve config that the plan changes."""
    assert plan.simulated is not None
    ongoing = rate / plan.hosts * float(plan.simulated.latencies.mean())  # Little's law
    most = plan.slots * len(workload.spec.sizes) + workload.args.max_waiting + ROOM
    return {
        "applications": [
            {
                "args": {
                    "model": MODEL_NAMES.get(workload.spec.model, workload.spec.model),
                    "dtype": workload.spec.dtype,
                    "sizes": [label(size) for size in workload.spec.sizes],
                    "batch_buckets": list(plan.buckets),
                },
                "deployments": [
                    {
                        "name": "StableDiffusion",
                        "max_ongoing_requests": most,
                        "autoscaling_config": {
                            "min_replicas": plan.hosts,
                            "max_replicas": math.ceil(SPARE * plan.hosts),
                            "target_ongoing_requests": max(1, math.ceil(ongoing)),
                        },
                        "ray_actor_options": {"resources": {"TPU": plan.host.chips}},
                    }
                ],
            }
        ]
    }


def cluster_fragment(plan: Plan) -> dict[str, Any]:
    """The part of a cluster file that the plan changes. The zone must have this TPU."""
    most = math.ceil(SPARE * plan.hosts)
    tpu = Slice(plan.host.accelerator_type)
    return {
        "max_workers": most,
        "available_node_types": {
            "ray_tpu": {
                "min_workers": plan.hosts,
                "max_workers": most,
                "resources": {"CPU": 8, "TPU": plan.host.chips},
                "labels": {ACCELERATOR_LABEL: tpu.label},
                "node_config": {"acceleratorType": tpu.name, "runtimeVersion": RUNTIMES[tpu.generation]},
            }
        },
    }


def write_fragments(plan: Plan, workload: Workload, rate: float, folder: Path) -> Path:
    subfolder = folder / plan.host.accelerator_type
    subfolder.mkdir(parents=True, exist_ok=True)
    for name, fragment in (
        ("serve_config.yaml", serve_fragment(plan, workload, rate)),
        ("cluster.yaml", cluster_fragment(plan)),
    ):
        head = f"# `make tpu-plan` for {rate:g} pictures a second, modelled: what to change in your {name}.\n"
        (subfolder / name).write_text(head + yaml.safe_dump(fragment, sort_keys=False), "utf-8")
    return subfolder
