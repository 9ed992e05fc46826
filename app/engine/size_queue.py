"""What the engine keeps for each size: unfinished requests, slots, the device's state and cost models. Plain data."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from app.engine.cost_model import DecodeCost, StepCost
from app.engine.request import Image, Request, Status
from app.engine.verbs import Verbs
from app.types import Size

BUCKET_FILL_DECAY = 0.99  # weight of the earlier dispatches at each new one


@dataclasses.dataclass(eq=False)
class SizeQueue:
    """Images of different sizes never share a step, so each size has a queue of its own."""

    size: Size
    state: Any  # on the device
    step_cost: StepCost
    reference_cost: StepCost | None  # of steps with images that look at others; None: no image does
    decode_cost: DecodeCost
    encode_image_s: float  # of an image that a request begins from
    free_slots: list[int]
    num_slots: int
    gain: float  # the least gain in rows per second that makes a larger bucket worthwhile
    fixed_batch_size: int | None = None  # overrides the cost model
    requests: list[Request] = dataclasses.field(default_factory=list)  # with waiting or running images
    virtual_time: float = 0.0  # device time so far, each part divided by the images in the queue; the least goes next
    expected_arrivals: float = 0.0  # requests that are expected before the device is idle
    batch_size: int = 0
    newcomer_joins: bool = False  # a request that arrived now would share the next step
    steps: int = 0
    rows_active: float = 0.0  # rows of active slots, as a decaying sum
    rows_computed: float = 0.0  # rows of the buckets that held them, likewise

    @classmethod
    def of(cls, size: Size, pipeline: Verbs, gain: float, fixed_batch_size: int | None) -> "SizeQueue":
        buckets = pipeline.row_buckets
        launch_s = {rows: pipeline.launch_s[size, rows] for rows in buckets}
        reference_step_s = {rows: s for (other, rows), s in pipeline.reference_step_s.items() if other == size}
        return cls(
            size,
            pipeline.empty_state(size),
            StepCost({rows: pipeline.step_s[size, rows] for rows in buckets}, launch_s),
            StepCost(reference_step_s, launch_s) if reference_step_s else None,
            DecodeCost({images: pipeline.decode_s[size, images] for images in pipeline.decode_buckets}),
            encode_image_s=pipeline.encode_image_s.get(size, 0.0),
            free_slots=list(range(pipeline.num_slots))[::-1],
            num_slots=pipeline.num_slots,
            gain=gain,
            fixed_batch_size=fixed_batch_size,
        )

    @property
    def name(self) -> str:
        return f"{self.size[0]}x{self.size[1]}"

    def cost_of(self, images: Sequence[Image]) -> StepCost:
        """Of a step that these share. One that looks at others makes the step longer for all."""
        looks = any(image.request.looks for image in images)
        return self.reference_cost if self.reference_cost and looks else self.step_cost

    def stretch_of(self, request: Request) -> float:
        """How many times as long its steps take as those of a request that looks at no images."""
        if self.reference_cost is None or not request.looks:
            return 1.0
        return self.reference_cost.step_s(request.rows) / self.step_cost.step_s(request.rows)

    @property
    def active(self) -> int:
        return self.num_slots - len(self.free_slots)

    @property
    def images(self) -> list[Image]:
        """In no particular order. Denoised images that are not decoded yet are among them."""
        return [image for request in self.requests for image in request.images]

    def count_steps(self, steps: int, rows: int, bucket: int) -> None:
        self.steps += steps
        self.rows_active = self.rows_active * BUCKET_FILL_DECAY + rows
        self.rows_computed = self.rows_computed * BUCKET_FILL_DECAY + bucket

    def remove(self, request: Request) -> None:
        """Takes a request out of its slots and the queue."""
        self.free_slots += request.leave()
        if request in self.requests:
            self.requests.remove(request)

    def stats(self, images: Sequence[Image]) -> dict[str, Any]:
        """Returns plain numbers, for JSON. `images` are those that are not denoised yet."""
        return {
            "step_s": {str(rows): seconds for rows, seconds in self.step_cost.table().items()},
            "launch_s": {str(rows): self.step_cost.launch_s(rows) for rows in self.step_cost.table()},
            "reference_step_s": {
                str(rows): seconds
                for rows, seconds in (self.reference_cost.table() if self.reference_cost else {}).items()
            },
            "encode_image_s": self.encode_image_s,
            "decode_s": {str(images): seconds for images, seconds in self.decode_cost.decode_s.items()},
            "images_at_once": self.batch_size,
            "active": self.active,
            "waiting": sum(image.status is Status.WAITING for image in images),
            "steps": self.steps,
        }


# For each size the images that are not denoised yet, in their order, with new requests at the end.
Queued = Mapping[SizeQueue, Sequence[Image]]
