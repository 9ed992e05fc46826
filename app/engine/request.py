"""Requests and their images, with the status of each. Only the functions in this module change a status.

Plain data. Knows nothing of the order of requests, of threads, clocks or devices; whoever owns a request guards it.
"""

import dataclasses
import enum
import math
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import Any

import numpy as np

from app.diffusion.samplers import SamplerTable
from app.types import SEEDS, ActiveSlot, Generation, Size

OnPreview = Callable[[int, np.ndarray], None]  # gets a number from 0 and the image so far, uint8 [H, W, 3]


class Status(enum.Enum):
    WAITING = "waiting"  # has no slot yet
    RUNNING = "running"  # has a slot, also while shorter work overtakes it
    DECODING = "decoding"  # has left its slot; the pixels are on their way to the host
    MOVED = "moved"  # has left this engine between two steps; another goes on with it
    FINISHED = "finished"  # completed, failed or cancelled


@dataclasses.dataclass(frozen=True)
class Generated:
    """The images of one request and what it took to make them."""

    pixels: np.ndarray  # uint8 [n, H, W, 3]
    seeds: tuple[int, ...]
    sampler: str
    prompt_truncated: bool
    negative_prompt_truncated: bool
    queue_s: float  # until the device begins the first image's first step
    denoise_s: float  # from there until the device ends the last image's last step, with pauses
    decode_s: float  # from there to pixels on the host
    device_s: float  # its share of the steps and decodes that it took part in, as measured


@dataclasses.dataclass(eq=False)
class Image:
    """One image of a request."""

    request: "Request"
    number: int  # from 0 to n - 1
    steps_left: int
    status: Status = Status.WAITING
    slot: int | None = None  # while it is running
    previews_due: list[int] = dataclasses.field(default_factory=list)  # values of `steps_left`, falling
    last_dispatch: Any = None  # the engine's dispatch that has its last step here
    moving: bytes = b""  # what another engine made of it, until it has a slot
    unpacked: Any = None  # of the same, as the pipeline takes it

    @property
    def active_slot(self) -> ActiveSlot:
        """Of a running image, for a step."""
        assert self.slot is not None
        return ActiveSlot(self.slot, self.request.guided, self.request.looks)


@dataclasses.dataclass(eq=False)
class Request:
    generation: Generation
    table: SamplerTable
    since: float  # when it was submitted
    on_preview: OnPreview | None = None
    ahead_s: float = 0.0  # device-seconds by which it goes ahead of another one that came at the same time
    future: "Future[Generated]" = dataclasses.field(default_factory=Future)
    images: list[Image] = dataclasses.field(default_factory=list)  # the waiting and the running ones
    encoded: tuple[Any, Any] | None = None  # prompt and negative prompt
    encoded_image: Any = None  # what a pipeline made of the images of an edit
    stretch: float = 1.0  # how many times as long a step takes as one of a request that looks at no images
    began: float | None = None  # when its first image got a slot
    stepped: float = math.inf  # when the device began the first step
    counted: bool = True  # in the outcomes of requests
    leaving: bool = False  # it is to leave as soon as all its images are between two steps
    moved: bool = False
    truncated: tuple[bool, bool] = (False, False)  # the prompt and the negative prompt, once they are encoded
    denoised: float = 0.0  # when the device ended the last step of the images that were received
    device_s: float = 0.0
    previews: int = 0  # made so far
    pixels: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(
        cls,
        generation: Generation,
        table: SamplerTable,
        since: float,
        previews: int = 0,
        on_preview: OnPreview | None = None,
        ahead_s: float = 0.0,
    ) -> "Request":
        """Makes a waiting request. Its previews are due at even intervals, at most one after each step but the last."""
        request, steps = cls(generation, table, since, on_preview, ahead_s), len(table)
        due = sorted({steps - round(steps * (i + 1) / (previews + 1)) for i in range(previews)} - {0, steps})
        request.images = [Image(request, number, steps, previews_due=due[:]) for number in range(generation.n)]
        return request

    @property
    def status(self) -> Status:
        """The end of the future finishes a request, as clients may cancel it at any time."""
        if self.moved:
            return Status.MOVED
        if self.future.done():
            return Status.FINISHED
        if self.began is None:
            return Status.WAITING
        return Status.RUNNING if self.images else Status.DECODING

    def __str__(self) -> str:
        """Such as 'seed 7 at 512x512, running, steps left: 3 and 20'."""
        left = " and ".join(str(image.steps_left) for image in self.images) or "none"
        return (
            f"seed {self.generation.seed} at {'x'.join(map(str, self.size))}, {self.status.value}, steps left: {left}"
        )

    @property
    def size(self) -> Size:
        return self.generation.width, self.generation.height

    @property
    def guided(self) -> bool:
        return self.generation.guided

    @property
    def looks(self) -> bool:
        """Whether steps of its images read reference images."""
        return self.generation.references > 0

    @property
    def rows(self) -> int:
        """The rows of the denoiser in a step of one image."""
        return self.generation.rows

    @property
    def images_to_encode(self) -> int:
        """Of an edit: those that must be encoded before its next image gets a slot."""
        edit = self.generation.edit
        if edit is None or self.encoded_image is not None:
            return 0
        return edit.images if any(image.status is Status.WAITING and not image.moving for image in self.images) else 0

    @property
    def texts(self) -> tuple[str, str]:
        return self.generation.prompt, self.generation.negative_prompt

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple((self.generation.seed + i) % SEEDS for i in range(self.generation.n))

    @property
    def between_steps(self) -> bool:
        """Whether no image is denoised and not decoded yet, so that all are here or on the host."""
        on_host = len(self.pixels) + len(self.images) == self.generation.n
        return on_host and all(image.steps_left for image in self.images)

    # Changes of status, in the order in which they happen.

    def begin(self, image: Image, slot: int, now: float) -> None:
        """waiting -> running."""
        assert image.status is Status.WAITING
        image.status, image.slot = Status.RUNNING, slot
        if self.began is None:
            self.began = now

    def move(self) -> None:
        """waiting or running -> moved, before the future ends: no image may begin or go on meanwhile."""
        self.moved = True

    def advance(self, image: Image, steps: int) -> None:
        """A running image takes `steps`."""
        assert image.status is Status.RUNNING
        image.steps_left -= steps

    def next_preview(self, image: Image) -> int:
        """Returns the number of the preview that is due, and counts it as made."""
        image.previews_due.pop()
        self.previews += 1
        return self.previews - 1

    def leave_slot(self, image: Image) -> int:
        """running -> decoding. Returns the slot, which is free now."""
        assert image.status is Status.RUNNING and image.slot is not None
        slot, image.slot = image.slot, None
        image.status = Status.DECODING
        self.images.remove(image)
        return slot

    def receive(self, image: Image, pixels: np.ndarray, denoised: float) -> bool:
        """decoding -> finished. Returns whether the request has all its images now."""
        image.status = Status.FINISHED
        self.pixels[image.number] = self.shown(pixels)
        self.denoised = max(self.denoised, denoised)
        return len(self.pixels) == self.generation.n

    def shown(self, pixels: np.ndarray) -> np.ndarray:
        """What a client gets: outside a mask the pixels of its own image, which a VAE only comes close to."""
        edit = self.generation.edit
        if edit is None or edit.mask is None or edit.image is None:
            return pixels
        return np.where(edit.mask[..., None], pixels, edit.image)

    def leave(self) -> list[int]:
        """waiting or running -> finished, for all images. Returns the slots, which are free now."""
        slots = [image.slot for image in self.images if image.slot is not None]
        for image in self.images:
            image.status, image.slot = Status.FINISHED, None
        self.images.clear()
        return slots

    def end(self, outcome: Generated | BaseException) -> None:
        """Sets the outcome of the future, unless the client has cancelled it, perhaps at this very moment."""
        try:
            if isinstance(outcome, BaseException):
                self.future.set_exception(outcome)
            else:
                self.future.set_result(outcome)
        except InvalidStateError:
            pass

    def generated(self, default_sampler: str, now: float) -> Generated:
        assert self.stepped < math.inf
        return Generated(
            pixels=np.stack([self.pixels[number] for number in range(self.generation.n)]),
            seeds=self.seeds,
            sampler=self.generation.sampler or default_sampler,
            prompt_truncated=self.truncated[0],
            negative_prompt_truncated=self.truncated[1],
            queue_s=self.stepped - self.since,
            denoise_s=self.denoised - self.stepped,
            decode_s=now - self.denoised,
            device_s=self.device_s,
        )
