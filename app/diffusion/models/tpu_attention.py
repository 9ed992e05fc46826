"""Attention over many keys as one Pallas kernel for TPUs, which keeps a head's keys and values in VMEM if they fit.

It reads queries, keys and values as they are projected, by columns of LANES features, so nothing is transposed. The
softmax runs over blocks of keys (Milakov & Gimelshein 2018), in float32.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
# Head size -> keys from which it is cheaper than XLA's attention in one operation, priced by capacity/. For the other
# sizes it is where XLA's ends, after CLIFF features of a head: beyond, XLA takes four to twenty times as long.
SINCE = {64: 576}
CLIFF = 4096 * 64
LARGEST_HEAD = 512
LEAST_KEYS = 256  # a shorter block costs more than it saves
RESIDENT = 9 << 20  # bytes of VMEM for keys and values; with blocks of logits it stays below the 16 MiB of every chip


class Largest(NamedTuple):
    """The largest block of logits."""

    queries: int
    keys: int
    wide_keys: int  # where a head has more than LANES features


LARGEST = Largest(512, 2304, 1024)
# Of chips that gain by more and have the VMEM, by JAX's name of their kind.
LARGEST_OF = {"TPU v6 lite": Largest(1024, 4096, 2048)}


def takes(keys: int, size: int, dtype: Any) -> bool:
    """Whether the kernel is cheaper than XLA's attention, and compiles for every generation of TPU."""
    pays = size <= LARGEST_HEAD and keys >= SINCE.get(size, CLIFF // size + 1)
    return pays and dtype == jnp.bfloat16 and block_of(keys, size) >= min(LEAST_KEYS, keys)


def attend_in_vmem(q: jax.Array, k: jax.Array, v: jax.Array, *, interpret: bool = False) -> jax.Array:
    """Queries [B, T, N, H] over keys and values [B, S, N, H] -> [B, T, N, H]."""
    batch, queries, heads, size = q.shape
    keys, width = k.shape[1], width_of(size)
    if width > size:
        q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, width - size))) for x in (q, k, v))
    q, k, v = (x.reshape(*x.shape[:2], heads * width) for x in (q, k, v))
    lanes = max(LANES, width)
    resident = at_once(keys, size)
    parts = keys // resident
    twice = 2 * nbytes(resident, size) <= RESIDENT  # the next ones are read ahead
    by_query = pl.BlockSpec((1, queries_of(queries), lanes), lambda row, column, i, j: (row, i, column))
    by_key = pl.BlockSpec(
        (1, resident, lanes), lambda row, column, i, j: (row, j, column), pipeline_mode=pl.Buffered(1 + twice)
    )
    sums = [(lanes // width, queries_of(queries), features) for features in (1, 1, lanes)]
    with jax.named_scope(f"attention-kernel-{width}"):  # capacity/kernels.py has its price by this name
        x = pl.pallas_call(
            partial(kernel, heads=heads, width=width, scale=size**-0.5, block=block_of(keys, size), parts=parts),
            grid=(batch, pl.cdiv(heads * width, lanes), pl.cdiv(queries, queries_of(queries)), parts),
            in_specs=[by_query, by_key, by_key],
            out_specs=by_query,
            out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in sums],
            cost_estimate=pl.CostEstimate(
                flops=4 * batch * heads * queries * keys * lanes,
                transcendentals=batch * heads * queries * keys,
                bytes_accessed=2 * (q.size + k.size) * q.dtype.itemsize,
            ),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")
            ),
            interpret=interpret,
        )(q, k, v)
    return x.reshape(batch, queries, heads, width)[..., :size]


def kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    out_ref: Any,
    top_ref: Any,
    total_ref: Any,
    x_ref: Any,
    *,
    heads: int,
    width: int,
    scale: float,
    block: int,
    parts: int,
) -> None:
    """A block of queries, of the heads that share a column, over the keys that are in VMEM: one of `parts` of all keys.

    A head's product with zeros in its neighbours' lanes costs no more than one over its own lanes alone, since the
    matrix unit is as wide as a column.
    """
    lanes = q_ref.shape[2]
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, lanes), 1)
    own = [(lane >= start) & (lane < start + width) for start in range(0, lanes, width)]  # lanes of each head
    shared = len(own) > 1
    part = pl.program_id(3)

    def write(head: int, total: jax.Array, x: jax.Array) -> None:
        x = x / (pltpu.roll(x, width, 1) if shared else total)
        out_ref[0] = jnp.where(own[head], x.astype(out_ref.dtype), out_ref[0])

    def attend_head(head: int) -> None:
        q = jnp.where(own[head], q_ref[0], 0)

        def add_keys(i: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            highest, total, x = sums
            k, v = (ref[0, pl.ds(i * block, block), :] for ref in (k_ref, v_ref))
            if heads * width % lanes:  # beyond the last head stands anything, even NaN
                k = jnp.where(own[head], k, 0)
            logits = jax.lax.dot_general(q, k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
            top = jnp.maximum(highest, logits.max(-1, keepdims=True))
            weights, kept = jnp.exp((logits - top) * scale), jnp.exp((highest - top) * scale)
            if shared:  # the lanes of the head's neighbours sum its weights
                v = jnp.where(own[head], v, 1)
            else:
                total = total * kept + weights.sum(-1, keepdims=True)
            x = x * kept + jnp.dot(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
            return top, total, x

        sums = (jnp.full_like(top_ref[head], -jnp.inf), jnp.zeros_like(total_ref[head]), jnp.zeros_like(x_ref[head]))
        if parts > 1:
            kept = (top_ref[head], total_ref[head], x_ref[head])
            sums = jax.tree.map(partial(jnp.where, part == 0), sums, kept)
        top, total, x = jax.lax.fori_loop(0, k_ref.shape[1] // block, add_keys, sums)
        if parts == 1:
            write(head, total, x)
        else:
            top_ref[head], total_ref[head], x_ref[head] = top, total, x
            pl.when(part == parts - 1)(partial(write, head, total, x))

    for head in range(len(own)):
        pl.when(pl.program_id(1) * len(own) + head < heads)(partial(attend_head, head))


def largest() -> Largest:
    return LARGEST_OF.get(chip_kind(), LARGEST)


def chip_kind() -> str:
    """JAX's name of the chips for which the program is traced; empty where it is traced for no mesh."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device else ""


def width_of(size: int) -> int:
    """Lanes of a head: a power of two that divides a column, or whole columns."""
    return 1 << (size - 1).bit_length() if size < LANES else -(-size // LANES) * LANES


def queries_of(queries: int) -> int:
    """Queries of a block: the fewest blocks, alike, of whole tiles."""
    return -(-queries // pl.cdiv(queries, largest().queries) // 16) * 16


def block_of(keys: int, size: int) -> int:
    """The largest block of whole tiles that the keys divide into; 0 if there is none."""
    most = min(keys, largest().keys if size <= LANES else largest().wide_keys)
    return next((block for block in range(most // 16 * 16, 0, -16) if keys % block == 0), 0)


def at_once(keys: int, size: int) -> int:
    """How many keys are in VMEM: all, or a block where they do not fit."""
    return keys if nbytes(keys, size) <= RESIDENT else block_of(keys, size)


def nbytes(keys: int, size: int) -> int:
    """Bytes of a column of so many keys and values, in bfloat16."""
    return 2 * keys * max(LANES, width_of(size)) * 2
