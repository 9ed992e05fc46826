"""Rules for replicas that ask for NVIDIA GPUs with `num_gpus`. Knows nothing of clusters."""

from collections.abc import Iterator

from app.builders import Args
from app.serving.replica import StableDiffusion
from cluster.config.documents import Finding
from cluster.config.serve_config import Application, Deployment

PLATFORMS = ("runtime_env", "env_vars", "JAX_PLATFORMS")


def check_options(deployment: Deployment) -> Iterator[Finding]:
    """Ray takes processors and GPUs as options of their own, and refuses them among the resources."""
    for name, option in (("CPU", "num_cpus"), ("GPU", "num_gpus")):
        if name in deployment.actor.resources:
            yield deployment.error(("ray_actor_options", "resources", name), f"must be given as {option}.")


def check_gpu_count(deployment: Deployment) -> Iterator[Finding]:
    """JAX takes most of a GPU's memory when it starts, so replicas cannot share one."""
    key, gpus = ("ray_actor_options", "num_gpus"), deployment.gpus
    if gpus % 1:
        yield deployment.error(key, f"must be a whole number, as a replica takes the memory of its GPU, got {gpus:g}.")
    elif gpus and deployment.actor.resources.get("TPU"):
        yield deployment.error(key, f"must be 0 beside TPU, as a replica computes on one of both, got {gpus:g}.")


def check_gpu_platform(app: Application, args: Args) -> Iterator[Finding]:
    """With JAX_PLATFORMS=cuda,cpu a GPU that does not answer is an error; JAX alone would fall back to the CPU."""
    model = app.deployment(StableDiffusion)
    if not model or not model.gpus:
        return
    of_model = model.at("ray_actor_options", *PLATFORMS)
    platforms = str(app.at(*PLATFORMS) or "" if of_model is None else of_model)
    if platforms.partition(",")[0] != "cuda":
        text = (
            f"lack {'.'.join(PLATFORMS)}: cuda,cpu, so JAX falls back to the CPU in silence where CUDA fails, and "
            "always on the local cluster."
        )
        yield model.advice(("ray_actor_options",), text)


def check_gpu_dtype(app: Application, args: Args) -> Iterator[Finding]:
    model = app.deployment(StableDiffusion)
    if model and model.gpus and args.dtype == "float32":
        text = "is float32, which cuDNN's fused attention does not take: with bfloat16 a step takes about half as long."
        yield app.advice(("args", "dtype"), text)
