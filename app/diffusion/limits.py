"""What a checkpoint can draw of the sizes and edits that a config declares, and of what a request wants.

Needs no JAX. What samplers can do is in app/diffusion/samplers/.
"""

from collections.abc import Sequence
from dataclasses import replace

from app.diffusion.edits import check_edit, resolved
from app.diffusion.families.family import Family
from app.types import Capabilities, Generation, InvalidField, PipelineSpec, Size


def check_sizes(spec: PipelineSpec, family: Family) -> None:
    """Raises ValueError that names a size that the checkpoint cannot have, or cannot divide as the config wants."""
    multiple = family.size_multiple
    for width, height in spec.sizes:
        if width % multiple or height % multiple:
            raise ValueError(
                f"sizes must have a width and a height that are multiples of {multiple} for this checkpoint, "
                f"got {width}x{height}."
            )
        if spec.shard_images is True and not family.divides_images("denoise", (width, height), 2):
            raise ValueError(
                "shard_images must be auto or false for this checkpoint, "
                f"whose denoiser cannot divide images of {width}x{height} over chips, got true."
            )


def capabilities_of(family: Family, spec: PipelineSpec) -> Capabilities:
    """Raises ValueError where the config turns edits on that the model cannot make, or off where it makes no others."""
    able, references = family.capabilities, references_of(family, spec)
    if spec.edits and not able.edits:
        raise ValueError(f"edits must be false for a {type(family).__name__}, which encodes no images, got true.")
    if not spec.edits and not able.generations:
        raise ValueError("edits must be true for this checkpoint, whose UNet only fills masks, got false.")
    return replace(able, references=references) if spec.edits else Capabilities()


def references_of(family: Family, spec: PipelineSpec) -> int:
    """How many images a request may look at. Raises ValueError for more than the model takes."""
    most = family.capabilities.references
    if spec.references is not None and spec.references > most:
        rule = f"at most {most}" if most else "left out"
        raise ValueError(f"references must be {rule} for a {type(family).__name__}, got {spec.references}.")
    return min(most, spec.references or 1) if spec.edits else 0


def checked(generation: Generation, family: Family, capabilities: Capabilities, sizes: Sequence[Size]) -> Generation:
    """The request as the checkpoint follows it. Raises InvalidField for one that it cannot follow."""
    family.check(generation)
    check_edit(generation, capabilities, sizes)
    for name, _ in generation.fields:
        if name not in family.FIELDS:
            raise InvalidField(name, f"{name} is not a field of this model; leave it out.", "unsupported_parameter")
    edit = resolved(generation.edit, capabilities)
    references = len(capabilities.looked_at(edit)) if edit else 0
    return replace(generation, edit=edit, guidance_embedded=family.embeds_guidance, references=references)
