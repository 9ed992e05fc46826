"""Every program that a pipeline will ever run, with the shapes that it takes. Compiles and runs nothing."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from app.aot.libtpu_flags import transformer_options
from app.aot.program import Program
from app.diffusion.device_programs import (
    DenoiseState,
    Rows,
    decode_program,
    encode_program,
    export_program,
    import_program,
    insert_program,
    preview_program,
    step_program,
)
from app.diffusion.edit_programs import EditInputs, EditState, Outside, encode_image_program, reference_program
from app.diffusion.families.family import Family, Role
from app.diffusion.limits import references_of
from app.diffusion.models.references import References
from app.diffusion.networks import modules_of
from app.diffusion.samplers.table import HISTORY, Coefficients
from app.diffusion.sharding import image_sharding, row_sharding
from app.types import PipelineSpec, Size

ENCODE_TEXTS = 4  # most texts in one dispatch of the text encoder
# XLA for GPU runs a loop whose count is an argument on the host, which reads the condition back before each iteration.
# So a dispatch blocks until the device is done, and no CUDA graph spans the loop. Its programs hold one step or text.
HOST_LOOPS = {"gpu"}


@dataclass(frozen=True)
class Shapes:
    """What the shapes of all programs follow from: the spec, and the checkpoint's family."""

    spec: PipelineSpec
    family: Family
    encoded: Any  # a pytree of jax.ShapeDtypeStruct: what a text becomes

    @property
    def numbers(self) -> dict[str, Any]:
        """What a request adds to the conditioning."""
        numbers = self.family.numbers(self.spec.sizes[0], 1.0, {})
        return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in numbers.items()}

    @property
    def table_rows(self) -> int:
        return 2 * self.spec.max_steps  # heun evaluates the denoiser twice a step

    @property
    def references(self) -> References | None:
        """As jax.ShapeDtypeStruct. Their tokens hold as many images of any declared size as a request may have."""
        images, side = references_of(self.family, self.spec), self.family.pixels_per_latent
        if not images:
            return None
        tokens = images * max(width * height // side**2 for width, height in self.spec.sizes)
        latents = jax.ShapeDtypeStruct((tokens, self.family.latent_channels), jnp.float32)
        return References(latents, jax.ShapeDtypeStruct((tokens, 3), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32))

    def state(self, size: Size) -> DenoiseState:
        """A DenoiseState of jax.ShapeDtypeStruct."""
        width, height = (side // self.family.pixels_per_latent for side in size)
        latents = (height, width, self.family.latent_channels)

        def shape(*shape: int, dtype: Any = jnp.float32) -> Any:
            return jax.ShapeDtypeStruct((self.spec.num_slots, *shape), dtype)

        edit = None
        if self.spec.edits:
            outside = shape(height, width, 1 + self.family.latent_channels) if self.family.fills_masks else None
            references = jax.tree.map(lambda x: shape(*x.shape, dtype=x.dtype), self.references)
            edit = EditState(shape(*latents), shape(height, width), shape(self.table_rows, 2), outside, references)
        texts = jax.tree.map(lambda x: shape(2, *x.shape, dtype=x.dtype), self.encoded)
        numbers = {name: shape(*x.shape, dtype=x.dtype) for name, x in self.numbers.items()}
        return DenoiseState(
            latents=shape(*latents),
            history=shape(HISTORY - 1, *latents),
            conditioning={**texts, **numbers} if numbers else texts,
            guidance_scale=shape(),
            seed=shape(dtype=jnp.uint32),
            step=shape(dtype=jnp.int32),
            timesteps=shape(self.table_rows),
            preview=shape(self.table_rows, 2),
            table=Coefficients(**{name: shape(self.table_rows) for name in "pqan"}, b=shape(self.table_rows, HISTORY)),
            edit=edit,
        )

    def size_of(self, state: DenoiseState) -> Size:
        height, width = state.latents.shape[1:3]
        return width * self.family.pixels_per_latent, height * self.family.pixels_per_latent

    def sharding(self, mesh: Mesh, verb: Role, size: Size, rows: int) -> NamedSharding:
        """Divides rows over the chips, and where chips are left each image, if the config and the family allow it."""

        def divides_images(chips: int) -> bool:
            return self.spec.shard_images is not False and self.family.divides_images(verb, size, chips)

        return image_sharding(mesh, rows, divides_images)

    def slot(self, size: Size) -> DenoiseState:
        """What one slot holds, likewise of jax.ShapeDtypeStruct."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), self.state(size))

    def edit_inputs(self, size: Size) -> EditInputs:
        """What `insert` takes of the images of a request of this size."""
        width, height = (side // self.family.pixels_per_latent for side in size)

        def shape(*shape: int) -> Any:
            return jax.ShapeDtypeStruct(shape, jnp.float32)

        latents, mask = shape(height, width, self.family.latent_channels), shape(height, width)
        outside = Outside(latents, latents, mask) if self.family.fills_masks else None
        levels = shape(self.table_rows, 2)
        return EditInputs(latents, latents, mask, shape(), levels, outside, self.references)


def zeros_of(shapes: Any) -> Any:
    """Arrays on the host for a pytree of jax.ShapeDtypeStruct."""
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)


def label_of(size: Size) -> str:
    """In the names of programs."""
    return f"{size[0]}x{size[1]}"


def step_name(label: str, rows: int, *, looks: bool) -> str:
    """Of a program whose slots may look at reference images, or of the one for steps in which none does."""
    return f"step{' with references' * looks} {label} rows {rows}"


def loops_on_device(mesh: Mesh) -> bool:
    """Whether a program may loop over a number of steps or texts that is known only when it is dispatched."""
    return mesh.devices.flat[0].platform not in HOST_LOOPS


def step_options(family: Family, device: jax.Device) -> dict[str, str]:
    """Of XLA, for the programs that run the denoiser."""
    return transformer_options(device.device_kind) if family.TRANSFORMER else {}


def part_of(family: Family, components: Mapping[str, Any], role: Role) -> dict[str, Any]:
    """Of what is kept by component: the components with this role."""
    return {part: components[part] for part, component in family.COMPONENTS.items() if component.role == role}


def encoded_shapes(family: Family, networks: Mapping[str, Any], params: Mapping[str, Any]) -> Any:
    """What a text becomes, as jax.ShapeDtypeStruct."""
    input_ids = {name: jax.ShapeDtypeStruct((1, length), jnp.int32) for name, length in family.text_lengths.items()}
    encoders = part_of(family, params, "encode")

    def encode(params: Any, input_ids: Any) -> Any:
        return family.encode(modules_of(networks, params), input_ids)

    shapes = jax.eval_shape(encode, encoders, input_ids)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), shapes)


def declared(
    shapes: Shapes, networks: Mapping[str, Any], params: Any, shardings: Any, mesh: Mesh
) -> tuple[Program, ...]:
    """`networks` makes a module of its params, and `shardings` places them; all are by the component's name."""
    spec, everywhere = shapes.spec, NamedSharding(mesh, PartitionSpec())

    def shape(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)

    def program(name: str, function: Callable[..., Any], *arguments: Any, donate: tuple[int, ...] = ()) -> Program:
        return Program(name, function, arguments, donate, out_shardings=everywhere)

    params = jax.tree.map(
        lambda x, placing: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placing), params, shardings
    )
    number, real, rows = shape(dtype=jnp.int32), shape(), shapes.table_rows
    text = jax.tree.map(lambda x: shape(*x.shape, dtype=x.dtype), shapes.encoded)
    coefficients = Coefficients(**{name: shape(rows) for name in "pqan"}, b=shape(rows, HISTORY))
    numbers = {name: shape(*x.shape, dtype=x.dtype) for name, x in shapes.numbers.items()}
    inserted = [
        number,
        text,
        text,
        numbers,
        real,
        shape(dtype=jnp.uint32),
        real,
        shape(rows),
        shape(rows, 2),
        coefficients,
    ]
    texts, counts = (ENCODE_TEXTS, [number]) if loops_on_device(mesh) else (1, [])
    family = shapes.family
    encoders, denoisers, decoders = (part_of(family, params, role) for role in get_args(Role))
    encode, denoise, decode = (part_of(family, networks, role) for role in get_args(Role))
    _, denoisers_placing, decoders_placing = (part_of(family, shardings, role) for role in get_args(Role))
    input_ids = {name: shape(texts, length, dtype=jnp.int32) for name, length in family.text_lengths.items()}
    programs = [program("encode", partial(encode_program, family, encode), encoders, input_ids, *counts)]
    options = step_options(family, mesh.devices.flat[0])
    for size in spec.sizes:
        label = label_of(size)
        state = jax.tree.map(lambda x: shape(*x.shape, dtype=x.dtype), shapes.state(size))
        edits = []
        if spec.edits:
            edits.append(jax.tree.map(lambda x: shape(*x.shape, dtype=x.dtype), shapes.edit_inputs(size)))
            pixels = [shape(*size[::-1], 3, dtype=jnp.uint8)]
            if family.fills_masks:
                pixels.append(shape(*size[::-1], dtype=jnp.bool_))
            # The encoder is of the networks that decode, so what divides a decode divides an encode.
            sharding = shapes.sharding(mesh, "decode", size, 1)
            encode_image = partial(encode_image_program, family, decode, sharding, decoders_placing)
            programs.append(program(f"encode image {label}", encode_image, decoders, *pixels))
        if shapes.references is not None:
            tokens, image = shape(*shapes.references.latents.shape), shape(*state.latents.shape[1:])
            programs.append(program(f"place reference {label}", reference_program, tokens, image, number))
        programs.append(program(f"insert {label}", insert_program, state, *inserted, *edits, donate=(0,)))
        image = jax.tree.map(lambda x: shape(*x.shape, dtype=x.dtype), shapes.slot(size))
        programs.append(program(f"export {label}", export_program, state, number))
        programs.append(program(f"import {label}", import_program, state, number, image, donate=(0,)))
        for bucket in spec.row_buckets:
            indices: Any = [shape(bucket, dtype=jnp.int32)] * len(Rows._fields)
            arguments = (denoisers, state, Rows(*indices), *counts)
            for looks in (False, True) if shapes.references is not None else (False,):
                # The tokens of reference images are not divided, so rows that look at them stay whole.
                sharding = row_sharding(mesh, bucket) if looks else shapes.sharding(mesh, "denoise", size, bucket)
                step = partial(step_program, family, denoise, sharding, denoisers_placing, looks=looks)
                named = program(step_name(label, bucket, looks=looks), step, *arguments, donate=(1,))
                programs.append(replace(named, compiler_options=options))
        for bucket in spec.decode_buckets:
            images = partial(
                decode_program, family, decode, shapes.sharding(mesh, "decode", size, bucket), decoders_placing
            )
            slots = shape(bucket, dtype=jnp.int32)
            programs.append(program(f"decode {label} images {bucket}", images, decoders, state.latents, slots))
        preview_map = shape(family.latent_channels + 1, 3)
        read = (preview_map, state.latents, state.history, state.preview, state.step, number)
        programs.append(program(f"preview {label}", partial(preview_program, size), *read))
    return tuple(programs)
