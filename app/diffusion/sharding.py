"""How the rows of a step, and their images, are divided: over the chips of a host, and on each into passes and strips.

The state and the weights are on every chip, but for the weights that are to be divided. Knows nothing of samplers or of
the networks' layers.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from app.diffusion.divided_weights import any_divided, as_whole, specs_of
from app.diffusion.models.image_shards import ImageShards

# How many rows go through a network together on one chip. More bring no speed: these fill a TPU's matrix units, and
# larger intermediate arrays no longer fit in its VMEM. Fewer rows take nearly as long as these, so their images are cut
# into strips until there are as many.
ROWS_TOGETHER = {"tpu": 8}
# Of larger latents fewer rows go through together, but two, so that their arrays fit in VMEM: eight rows of SDXL at
# 1024x1024 take 7 % less in four passes of two than in one. So many pixels are eight rows of 512x512.
PIXELS_TOGETHER = 8 * 64 * 64

# Memory of a chip that programs may use, in GiB, by JAX's name of its kind; other devices tell theirs.
HBM_GIB = {"TPU v4": 30.75, "TPU v5 lite": 15.75, "TPU v5": 95.74, "TPU v6 lite": 31.25}
ROOM = 0.2  # of a chip's memory, beside the weights, for the states of images, temporary arrays and code


def mesh_of(devices: Sequence[jax.Device]) -> Mesh:
    """A mesh of the largest power of two of these devices, with axes of length two.

    So any number of rows that is a power of two can be divided among the devices, even if it is smaller than theirs.
    """
    halvings = len(devices).bit_length() - 1
    shape = [2] * halvings or [1]
    return Mesh(np.array(devices[: 2**halvings]).reshape(shape), [f"data{i}" for i in range(len(shape))])


def row_sharding(mesh: Mesh, rows: int) -> NamedSharding:
    """Divides rows over as many devices as divide their number."""
    halvings = next(n for n in range(len(mesh.axis_names), -1, -1) if rows % 2**n == 0)
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names[:halvings] or None))


def image_sharding(mesh: Mesh, rows: int, divides_images: Callable[[int], bool]) -> NamedSharding:
    """Divides rows likewise, and each image over the chips that would else compute the same rows.

    `divides_images` says whether images can be divided over so many chips. Axes of the result: rows, rows of latents.
    """
    sharding = row_sharding(mesh, rows)
    axes = mesh.axis_names[len(axes_of(sharding, 0)) :] if mesh.size > 1 else ()
    while axes and not divides_images(2 ** len(axes)):
        axes = axes[:-1]
    return NamedSharding(mesh, PartitionSpec(sharding.spec[0], axes)) if axes else sharding


def image_shards(sharding: NamedSharding) -> ImageShards | None:
    """The chips that share an image; None where each image is whole."""
    axes = axes_of(sharding, 1)
    return ImageShards(axes, 2 ** len(axes)) if axes else None


def axes_of(sharding: NamedSharding, dimension: int) -> tuple[str, ...]:
    """The axes of the mesh over which a dimension is divided."""
    axes = sharding.spec[dimension] if dimension < len(sharding.spec) else None
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def memory_of(device: jax.Device) -> float:
    """Bytes that programs may use; without a limit where the device tells none, as a CPU."""
    if device.device_kind in HBM_GIB:
        return HBM_GIB[device.device_kind] * 2**30
    stats = device.memory_stats() if device.platform != "cpu" else None
    return float((stats or {}).get("bytes_limit", math.inf))


def crowded(mesh: Mesh, nbytes: float) -> bool:
    """Whether so many bytes of weights on each chip leave too little room beside them."""
    return nbytes > (1 - ROOM) * memory_of(mesh.devices.flat[0])


def weight_sharding(mesh: Mesh, weight: Any, *, divided: bool) -> NamedSharding:
    """All chips hold a weight whole, or each has a part of its longest axis, and XLA adds the communication.

    Vectors stay whole, and so does what the number of chips does not divide.
    """
    longest = max(range(len(weight.shape)), key=weight.shape.__getitem__, default=0)
    if not divided or len(weight.shape) < 2 or weight.shape[longest] % mesh.size:
        return NamedSharding(mesh, PartitionSpec())
    return NamedSharding(mesh, PartitionSpec(*[None] * longest, mesh.axis_names))


def placed(params: Any, shardings: Any) -> Any:
    """Weights on the devices. Mere shapes stay shapes: capacity/programs.py compiles for them and runs nothing."""
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params)):
        return params
    return jax.device_put(params, shardings)


def divided(function: Callable[..., jax.Array], sharding: NamedSharding, placing: Any) -> Callable[..., jax.Array]:
    """`function(params, latents, *rows)` with each chip at its own rows, and its part of their images.

    `placing` is how the params lie on the chips. Only chips that share an image, or weights, communicate. Pallas
    kernels need this even where all chips do the same, and with one chip to know its kind.
    """
    if sharding.mesh.size == 1:

        def on_one_chip(*arguments: Any) -> jax.Array:
            with jax.sharding.use_abstract_mesh(sharding.mesh.abstract_mesh):
                return function(*arguments)

        return on_one_chip

    def on_chip(params: Any, latents: jax.Array, *rows: Any) -> jax.Array:
        if any_divided(placing):
            params, latents = as_whole(params, placing, latents)
        return function(params, latents, *rows)

    def call(params: Any, latents: jax.Array, *rows: Any) -> jax.Array:
        specs = (specs_of(placing), sharding.spec, *[PartitionSpec(sharding.spec[0])] * len(rows))
        # shard_map's check does not support `platform_dependent`.
        per_chip = jax.shard_map(on_chip, mesh=sharding.mesh, in_specs=specs, out_specs=sharding.spec, check_vma=False)
        return per_chip(params, latents, *rows)

    return call


def together_on(sharding: NamedSharding) -> int | None:
    """How many rows these devices take together; None: all."""
    return ROWS_TOGETHER.get(sharding.mesh.devices.flat[0].platform)


def rows_at(pixels: int, together: int | None) -> int | None:
    """How many rows of latents with so many pixels go through together."""
    while together and together > 2 and pixels * together > PIXELS_TOGETHER:
        together //= 2
    return together


def passes_of(rows: int, together: int | None) -> int:
    """Into how many equal parts one chip's rows are split, which go through the UNet one after the other."""
    return rows // together if together and rows % together == 0 else 1


def strips_of(rows: int, height: int, together: int | None) -> int:
    """Into how many strips the images of these rows are cut. The height at each level must be divisible by it."""
    strips = 1
    while together and 2 * strips * rows <= together and height % (2 * strips) == 0:
        strips *= 2
    return strips
