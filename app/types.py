"""The plain data that the packages of the app share. Imports neither JAX nor Ray, and nothing of the app."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

Size = tuple[int, int]  # width and height, in pixels
SEEDS = 2**32  # seeds are 32-bit: image i of a request uses (seed + i) % SEEDS
# Slots of a size for each image of the largest batch: a request that shorter work overtakes stays in its slot.
SLOTS_PER_IMAGE = 2
Dtype = Literal["float32", "bfloat16"]  # of the networks; samplers compute in float32
Sharded = Literal["text_encoders", "denoiser", "vae"]  # networks whose weights the chips of a host may divide
Pixels: TypeAlias = npt.NDArray[np.uint8]  # [height, width, 3], sRGB
Mask: TypeAlias = npt.NDArray[np.bool_]  # [height, width], true where an image is redrawn


@dataclass(frozen=True)
class PipelineSpec:
    """A model and every shape that is compiled for it. Raises ValueError for values that no checkpoint allows."""

    model: str  # a folder in diffusers layout, one .safetensors file, or a Hugging Face repo id
    sizes: tuple[Size, ...]  # the first is the default
    batch_buckets: tuple[int, ...]  # how many images share a step
    max_steps: int  # the largest num_inference_steps
    decode_buckets: tuple[int, ...] = ()  # how many images are decoded together; (): derived from batch_buckets
    revision: str | None = None  # of a repo id; None: its main branch
    variant: str | None = None  # of the files with weights, such as fp16
    tokenizer: str | None = None  # of one file, which has none: a folder, or a repo id
    dtype: Dtype = "float32"
    shard_weights: Literal["auto"] | tuple[Sharded, ...] = "auto"  # which the chips of a host divide; auto: by memory
    # Whether the chips of a host divide an image where a step has fewer rows than chips; auto: where the model can.
    shard_images: bool | Literal["auto"] = "auto"
    edits: bool = False  # whether requests may have images; this loads the VAE's encoder and compiles its programs
    references: int | None = None  # most images that a request may look at; None: one, if the model looks at any
    programs: Path | None = None  # folder of compiled programs; None: each start compiles

    def __post_init__(self) -> None:
        if not self.sizes or any(side < 1 for size in self.sizes for side in size):
            raise InvalidField("sizes", f"sizes must be pairs of a width and a height of at least 1, got {self.sizes}.")
        if not self.batch_buckets or min(self.batch_buckets) < 1:
            raise InvalidField(
                "batch_buckets", f"batch_buckets must be numbers of at least 1, got {self.batch_buckets}."
            )
        batch_buckets = tuple(sorted(set(self.batch_buckets)))
        # A finished image waits for no other, so few are decoded together.
        few = [bucket for bucket in batch_buckets if bucket <= 4] or [batch_buckets[0]]
        decode_buckets = tuple(sorted(set(self.decode_buckets or few)))
        object.__setattr__(self, "batch_buckets", batch_buckets)
        object.__setattr__(self, "decode_buckets", decode_buckets)
        if decode_buckets[0] < 1:
            raise InvalidField("decode_buckets", f"decode_buckets must be numbers of at least 1, got {decode_buckets}.")
        if decode_buckets[-1] > self.num_slots:
            raise InvalidField(
                "decode_buckets",
                f"decode_buckets must be at most {self.num_slots}, twice the largest of batch_buckets, "
                f"got {decode_buckets[-1]}.",
            )
        if self.references is not None and not self.edits:
            raise InvalidField("references", f"references must be left out without edits, got {self.references}.")
        if self.references is not None and self.references < 1:
            raise InvalidField("references", f"references must be at least 1, got {self.references}.")
        if self.max_steps < 1:
            raise InvalidField("max_steps", f"max_steps must be at least 1, got {self.max_steps}.")
        if self.dtype not in get_args(Dtype):
            raise InvalidField("dtype", f"dtype must be one of {', '.join(get_args(Dtype))}, got {self.dtype}.")

    @property
    def num_slots(self) -> int:
        """Slots of each size."""
        return SLOTS_PER_IMAGE * self.batch_buckets[-1]

    @property
    def row_buckets(self) -> tuple[int, ...]:
        """How many rows a step may have: a guided image is two rows, an unguided one is one."""
        return tuple(sorted({rows for images in self.batch_buckets for rows in (images, 2 * images)}))


@dataclass(frozen=True)
class Capabilities:
    """What a served model can make: GET /v1/models reports it. `edits`, `masks` and `references` say what a request
    may have beside its prompt."""

    generations: bool = True  # images of a prompt alone
    edits: bool = False  # an image to begin from
    masks: bool = False  # a mask of that image
    references: int = 0  # how many images a request may look at, the one to begin from among them
    strength: float = 0.8  # of an edit that names none
    mask_strength: float = 1.0  # of an edit with a mask that names none

    def looked_at(self, edit: "Edit") -> "tuple[Pixels, ...]":
        """The images that the denoiser gets as tokens, in their order. A model that looks at images also looks at the
        one that a picture begins from, as Flux2KleinInpaintPipeline has it."""
        if not self.references or edit.image is None:
            return edit.references
        return edit.image, *edit.references


@dataclass(frozen=True, eq=False)
class Edit:
    """The images that a request begins from or looks at. Raises InvalidField for what no model could take.

    The arrays are never changed. Pickle and Ray carry them as plain buffers.
    """

    image: Pixels | None = None  # of the request's size; None: the request begins from noise
    mask: Mask | None = None  # of the request's size; None: all of the image may change
    strength: float | None = None  # the share of the steps that is taken; None: the model's default
    references: tuple[Pixels, ...] = ()  # each of one of the declared sizes

    @property
    def images(self) -> int:
        """How many are encoded."""
        return (self.image is not None) + len(self.references)

    def __post_init__(self) -> None:
        for name, image in (("image", self.image), *(("references", image) for image in self.references)):
            if image is not None and (image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3):
                raise InvalidField(
                    name, f"{name} must be uint8 [height, width, 3], got {image.dtype} {list(image.shape)}."
                )
        if self.image is None and not self.references:
            raise InvalidField("image", "image must not be missing from an edit without reference images.")
        if self.mask is not None and (self.image is None or self.mask.shape != self.image.shape[:2]):
            raise InvalidField("mask", "mask must have an image of its own height and width.")
        if self.mask is not None and self.mask.dtype != np.bool_:
            raise InvalidField("mask", f"mask must be boolean, got {self.mask.dtype}.")
        if self.strength is not None and not 0 < self.strength <= 1:
            raise InvalidField("strength", f"strength must be above 0 and at most 1, got {self.strength:g}.")


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
    fields: tuple[tuple[str, tuple[int, int]], ...] = ()  # names and values of fields that only some models have
    edit: Edit | None = None  # None: the images are made of the prompt alone
    guidance_embedded: bool = False  # the denoiser takes the guidance scale as a number, known only to the replica
    references: int = 0  # how many images the denoiser looks at

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1 and not self.guidance_embedded

    @property
    def rows(self) -> int:
        """The rows of the denoiser in a step of one image: unconditional and conditional where it is guided."""
        return 1 + self.guided

    def parts(self, images: int) -> "list[Generation]":
        """Requests for at most `images` images each that make the same images together, in their order."""
        return [
            replace(self, n=min(images, self.n - first), seed=(self.seed + first) % SEEDS)
            for first in range(0, self.n, images)
        ]


class RequestDefaults(NamedTuple):
    """Numbers of a request that names none, as a checkpoint's files speak for them."""

    num_inference_steps: int = 20
    guidance_scale: float = 7.5


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
    looks: bool = False  # at reference images, which only some programs read

    @property
    def rows(self) -> int:
        return 1 + self.guided


@dataclass(frozen=True)
class MovingImage:
    """An unfinished image of a request that has left an engine."""

    number: int  # from 0 to n - 1
    steps_left: int
    previews_due: tuple[int, ...]  # values of `steps_left`, falling
    slot: bytes  # what a pipeline packed of its slot; empty if it had none yet


@dataclass(frozen=True)
class Resumed:
    """A request that had begun, as it left an engine between two steps. Another of the same model goes on with it."""

    images: tuple[MovingImage, ...]  # the unfinished ones
    pixels: tuple[tuple[int, bytes], ...]  # the finished ones: number, and uint8 [H, W, 3] row by row
    previews: int  # made so far
    truncated: tuple[bool, bool]  # the prompt, the negative prompt
    queue_s: float | None  # before its first step; None if nobody has seen that step's end
    device_s: float


class DispatchCost(NamedTuple):
    """What it costs the host to dispatch steps. If it `blocks`, the call returns when the device is done: its seconds
    are then part of the launch, and `host_s` is 0."""

    blocks: bool = False
    host_s: float = 0.0


def parse_size(text: str) -> Size:
    """'512x384' -> (512, 384)."""
    width, height = text.split("x")
    return int(width), int(height)
