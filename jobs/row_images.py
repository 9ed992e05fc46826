"""The columns `image`, `mask` and `strength` of a prompts file: what a row begins from, and what of it is redrawn.

An image is the path of a file, relative to the prompts file, or the content of one. The head reads its header alone;
the worker decodes it. So a path must mean the same file on all hosts.
"""

import base64
import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from app.api.fields import share
from app.api.images_in.decode import mask_of, pixels_of
from app.api.images_in.headers import BadImage, Header, read_header
from app.api.images_in.sizes import nearest_size
from app.api.settings import Service
from app.types import Edit, InvalidField, Size

COLUMNS = ("image", "mask", "strength")


@dataclasses.dataclass(frozen=True)
class RowImages:
    image: str | bytes  # a path, or the content of a file
    mask: str | bytes | None
    strength: float | None  # None: the model's own

    @classmethod
    def of(cls, fields: Mapping[str, Any], folder: Path, service: Service) -> "tuple[RowImages | None, dict[str, Any]]":
        """The images of a row, and its other fields, with the size that fits the image. Raises InvalidField."""
        others = {name: value for name, value in fields.items() if name not in COLUMNS}
        if fields.get("image") is None:
            if alone := [name for name in COLUMNS if fields.get(name) is not None]:
                raise InvalidField(alone[0], f"{alone[0]} needs an image in the same row.")
            return None, others
        if not service.capabilities.edits:
            raise InvalidField("image", "image needs edits: true in the config.", "unsupported_parameter")
        strength = None if fields.get("strength") is None else share("strength", fields["strength"], service)
        mask = None if fields.get("mask") is None else located("mask", fields["mask"], folder)
        images = cls(located("image", fields["image"], folder), mask, strength)
        header = images.header("image", service)
        if images.mask is not None and images.header("mask", service).size != header.size:
            raise InvalidField("mask", "mask must have the size of the image, {}x{}.".format(*header.size))
        if others.get("size") in (None, "auto"):
            others["size"] = nearest_size(header.size, service.sizes)
        return images, others

    def header(self, name: str, service: Service | None = None) -> Header:
        """Of `image` or `mask`. Raises InvalidField."""
        try:
            header = read_header(self.content(name))
        except BadImage as error:
            raise InvalidField(name, f"{name} {error}.") from None
        if service and header.size[0] * header.size[1] > (most := service.limits.input_pixels):
            raise InvalidField(name, "{} must have at most {} pixels, got {}x{}.".format(name, most, *header.size))
        return header

    def content(self, name: str) -> bytes:
        value = getattr(self, name)
        try:
            return Path(value).read_bytes() if isinstance(value, str) else bytes(value)
        except OSError as error:
            raise InvalidField(name, f"{name} {value} cannot be read: {error.strerror or error}.") from None

    @property
    def digest(self) -> list[str | float | None]:
        """What of them the pictures depend on."""
        names = [name for name in ("image", "mask") if getattr(self, name) is not None]
        return [*(hashlib.sha256(self.content(name)).hexdigest() for name in names), self.strength]

    def edit(self, size: Size) -> Edit:
        """Decoded. Raises InvalidField."""
        name = "image"
        try:
            image = pixels_of(self.header("image"), size)
            name = "mask"
            return Edit(image, None if self.mask is None else mask_of(self.header("mask"), size), self.strength)
        except BadImage as error:
            raise InvalidField(name, f"{name} {error}.") from None

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        encoded = {
            name: [base64.b64encode(value).decode()] if isinstance(value, bytes) else value
            for name, value in (("image", self.image), ("mask", self.mask))
        }
        return {**encoded, "strength": self.strength}

    @classmethod
    def of_plain(cls, fields: Mapping[str, Any]) -> "RowImages":
        image, mask = (
            base64.b64decode(value[0]) if isinstance(value, list) else value
            for value in (fields["image"], fields["mask"])
        )
        return cls(image, mask, fields["strength"])


def located(name: str, value: object, folder: Path) -> str | bytes:
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise InvalidField(name, f"{name} must be the path of a file, or its bytes, got {type(value).__name__}.")
    return str((folder / value).absolute())
