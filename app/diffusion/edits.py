"""What the images of a request ask of a model, before anything runs on a device. Needs no JAX."""

from collections.abc import Sequence
from dataclasses import replace

from app.types import Capabilities, Edit, Generation, InvalidField, Size


def check_edit(generation: Generation, capabilities: Capabilities, sizes: Sequence[Size]) -> None:
    """Raises InvalidField for images that the model does not take, or for none where it needs one."""
    edit = generation.edit
    if edit is None:
        if not capabilities.generations:
            raise InvalidField("image", "image must be there, with a mask: this model only fills masks.")
        return
    if not capabilities.generations and edit.mask is None:
        raise InvalidField("mask", "mask must be there: this model only fills masks.")
    refused = [
        ("image", edit.image is not None and not capabilities.edits),
        ("mask", edit.mask is not None and not capabilities.masks),
        ("references", bool(edit.references) and not capabilities.references),
    ]
    for name, unable in refused:
        if unable:
            raise InvalidField(
                name, f"{name} is not something this server takes; leave it out.", "unsupported_parameter"
            )
    if (images := len(capabilities.looked_at(edit))) > capabilities.references:
        rule = f"at most {capabilities.references}, the image to begin from among them"
        raise InvalidField("references", f"references must be {rule}, got {images}.")
    check_sizes_of(edit, (generation.width, generation.height), sizes)


def resolved(edit: Edit | None, capabilities: Capabilities) -> Edit | None:
    """With the model's own strength where the request names none. Reference images alone have none."""
    if edit is None or edit.image is None or edit.strength is not None:
        return edit
    return replace(edit, strength=capabilities.strength if edit.mask is None else capabilities.mask_strength)


def check_sizes_of(edit: Edit, size: Size, sizes: Sequence[Size]) -> None:
    """Programs are compiled for the declared sizes alone, so whoever reads files scales the images."""
    if edit.image is not None and edit.image.shape[:2] != size[::-1]:
        height, width = edit.image.shape[:2]
        raise InvalidField("image", f"image must have the size {size[0]}x{size[1]}, got {width}x{height}.")
    for reference in edit.references:
        height, width = reference.shape[:2]
        if (width, height) not in sizes:
            declared = ", ".join(f"{width}x{height}" for width, height in sizes)
            raise InvalidField("references", f"references must have one of the sizes {declared}, got {width}x{height}.")
