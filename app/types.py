"""What every room of the app speaks of. Plain data: imports neither JAX nor Ray, and nothing of the app."""

from dataclasses import dataclass
from typing import NamedTuple

Size = tuple[int, int]  # width and height, in pixels
SEEDS = 2**32  # seeds are 32-bit: image i of a request uses (seed + i) % SEEDS
# Slots of a size for each image of the largest batch: a request that shorter work overtakes stays in its slot.
SLOTS_PER_IMAGE = 2


@dataclass(frozen=True)
class Generation:
    """One request, resolved: every field within its limits and nothing left to default but the sampler."""

    prompt: str
    negative_prompt: str
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    seed: int  # of the first image; image i uses (seed + i) % SEEDS
    sampler: str | None  # None: the checkpoint's own, known only to the replica
    n: int


class InvalidField(ValueError):
    """A field of a request, or an argument of the config, has a value that is not allowed.

    `message` is a sentence for the user and `code` one of OpenAI's error codes. It pickles: no argument has a name.
    """

    def __init__(self, field: str, message: str, code: str = "invalid_value") -> None:
        super().__init__(field, message, code)
        self.field = field
        self.message = message
        self.code = code

    def __str__(self) -> str:
        return self.message


class ActiveSlot(NamedTuple):
    """A slot that takes part in a step. A guided one costs two rows of the denoiser: unconditional and conditional."""

    slot: int
    guided: bool

    @property
    def rows(self) -> int:
        return 1 + self.guided


def parse_size(text: str) -> Size:
    """'512x384' -> (512, 384)."""
    width, height = text.split("x")
    return int(width), int(height)
