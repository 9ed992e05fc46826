"""What requests cost on a replica, from the cost models that it reports. Seconds of the device, predicted.

A decode counts as the steps that take as long, so that one number says what is left of an image.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from app.api.messages import SizeCosts
from app.diffusion.samplers import evaluations
from app.engine.cost_model import DecodeCost, StepCost
from app.engine.scheduler import AGEING
from app.types import Generation

GAIN = 0.05  # a larger bucket counts as worthwhile if rows per second rise by this


@dataclass(frozen=True)
class Work:
    """A request as the queue sees it: its images are alike, and each has `rows` rows in a step."""

    size: str  # "512x512"
    images: int
    rows: int
    steps: int  # evaluations of the denoiser

    @classmethod
    def of(cls, generation: Generation) -> "Work":
        steps = evaluations(generation.sampler, generation.num_inference_steps)
        return cls(f"{generation.width}x{generation.height}", generation.n, generation.rows, steps)


class SizeModel:
    """The cost model of one size on one replica."""

    def __init__(self, costs: SizeCosts):
        self.step = StepCost(costs.step_s, costs.launch_s)
        self.decode = DecodeCost(costs.decode_s)
        self.image_s, self.row_s = self.decode.image_s(), self.step.row_s()
        self.rows_at_once = rows_at_once(costs.step_s)
        self.slots = max(costs.step_s)  # of images: twice the largest batch, like the rows of the largest bucket

    def step_s(self, rows: int) -> float:
        return self.step.step_s(min(rows, self.rows_at_once))

    def steps(self, work: Work) -> float:
        """The steps of one image and those that its decode counts as."""
        return work.steps + self.image_s / (work.rows * self.row_s)

    def device_s(self, work: Work, steps: float | None = None) -> float:
        """Device-seconds of the whole request, or of `steps` steps that its images have left together."""
        total = work.images * self.steps(work) if steps is None else steps
        return total * work.rows * self.row_s

    def alone_s(self, work: Work) -> float:
        """The seconds of a request on an idle replica."""
        at_once = max(1, self.rows_at_once // work.rows)
        rounds = -(-work.images // at_once)
        rows = work.rows * min(work.images, at_once)
        return rounds * (self.step.launch_s(rows) + work.steps * self.step_s(rows)) + work.images * self.image_s


def rows_at_once(step_s: Mapping[int, float]) -> int:
    """The rows that a busy replica puts into a step: each larger bucket must be worthwhile, as in the engine."""
    best, best_rate = min(step_s), 0.0
    for rows in sorted(step_s):
        if rows / step_s[rows] > best_rate * (1 + GAIN):
            best, best_rate = rows, rows / step_s[rows]
    return best


def rank(device_s: float, since: float) -> float:
    """The order of the queue: remaining device-seconds with ageing, as inside the engine. The lowest goes first."""
    return device_s + AGEING * since
