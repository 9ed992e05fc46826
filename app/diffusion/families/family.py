"""What a family of models says about itself: the interface of the files beside this one. Imports no JAX.

A family is one file. Everything else takes from it which networks a checkpoint has, how texts become conditioning, how
the denoiser is called, and how latents relate to pixels. CONTRIBUTING.md says how to add a family.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from app.diffusion.models.shapes import Shape
from app.diffusion.samplers import FlowSchedule, Schedule
from app.types import Capabilities, Generation, Mask, RequestDefaults, Size

Array: TypeAlias = Any  # of JAX
Strips: TypeAlias = Any  # app/diffusion/models/strips.py
Networks: TypeAlias = Mapping[str, Any]  # component -> module
Conditioning: TypeAlias = Any  # a pytree of arrays
Json: TypeAlias = Mapping[str, Any]
Role = Literal["encode", "denoise", "decode"]
OUTSIDE = "outside_mask"  # in the conditioning of a denoiser that fills masks: [B, h, w, 1 + C], the mask and latents
REFERENCES = "references"  # in the conditioning of a denoiser that looks at images: References of a row


def read_all(config: Any, tensor: str) -> bool:
    return False


@dataclass(frozen=True)
class Component:
    """A network of a checkpoint: a folder with a config.json and weights."""

    class_name: str  # in model_index.json
    role: Role  # the verb whose programs run it
    read: Callable[[Json, list[str], str], Any]  # content of config.json, problems, its name -> architecture
    tensors: Callable[[Any], dict[str, Shape]]  # architecture -> the tensors of its weights
    network: Callable[..., Any]  # architecture, dtype=, rngs= -> nnx.Module
    stem: str = "diffusion_pytorch_model"  # of its safetensors file
    unread: Callable[[Any, str], bool] = read_all  # architecture, tensor -> whether the network leaves it out
    aliases: tuple[str, ...] = ()  # other classes that save the same weights


@dataclass(frozen=True)
class TokenizerKind:
    class_name: str  # in model_index.json
    load: Callable[[Path, int], Any]  # folder, and tokens of a text -> Tokenizer or ChatTokenizer
    fixed_length: bool  # whether its model_max_length must be the text encoder's number of positions


class Family(Protocol):
    """An instance describes one checkpoint by the architectures of its components.

    Its repr says all that its methods depend on, as it is part of the key of a compiled program. Methods that take
    networks are traced: they get the networks of their role alone.
    """

    PIPELINES: ClassVar[tuple[str, ...]]  # _class_name in model_index.json
    COMPONENTS: ClassVar[Mapping[str, Component]]  # by folder
    TOKENIZERS: ClassVar[Mapping[str, str]]  # folder -> the text encoder that reads its ids
    TOKENIZER: ClassVar[TokenizerKind]  # of each of them
    FIELDS: ClassVar[frozenset[str]]  # of a request, that only some families have
    TRANSFORMER: ClassVar[bool]  # whether the denoiser is all wide matrix products, without convolutions

    @classmethod
    def of(cls, configs: Mapping[str, Any], index: Json) -> "Family":
        """From the architecture of each component and the content of model_index.json."""
        ...

    @classmethod
    def schedule(cls, config: Json) -> tuple[Schedule | FlowSchedule, list[str]]:
        """From the content of scheduler_config.json; and a sentence for each option that is not followed as it stands.

        Raises ValueError that names what cannot be followed.
        """
        ...

    def problems(self) -> list[str]:
        """What components do not agree on."""
        ...

    def check(self, generation: Generation) -> None:
        """Raises InvalidField for a request that the checkpoint cannot follow."""
        ...

    def defaults(self, schedule: Schedule | FlowSchedule) -> RequestDefaults:
        """The numbers of a request that names none, as far as the files say how the checkpoint was trained."""
        ...

    def image_tokens(self, size: Size) -> int | None:
        """How many tokens an image has in the denoiser; None where no schedule depends on it."""
        ...

    @property
    def latent_channels(self) -> int: ...
    @property
    def pixels_per_latent(self) -> int: ...  # along a side
    @property
    def size_multiple(self) -> int: ...  # of pixels, for widths and heights
    @property
    def strip_rows(self) -> int: ...  # rows of latents; the denoiser may cut an image into strips of a multiple

    @property
    def text_lengths(self) -> Mapping[str, int]:
        """Tokens of a text, by tokenizer."""
        ...

    def encode(self, networks: Networks, input_ids: Mapping[str, Array]) -> Conditioning:
        """input_ids [1, T] by tokenizer -> what one text adds to the conditioning, leaves [1, ...]."""
        ...

    def numbers(
        self, size: Size, guidance_scale: float, fields: Mapping[str, Any]
    ) -> dict[str, npt.NDArray[np.float32]]:
        """What a request adds to the dict that `encode` makes: [2, ...], unconditional and conditional.

        `fields` are the request's values of FIELDS. Empty where the request adds nothing.
        """
        ...

    @property
    def zero_negative(self) -> bool:
        """Whether an empty negative prompt is encoded as zeros."""
        ...

    @property
    def embeds_guidance(self) -> bool:
        """Whether the denoiser takes the guidance scale as a number, so that guidance costs no second row."""
        ...

    @property
    def capabilities(self) -> Capabilities:
        """What a server of this checkpoint can make where its config turns edits on. `references` is the most that the
        model was made for: the denoiser gets REFERENCES in steps of pictures that look at images."""
        ...

    @property
    def fills_masks(self) -> bool:
        """Whether the denoiser was trained to fill masks: it gets OUTSIDE, and draws nothing without a mask."""
        ...

    def encode_image(self, networks: Networks, pixels: Array, *, strips: Strips) -> tuple[Array, Array]:
        """Pixels [B, H, W, 3] in [-1, 1] -> float32 mean and deviation [B, h, w, C] of latents as the denoiser knows
        them. It gets the networks that decode. Only where `capabilities` has edits."""
        ...

    def latent_mask(self, mask: Mask) -> npt.NDArray[np.float32]:
        """[H, W], true where the image is redrawn -> [h, w], the share of the latents that is."""
        ...

    def denoise(
        self, networks: Networks, latents: Array, timesteps: Array, conditioning: Conditioning, *, strips: Strips
    ) -> Array:
        """Latents [B, h, w, C], timesteps [B] and conditioning [B, ...] -> the model's output [B, h, w, C]."""
        ...

    def decode(self, networks: Networks, latents: Array, *, strips: Strips) -> Array:
        """Latents [B, h, w, C], as the denoiser knows them -> pixels [B, H, W, 3] around [-1, 1]."""
        ...

    def divides_images(self, verb: Role, size: Size, chips: int) -> bool:
        """Whether `denoise` can have images of this size divided over so many chips, or `decode` and `encode_image`.

        Each has h / chips rows of the latents then, and `strips` says which chips share an image.
        """
        ...


def without_encoder(family: Family) -> Family:
    """The family with a VAE that only decodes, for a server that takes no images."""
    configs = {part: getattr(family, part) for part in family.COMPONENTS}
    decoding = {part: replace(config, encoder=False) for part, config in configs.items() if hasattr(config, "encoder")}
    changed: Family = replace(family, **decoding)  # type: ignore[type-var]
    return changed


def weight_count(family: Family, role: Role) -> int:
    """How many numbers the networks of a role have."""
    total = 0
    for part, component in family.COMPONENTS.items():
        if component.role != role:
            continue
        config = getattr(family, part)
        tensors = component.tensors(config).items()
        total += sum(math.prod(shape) for name, shape in tensors if not component.unread(config, name))
    return total


class FamilyDefaults:
    """What holds for a family that does not say otherwise."""

    FIELDS: ClassVar[frozenset[str]] = frozenset()
    TRANSFORMER: ClassVar[bool] = False

    def check(self, generation: Generation) -> None:
        """Every request can be followed."""

    def defaults(self, schedule: Schedule | FlowSchedule) -> RequestDefaults:
        return RequestDefaults()

    def image_tokens(self, size: Size) -> int | None:
        return None

    def numbers(
        self, size: Size, guidance_scale: float, fields: Mapping[str, Any]
    ) -> dict[str, npt.NDArray[np.float32]]:
        return {}

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities()

    @property
    def fills_masks(self) -> bool:
        return False

    def encode_image(self, networks: Networks, pixels: Array, *, strips: Strips) -> tuple[Array, Array]:
        raise NotImplementedError(f"{type(self).__name__} encodes no images.")

    def latent_mask(self, mask: Mask) -> npt.NDArray[np.float32]:
        """The pixel at the corner of each latent decides, as torch's interpolation to the nearest has it."""
        side = self.pixels_per_latent  # type: ignore[attr-defined]
        return mask[::side, ::side].astype(np.float32)

    @property
    def strip_rows(self) -> int:
        return 1

    def divides_images(self, verb: Role, size: Size, chips: int) -> bool:
        return False

    @property
    def zero_negative(self) -> bool:
        return False

    @property
    def embeds_guidance(self) -> bool:
        return False
