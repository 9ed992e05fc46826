from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from capacity.flops import count_flops, matrix

TILE = 128


def flops_of(function: Any, *shapes: tuple[int, ...]) -> Any:
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return count_flops(jax.make_jaxpr(function)(*arguments).jaxpr, TILE)


def test_a_multiply_add_counts_as_two_flops() -> None:
    count = flops_of(lambda a, b: a @ b, (256, 384), (384, 512))
    assert count.flops == count.padded_flops == 2 * 256 * 384 * 512


def test_a_head_of_40_fills_the_unit_like_one_of_128() -> None:
    """Of an attention's two products the one has 40 inside, the other outside."""

    def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.einsum("nqk,nkh->nqh", jnp.einsum("nqh,nkh->nqk", q, k), v)

    count = flops_of(attention, (8, 4096, 40), (8, 4096, 40), (8, 4096, 40))
    assert count.flops == 2 * 2 * 8 * 4096 * 4096 * 40
    assert count.padded_flops == 2 * 2 * 8 * 4096 * 4096 * 128


def test_the_longer_side_streams_whichever_it_is() -> None:
    assert matrix(1, 4096, 128, 40, TILE) == matrix(1, 40, 128, 4096, TILE)


def test_a_convolution_pads_each_tap() -> None:
    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    count = flops_of(convolve, (2, 16, 16, 4), (3, 3, 4, 320))
    assert count.flops == 2 * 9 * (2 * 16 * 16) * 4 * 320
    assert count.padded_flops == 2 * 9 * (2 * 16 * 16) * 128 * 384


def test_loops_of_known_length_multiply_and_others_count_once() -> None:
    product = 2 * 128**3

    def closed(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 5, lambda i, x: x @ x, x)

    def opened(n: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, n, lambda i, x: x @ x, x)

    assert flops_of(closed, (128, 128)).flops == 5 * product
    number, square = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((128, 128), jnp.float32)
    count = count_flops(jax.make_jaxpr(opened)(number, square).jaxpr, TILE)
    assert (count.flops, count.open_loops) == (product, 1)


def test_a_conditional_counts_as_its_most_expensive_branch() -> None:
    def branch(x: jax.Array) -> jax.Array:
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x, x)

    assert flops_of(branch, (128, 128)).flops == 2 * 2 * 128**3


def test_a_choice_by_platform_counts_as_the_tpus_branch() -> None:
    def by_platform(x: jax.Array) -> jax.Array:
        return jax.lax.platform_dependent(x, cpu=lambda x: x @ x @ x, default=lambda x: x @ x)

    assert flops_of(by_platform, (128, 128)).flops == 2 * 128**3


def test_a_kernel_that_a_tpu_chooses_is_no_more_work_than_what_it_replaces() -> None:
    def kernel(x: Any, out: Any) -> None:
        out[...] = x[...] @ x[...] @ x[...]

    def by_platform(x: jax.Array) -> jax.Array:
        tpu = pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype))
        return jax.lax.platform_dependent(x, tpu=tpu, cpu=lambda x: x, default=lambda x: x @ x)

    count = flops_of(by_platform, (128, 128))
    assert (count.flops, list(count.kernels.values())) == (2 * 128**3, [2 * 2 * 128**3])


def test_a_kernels_own_estimate_says_that_some_of_its_cells_do_less() -> None:
    def kernel(x: Any, out: Any) -> None:
        out[...] = x[...] @ x[...]

    declared = pl.CostEstimate(flops=3 * 2 * 128**3, transcendentals=0, bytes_accessed=0)
    shape = jax.ShapeDtypeStruct((128, 128), jnp.float32)
    count = flops_of(pl.pallas_call(kernel, grid=(4,), out_shape=shape, cost_estimate=declared), (128, 128))
    assert count.flops == count.padded_flops == sum(count.kernels.values()) == 3 * 2 * 128**3


def test_a_product_that_nobody_reads_does_not_count() -> None:
    @jax.jit
    def two(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return x @ x, x.T @ x

    assert flops_of(lambda x: two(x)[0], (128, 128)).flops == 2 * 128**3


def test_a_kernel_counts_once_for_each_cell_of_its_grid_under_its_scope() -> None:
    def kernel(x: Any, y: Any, out: Any) -> None:
        out[...] = jnp.dot(x[...], y[...], preferred_element_type=jnp.float32)

    def product(x: jax.Array, y: jax.Array) -> jax.Array:
        block = pl.BlockSpec((64, 40), lambda i: (i, 0))
        with jax.named_scope("self-attention"):
            return pl.pallas_call(
                kernel,
                grid=(4,),
                in_specs=[block, pl.BlockSpec((40, 256), lambda i: (0, 0))],
                out_specs=pl.BlockSpec((64, 256), lambda i: (i, 0)),
                out_shape=jax.ShapeDtypeStruct((256, 256), jnp.float32),
            )(x, y)

    count = flops_of(product, (256, 40), (40, 256))
    assert count.flops == 2 * 256 * 40 * 256
    ((stack, padded),) = count.kernels.items()
    assert "self-attention" in stack
    assert padded == pytest.approx(4 * 2 * 128 * 128 * 256)  # of each cell, 64 rows pad to 128 and 40 inside do too


def test_a_shard_map_counts_once_for_each_shard_that_differs() -> None:
    mesh = jax.sharding.AbstractMesh((2, 4), ("rows", "same"))
    rows = jax.sharding.PartitionSpec("rows")
    each = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    assert flops_of(each, (256, 128)).flops == 2 * (2 * 128**3)
