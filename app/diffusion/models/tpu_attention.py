"""Attention over many keys as one Pallas kernel for TPUs, which keeps a head's keys and values in VMEM.

It reads queries, keys and values as they are projected, by columns of LANES features, so nothing is transposed. The
softmax runs over blocks of keys (Milakov & Gimelshein 2018), in float32.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
# Head size -> keys from which it is cheaper than XLA's attention in one operation, priced by capacity/. For the other
# sizes it is where XLA's ends, after CLIFF features of a head: beyond, XLA takes four to twenty times as long.
SINCE = {64: 576}
CLIFF = 4096 * 64
MOST_QUERIES = 512  # of a block
MOST_KEYS = 2304  # of a block
LEAST_KEYS = 256  # a shorter block costs more than it saves
RESIDENT = 9 << 20  # bytes of VMEM for keys and values; with blocks of logits it stays below the 16 MiB of every chip


def takes(keys: int, size: int, dtype: Any) -> bool:
    """Whether the kernel is cheaper than XLA's attention, and compiles for every generation of TPU."""
    pays = size <= LANES and keys >= SINCE.get(size, CLIFF // size + 1)
    tiles = block_of(keys) >= min(LEAST_KEYS, keys)
    return pays and tiles and dtype == jnp.bfloat16 and resident_bytes(keys, size, dtype) <= RESIDENT


def attend_in_vmem(q: jax.Array, k: jax.Array, v: jax.Array, *, interpret: bool = False) -> jax.Array:
    """Queries [B, T, N, H] over keys and values [B, S, N, H] -> [B, T, N, H]."""
    batch, queries, heads, size = q.shape
    keys, width = k.shape[1], width_of(size)
    if width > size:
        q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, width - size))) for x in (q, k, v))
    q, k, v = (x.reshape(*x.shape[:2], heads * width) for x in (q, k, v))
    lanes = max(LANES, width)
    block = queries_of(queries)
    twice = 2 * resident_bytes(keys, size, k.dtype) <= RESIDENT  # the next head's are read ahead
    by_query = pl.BlockSpec((1, block, lanes), lambda row, column, i: (row, i, column))
    by_head = pl.BlockSpec(
        (1, keys, lanes), lambda row, column, i: (row, 0, column), pipeline_mode=pl.Buffered(1 + twice)
    )
    with jax.named_scope(f"attention-kernel-{width}"):  # capacity/kernels.py has its price by this name
        x = pl.pallas_call(
            partial(kernel, heads=heads, width=width, scale=size**-0.5, keys=block_of(keys)),
            grid=(batch, pl.cdiv(heads * width, lanes), pl.cdiv(queries, block)),
            in_specs=[by_query, by_head, by_head],
            out_specs=by_query,
            out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
            cost_estimate=pl.CostEstimate(
                flops=4 * batch * heads * queries * keys * lanes,
                transcendentals=batch * heads * queries * keys,
                bytes_accessed=2 * (q.size + k.size) * q.dtype.itemsize,
            ),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
            interpret=interpret,
        )(q, k, v)
    return x.reshape(batch, queries, heads, width)[..., :size]


def kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, out_ref: Any, *, heads: int, width: int, scale: float, keys: int
) -> None:
    """A block of queries, of the heads that share a column.

    A head's product with zeros in its neighbours' lanes costs no more than one over its own lanes alone, since the
    matrix unit is as wide as a column.
    """
    queries, lanes = q_ref.shape[1:]
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, lanes), 1)
    shared = width < lanes

    def attend_head(start: int) -> None:
        mine = (lane >= start) & (lane < start + width)
        q = jnp.where(mine, q_ref[0], 0)

        def add_keys(i: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            highest, total, x = sums
            k, v = (ref[0, pl.ds(i * keys, keys), :] for ref in (k_ref, v_ref))
            if heads * width % lanes:  # beyond the last head stands anything, even NaN
                k = jnp.where(mine, k, 0)
            logits = jax.lax.dot_general(q, k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
            top = jnp.maximum(highest, logits.max(-1, keepdims=True))
            weights, kept = jnp.exp((logits - top) * scale), jnp.exp((highest - top) * scale)
            if shared:  # the lanes of the head's neighbours sum its weights
                v = jnp.where(mine, v, 1)
            else:
                total = total * kept + weights.sum(-1, keepdims=True)
            x = x * kept + jnp.dot(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
            return top, total, x

        zeros = jnp.zeros((queries, 1), jnp.float32)
        sums = (zeros - jnp.inf, zeros, jnp.zeros((queries, lanes), jnp.float32))
        _, total, x = jax.lax.fori_loop(0, k_ref.shape[1] // keys, add_keys, sums)
        x = x / (pltpu.roll(x, width, 1) if shared else total)
        out_ref[0] = jnp.where(mine, x.astype(out_ref.dtype), out_ref[0])

    for position in range(lanes // width):
        exists = pl.program_id(1) * (lanes // width) + position < heads
        pl.when(exists)(partial(attend_head, position * width))


def width_of(size: int) -> int:
    """Lanes of a head: a power of two that divides a column, or whole columns."""
    return 1 << (size - 1).bit_length() if size < LANES else -(-size // LANES) * LANES


def queries_of(queries: int) -> int:
    """Queries of a block: the fewest blocks, alike, of whole tiles."""
    return -(-queries // pl.cdiv(queries, MOST_QUERIES) // 16) * 16


def block_of(keys: int) -> int:
    """The largest block of whole tiles that the keys divide into; 0 if there is none."""
    return next((block for block in range(min(keys, MOST_KEYS) // 16 * 16, 0, -16) if keys % block == 0), 0)


def resident_bytes(keys: int, size: int, dtype: Any) -> int:
    return 2 * keys * max(LANES, width_of(size)) * jnp.dtype(dtype).itemsize
