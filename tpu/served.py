"""What is compiled, in plain values. Imports no JAX, which reads its environment when it is imported."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Served:
    """What of a serve config decides what is compiled."""

    model: str
    dtype: str
    sizes: tuple[tuple[int, int], ...]
    batch_buckets: tuple[int, ...]
    decode_buckets: tuple[int, ...] | None
    max_steps: int
