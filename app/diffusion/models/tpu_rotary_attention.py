"""Attention of rotated heads as one Pallas kernel for TPUs: norms, rotations and softmax, straight from projections.

It reads columns of LANES features as they are projected, also out of a joint projection, so nothing is transposed,
sliced or joined. A head's keys are normed and rotated once, and stay in VMEM with its values.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from app.diffusion.models.tpu_attention import chip_kind

LANES = 128  # features of a head
MOST_QUERIES = 256  # of a block
QUERIES = {"TPU v6 lite": 512}  # of chips that gain by more, by JAX's name of their kind; they need 19 MiB of VMEM
MOST_KEYS = 2304  # of a block
MOST_ROWS = 512  # of keys that are rotated together
LEAST_QUERIES = 128  # of a block; a shorter one costs more than it saves
LEAST_KEYS = 256
MOST_TOKENS = 4736  # so that keys, values, tables and logits stay below the 16 MiB of VMEM that every chip has
TILE = 16  # rows of bfloat16
LOGITS = LANES**-0.5 * math.log2(math.e)  # a product of query and key times this is its logit to base 2
# Weights are 2 ** (logit - shift), with a shift that no logit is above by more than this. So blocks of keys need not
# wait for their largest logit, which takes a third of the time on a v6e.
HEADROOM = 100.0
# Float32 has nothing below 2 ** -126. Where a row's weights sum up to less than this, its largest logit is far below
# the shift, small weights may be lost, and its block is computed again with the largest logits.
LEAST_TOTAL = 2.0**-90


class Refs(NamedTuple):
    """A stream inside the kernel."""

    q: Any  # [1, Q, LANES]: a block of one head
    k: Any  # [1, S, LANES]: a head
    v: Any
    norm_q: Any  # [1, LANES]
    norm_k: Any
    cos: Any  # float32 [1, S, LANES]
    sin: Any


def takes(tokens: Sequence[int], keys: int, size: int, dtype: Any) -> bool:
    """Whether the kernel takes streams of so many tokens, which attend to so many in all, with heads of this size."""
    suits = dtype == jnp.bfloat16 and size == LANES and keys <= MOST_TOKENS
    return suits and queries_of(tokens) >= LEAST_QUERIES and keys_of(keys) >= LEAST_KEYS


def attend_rotated(
    streams: Sequence[Any],
    lengths: jax.Array | None,
    own: jax.Array,
    *,
    heads: int,
    epsilon: float,
    first: tuple[int, int, int],
    interpret: bool = False,
) -> list[jax.Array]:
    """As rotary_attention.attend_joined, which has the types and shapes."""
    batch, dtype = len(streams[0].q), streams[0].q.dtype
    tokens = [stream.q.shape[1] for stream in streams]
    key_tokens = [stream.k.shape[1] for stream in streams]
    keys, queries = sum(key_tokens), queries_of(tokens)
    blocks = [count // queries for count in tokens]
    starts = [sum(blocks[:i]) for i in range(len(blocks))]
    once: dict[str, Any] = {"pipeline_mode": pl.Buffered(1)}

    def by_query(start: int, count: int, column: int) -> pl.BlockSpec:
        return pl.BlockSpec(
            (1, queries, LANES), lambda row, head, i, *_: (row, jnp.clip(i - start, 0, count - 1), column + head)
        )

    inputs, specs = [], []
    for stream, start, count, length in zip(streams, starts, blocks, key_tokens, strict=True):
        by_key = [
            pl.BlockSpec((1, length, LANES), lambda row, head, i, *_, column=column: (row, 0, column + head))
            for column in first[1:]
        ]
        scale = pl.BlockSpec((1, LANES), lambda *_: (0, 0))
        by_row = len(stream.rotation.cos) > 1
        table = pl.BlockSpec((1, length, LANES), lambda row, *_, by_row=by_row: (row if by_row else 0, 0, 0), **once)
        inputs += [*stream[:3], stream.norm_q[None], stream.norm_k[None], *stream.rotation]
        specs += [by_query(start, count, first[0]), *by_key, scale, scale, table, table]
    body = partial(kernel, starts=starts, blocks=blocks, epsilon=epsilon, masked=lengths is not None)
    divided = "-divided" if sum(tokens) < keys else ""
    with jax.named_scope(f"rotary-attention-kernel{divided}"):  # capacity/kernels.py has its price by this name
        answers: tuple[jax.Array, ...] = pl.pallas_call(
            body,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=3,
                grid=(batch, heads, sum(blocks)),
                in_specs=specs,
                out_specs=[by_query(start, count, 0) for start, count in zip(starts, blocks, strict=True)],
                scratch_shapes=[pltpu.VMEM((rows, LANES), dtype) for rows in (queries, keys, keys)],
            ),
            out_shape=[jax.ShapeDtypeStruct((batch, count, heads * LANES), dtype) for count in tokens],
            cost_estimate=pl.CostEstimate(
                flops=4 * batch * heads * sum(tokens) * keys * LANES,
                transcendentals=batch * heads * sum(tokens) * keys,
                bytes_accessed=2 * batch * heads * (sum(tokens) + keys) * LANES * dtype.itemsize,
            ),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
            interpret=interpret,
        )(
            jnp.full(batch, keys, jnp.int32) if lengths is None else lengths,
            shift_of(streams),
            own[None],
            *inputs,
        )
    return list(answers)


def shift_of(streams: Sequence[Any]) -> jax.Array:
    """[1]: the shift of the weights.

    Normed queries and keys are sqrt(H) long before their scales, and a rotation keeps the length of a pair. So a
    product is at most H times the largest product of two scales of a pair (Cauchy's inequality).
    """
    q, k = (jnp.stack(norms).astype(jnp.float32) for norms in zip(*(s[3:5] for s in streams), strict=True))
    q, k = (jnp.abs(scales).max(axis=0).reshape(-1, 2).max(axis=1) for scales in (q, k))
    return LOGITS * LANES * (q * k).max(keepdims=True) - HEADROOM


def kernel(
    lengths: Any,
    shift_ref: Any,
    own_ref: Any,
    *refs: Any,
    starts: Sequence[int],
    blocks: Sequence[int],
    epsilon: float,
    masked: bool,
) -> None:
    """A block of queries of one head and stream over the keys of all streams."""
    fields = len(Refs._fields)
    streams = [Refs(*refs[i * fields : (i + 1) * fields]) for i in range(len(starts))]
    outs, (q_ref, k_ref, v_ref) = refs[len(starts) * fields : -3], refs[-3:]
    i, length, shift = pl.program_id(2), lengths[pl.program_id(0)], shift_ref[0]
    queries, keys = q_ref.shape[0], k_ref.shape[0]
    block = keys_of(keys)

    @pl.when(i == 0)
    def prepare_keys() -> None:
        at = 0
        for stream in streams:
            prepare(stream, k_ref, v_ref, at, epsilon)
            at += stream.k.shape[1]

    def of_stream(run: Callable[[Refs, Any, jax.Array], None]) -> None:
        for stream, out, start, count in zip(streams, outs, starts, blocks, strict=True):
            pl.when((i >= start) & (i < start + count))(partial(run, stream, out, own_ref[0] * count + i - start))

    def prepare_queries(stream: Refs, _: Any, at: jax.Array) -> None:
        rows = pl.ds(pl.multiple_of(at * queries, TILE), queries)
        q = turned(stream.q[0], stream.norm_q, stream.cos[0, rows], stream.sin[0, rows], epsilon)
        q_ref[...] = (q * LOGITS).astype(q_ref.dtype)

    of_stream(prepare_queries)
    q = q_ref[...]

    def logits_of(j: jax.Array) -> jax.Array:
        k = k_ref[pl.ds(j * block, block)]
        logits = jax.lax.dot_general(q, k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        if masked:
            place = jax.lax.broadcasted_iota(jnp.int32, (1, block), 1) + j * block
            logits = jnp.where(place < length, logits, -jnp.inf)
        return logits

    def weighted(weights: jax.Array, j: jax.Array) -> jax.Array:
        v = v_ref[pl.ds(j * block, block)]
        return jnp.dot(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)

    def write(total: jax.Array, x: jax.Array) -> None:
        x = (x / total).astype(q_ref.dtype)

        def write_out(_: Refs, out: Any, at: jax.Array) -> None:
            out[0] = x

        of_stream(write_out)

    def add_keys(j: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        total, x = sums
        weights = jnp.exp2(logits_of(j) - shift)
        return total + weights.sum(-1, keepdims=True), x + weighted(weights, j)

    zeros = jnp.zeros((queries, 1)), jnp.zeros((queries, LANES))
    total, x = jax.lax.fori_loop(0, keys // block, add_keys, zeros)
    write(total, x)

    @pl.when(total.min() < LEAST_TOTAL)
    def with_largest_logits() -> None:
        def add_keys(j: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            highest, total, x = sums
            logits = logits_of(j)
            top = jnp.maximum(highest, logits.max(-1, keepdims=True))
            weights, kept = jnp.exp2(logits - top), jnp.exp2(highest - top)
            return top, total * kept + weights.sum(-1, keepdims=True), x * kept + weighted(weights, j)

        lowest = jnp.full((queries, 1), -jnp.inf)
        _, total, x = jax.lax.fori_loop(0, keys // block, add_keys, (lowest, *zeros))
        write(total, x)


def prepare(stream: Refs, k_ref: Any, v_ref: Any, at: int, epsilon: float) -> None:
    """Rotates a head's keys of a stream, and takes its values, to the rows from `at` on."""
    tokens = stream.k.shape[1]
    rows = block_of(tokens, MOST_ROWS, TILE)

    def part(j: jax.Array, _: None) -> None:
        source, target = pl.ds(j * rows, rows), pl.ds(at + j * rows, rows)
        k = turned(stream.k[0, source], stream.norm_k, stream.cos[0, source], stream.sin[0, source], epsilon)
        k_ref[target] = k.astype(k_ref.dtype)
        v_ref[target] = stream.v[0, source]

    jax.lax.fori_loop(0, tokens // rows, part, None)


def turned(x: jax.Array, norm: Any, cos: jax.Array, sin: jax.Array, epsilon: float) -> jax.Array:
    """The norm of a head, rounded to its dtype, and its rotation in float32."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + epsilon) * norm[...].astype(jnp.float32)
    x = wide.astype(x.dtype)
    return x.astype(jnp.float32) * cos + swapped(x).astype(jnp.float32) * sin


def swapped(x: jax.Array) -> jax.Array:
    """Swaps the features of each pair. Two rows of bfloat16 move together, as one of 32 bits."""
    dtype = x.dtype
    x = pltpu.bitcast(x, jnp.uint32)
    even = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) % 2 == 0
    return pltpu.bitcast(jnp.where(even, pltpu.roll(x, LANES - 1, 1), pltpu.roll(x, 1, 1)), dtype)


def queries_of(tokens: Sequence[int]) -> int:
    """Queries of a block, which all streams divide into, on the chips that the program is traced for."""
    return block_of(math.gcd(*tokens), QUERIES.get(chip_kind(), MOST_QUERIES), TILE)


def keys_of(keys: int) -> int:
    """Keys of a block: whole columns of logits."""
    return block_of(keys, MOST_KEYS, LANES)


def block_of(count: int, most: int, multiple: int) -> int:
    """The largest block of a multiple that `count` divides into; 0 if there is none."""
    return next(
        (block for block in range(min(count, most) // multiple * multiple, 0, -multiple) if count % block == 0), 0
    )
