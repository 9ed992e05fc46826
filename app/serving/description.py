"""What a replica says of itself: the model that it serves, its statistics, its name, its node and its devices."""

import os
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.serve.exceptions import RayServeException

from app.api.messages import Description
from app.engine.engine import Engine
from app.serving.startup import Startup

if TYPE_CHECKING:  # it imports JAX
    from app.diffusion.pipeline import Pipeline


def description_of(pipeline: "Pipeline", name: str) -> Description:
    return Description(
        tuple(pipeline.samplers),
        pipeline.default_sampler,
        name,
        tuple(f"{width}x{height}" for width, height in pipeline.sizes),
        pipeline.notes,
        pipeline.request_defaults.num_inference_steps,
        pipeline.request_defaults.guidance_scale,
        pipeline.request_fields,
        pipeline.capabilities,
    )


def stats_of(engine: Engine, startup: Startup, compiles_after_ready: int) -> dict[str, Any]:
    """What GET /v1/stats has of one replica."""
    return {
        "replica": replica_id(),
        "node": node_id(),
        **engine.stats(),
        "compiles_after_ready": compiles_after_ready,
        "ready_s": startup.ready_s,
        "milestones": dict(startup.milestones),
        "device": device(),
        "pid": os.getpid(),
    }


def device() -> str:
    """Such as 'TPU v5 lite x4'. A replica has all devices of its host."""
    import jax

    devices = jax.local_devices()
    return f"{devices[0].device_kind} x{len(devices)}"


def replica_id() -> str:
    try:
        return serve.get_replica_context().replica_tag
    except RayServeException:  # outside Serve
        return "local"


def node_id() -> str:
    return ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
