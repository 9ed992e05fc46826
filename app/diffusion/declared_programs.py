"""Every program that a pipeline will ever run, with the shapes that it takes. Compiles and runs nothing."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from app.aot.program import Program
from app.diffusion.device_programs import (
    DenoiseState,
    Rows,
    decode_program,
    encode_program,
    insert_program,
    preview_program,
    step_program,
)
from app.diffusion.samplers import HISTORY, Coefficients
from app.diffusion.sharding import row_sharding
from app.types import PipelineSpec, Size

ENCODE_TEXTS = 4  # most texts in one dispatch of the text encoder
# XLA for GPU runs a loop whose count is an argument on the host, which reads the condition back before each iteration.
# So a dispatch blocks until the device is done, and no CUDA graph spans the loop. Its programs hold one step or text.
HOST_LOOPS = {"gpu"}


@dataclass(frozen=True)
class Shapes:
    """What the shapes of all programs follow from: the spec, and what the checkpoint adds to it."""

    spec: PipelineSpec
    text_length: int  # tokens of a prompt
    hidden_size: int  # of a token's embedding
    dtype: Any  # of the networks
    latent_channels: int
    scale_factor: int  # pixels of an image for each of its latents, along a side

    @property
    def table_rows(self) -> int:
        return self.spec.max_steps + 1  # pndm evaluates the UNet once more than it has steps

    def state(self, size: Size) -> DenoiseState:
        """A DenoiseState of jax.ShapeDtypeStruct."""
        width, height = size
        latents = (height // self.scale_factor, width // self.scale_factor, self.latent_channels)

        def shape(*shape: int, dtype: Any = jnp.float32) -> Any:
            return jax.ShapeDtypeStruct((self.spec.num_slots, *shape), dtype)

        return DenoiseState(
            latents=shape(*latents),
            history=shape(HISTORY - 1, *latents),
            prompt_embeds=shape(2, self.text_length, self.hidden_size, dtype=self.dtype),
            guidance_scale=shape(),
            seed=shape(dtype=jnp.uint32),
            step=shape(dtype=jnp.int32),
            timesteps=shape(self.table_rows),
            preview=shape(self.table_rows, 2),
            table=Coefficients(**{name: shape(self.table_rows) for name in "pqan"}, b=shape(self.table_rows, HISTORY)),
        )


def loops_on_device(mesh: Mesh) -> bool:
    """Whether a program may loop over a number of steps or texts that is known only when it is dispatched."""
    return mesh.devices.flat[0].platform not in HOST_LOOPS


def declared(shapes: Shapes, networks: Mapping[str, Any], params: Any, mesh: Mesh) -> tuple[Program, ...]:
    """`networks` makes a module of its params; both are by the component's name."""
    spec, everywhere = shapes.spec, NamedSharding(mesh, PartitionSpec())

    def shape(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)

    def program(name: str, function: Callable[..., Any], *arguments: Any, donate: tuple[int, ...] = ()) -> Program:
        return Program(name, function, arguments, donate, out_shardings=everywhere)

    params = jax.tree.map(lambda x: shape(*x.shape, dtype=x.dtype), params)
    number, real, rows = shape(dtype=jnp.int32), shape(), shapes.table_rows
    embeds = shape(shapes.text_length, shapes.hidden_size, dtype=shapes.dtype)
    coefficients = Coefficients(**{name: shape(rows) for name in "pqan"}, b=shape(rows, HISTORY))
    inserted = [number, embeds, embeds, real, shape(dtype=jnp.uint32), real, shape(rows), shape(rows, 2), coefficients]
    texts, counts = (ENCODE_TEXTS, [number]) if loops_on_device(mesh) else (1, [])
    encode = partial(encode_program, networks["text_encoder"])
    input_ids = shape(texts, shapes.text_length, dtype=jnp.int32)
    programs = [program("encode", encode, params["text_encoder"], input_ids, *counts)]
    for size in spec.sizes:
        label = f"{size[0]}x{size[1]}"
        state = jax.tree.map(lambda x: shape(*x.shape, dtype=x.dtype), shapes.state(size))
        programs.append(program(f"insert {label}", insert_program, state, *inserted, donate=(0,)))
        for bucket in spec.row_buckets:
            step = partial(step_program, networks["unet"], row_sharding(mesh, bucket))
            indices: Any = [shape(bucket, dtype=jnp.int32)] * len(Rows._fields)
            arguments = (params["unet"], state, Rows(*indices), *counts)
            programs.append(program(f"step {label} rows {bucket}", step, *arguments, donate=(1,)))
        for bucket in spec.decode_buckets:
            decode = partial(decode_program, networks["vae"], row_sharding(mesh, bucket))
            slots = shape(bucket, dtype=jnp.int32)
            programs.append(program(f"decode {label} images {bucket}", decode, params["vae"], state.latents, slots))
        preview_map = shape(shapes.latent_channels + 1, 3)
        read = (preview_map, state.latents, state.history, state.preview, state.step, number)
        programs.append(program(f"preview {label}", partial(preview_program, size), *read))
    return tuple(programs)
