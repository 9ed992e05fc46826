"""What requests cost on a replica, from the cost models that it reports. Seconds of the device, predicted.

A decode, and the encode of the images that a request comes with, count as the steps that take as long. So one number
says what is left of an image.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from app.api.messages import SizeCosts
from app.diffusion.samplers import evaluations
from app.engine.cost_model import DecodeCost, StepCost
from app.types import Generation

GAIN = 0.05  # a larger bucket counts as worthwhile if rows per second rise by this


@dataclass(frozen=True)
class Work:
    """A request as the queue sees it: its images are alike, and each has `rows` rows in a step."""

    size: str  # "512x512"
    images: int
    rows: int
    steps: int  # evaluations of the denoiser
    encodes: int = 0  # of images that the request comes with
    looks: bool = False  # at reference images, which makes its steps longer

    @classmethod
    def of(cls, generation: Generation) -> "Work":
        steps, edit = evaluations(generation.sampler, generation.num_inference_steps), generation.edit
        size, looks = f"{generation.width}x{generation.height}", generation.references > 0
        if edit and edit.strength is not None:
            steps = max(1, round(steps * edit.strength))
        return cls(size, generation.n, generation.rows, steps, edit.images if edit else 0, looks)


class SizeModel:
    """The cost model of one size on one replica."""

    def __init__(self, costs: SizeCosts):
        self.step = StepCost(costs.step_s, costs.launch_s)
        self.encode_s = costs.encode_image_s
        self.reference_step = StepCost(costs.reference_step_s or costs.step_s, costs.launch_s)
        self.decode = DecodeCost(costs.decode_s)
        self.image_s, self.row_s = self.decode.image_s(), self.step.row_s()
        self.rows_at_once = rows_at_once(costs.step_s)
        self.slots = max(costs.step_s)  # of images: twice the largest batch, like the rows of the largest bucket

    def step_s(self, rows: int) -> float:
        return self.step.step_s(min(rows, self.rows_at_once))

    def steps(self, work: Work) -> float:
        """The steps of one image, and those that its decode and its part of the encodes count as."""
        beside_s = self.image_s + work.encodes * self.encode_s / work.images
        return work.steps * self.stretch(work) + beside_s / (work.rows * self.row_s)

    def stretch(self, work: Work) -> float:
        """How many times as long its steps take as those of a request that looks at no images."""
        return self.reference_step.step_s(work.rows) / self.step.step_s(work.rows) if work.looks else 1.0

    def device_s(self, work: Work, steps: float | None = None) -> float:
        """Device-seconds of the whole request, or of `steps` steps that its images have left together."""
        total = work.images * self.steps(work) if steps is None else steps
        return total * work.rows * self.row_s

    def alone_s(self, work: Work) -> float:
        """The seconds of a request on an idle replica."""
        at_once = max(1, self.rows_at_once // work.rows)
        rounds = -(-work.images // at_once)
        rows = work.rows * min(work.images, at_once)
        steps_s = rounds * (self.step.launch_s(rows) + work.steps * self.stretch(work) * self.step_s(rows))
        return work.encodes * self.encode_s + steps_s + work.images * self.image_s


def rows_at_once(step_s: Mapping[int, float]) -> int:
    """The rows that a busy replica puts into a step: each larger bucket must be worthwhile, as in the engine."""
    best, best_rate = min(step_s), 0.0
    for rows in sorted(step_s):
        if rows / step_s[rows] > best_rate * (1 + GAIN):
            best, best_rate = rows, rows / step_s[rows]
    return best
