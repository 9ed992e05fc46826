"""Multi-head attention, in the form that is quickest on each platform and for each number of keys.

The form is chosen while a program is traced. Arrays are [B, T, N, H] for queries and [B, S, N, H] for keys and values,
with N heads of size H; where a length of the keys is known, only so many keys of a row are attended to.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from app.diffusion.models.tpu_attention import attend_in_vmem, takes

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
FEW_KEYS = 128
MANY_KEYS = 512
BLOCK = 512  # of queries
FUSED_SINCE = (8, 0)  # the oldest compute capability with cuDNN's fused attention: Ampere


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    heads: int,
    *,
    causal: bool = False,
    lengths: jax.Array | None = None,
) -> jax.Array:
    """Multi-head attention of q [B, T, C] over k and v [B, S, C]; the softmax is float32 in any dtype.

    Only the first lengths [B] keys are attended to. Keys and values may have fewer heads than queries, each for as many
    neighbours among them (Ainslie et al. 2023); such attention must be causal.
    """
    shape = q.shape
    q, k, v = (x.reshape(*x.shape[:2], -1, shape[-1] // heads) for x in (q, k, v))
    platforms: dict[str, Attend] = {}
    plain = partial(jax.nn.dot_product_attention, is_causal=causal, key_value_seq_lengths=lengths)
    default: Attend = plain
    if k.shape[1] < FEW_KEYS and not causal and lengths is None:
        default = attend_few
    elif k.shape[1] > MANY_KEYS and not causal:
        default = partial(attend_apart, lengths=lengths)
        platforms["cpu"] = partial(attend_in_blocks, lengths=lengths)
    if not causal and lengths is None and takes(k.shape[1], k.shape[-1], k.dtype):
        platforms["tpu"] = attend_in_vmem
    if fused(q):
        platforms["cuda"] = partial(plain, implementation="cudnn")
    x = jax.lax.platform_dependent(q, k, v, default=default, **platforms) if platforms else default(q, k, v)
    return x.reshape(shape)


def fused(q: jax.Array) -> bool:
    """Whether cuDNN's fused attention takes these heads on this host's GPU, at any number of queries and keys.

    It keeps the logits on the chip. The limits are those of jax.nn.dot_product_attention, which raises beyond them.
    """
    capability = cuda_capability()
    largest = 256 if capability >= (9, 0) else 128
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    return capability >= FUSED_SINCE and half and q.shape[-1] <= largest and q.shape[-1] % 8 == 0


def cuda_capability() -> tuple[int, ...]:
    """The compute capability of this process's first NVIDIA GPU, such as (9, 0); empty where JAX uses none."""
    if jax.default_backend() != "gpu" or "cuda" not in jax.devices()[0].client.platform_version:
        return ()
    return tuple(int(part) for part in jax.devices()[0].compute_capability.split("."))


def attend_few(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """The same over few keys, [B, T, N, H] and [B, S, N, H]: divided by the softmax's sum at the end, not before the
    second product. On TPU it is a quarter quicker with 77 keys, and with thousands many times slower."""
    logits = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32) * (q.shape[-1] ** -0.5)
    weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    x = jnp.einsum("bnts,bsnh->bnth", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return jnp.swapaxes(x / weights.sum(axis=-1, keepdims=True), 1, 2).astype(q.dtype)


def attend_apart(q: jax.Array, k: jax.Array, v: jax.Array, *, lengths: jax.Array | None = None) -> jax.Array:
    """Attention whose inputs are computed outside of it.

    Otherwise XLA for TPU fuses their products into the attention, computes them repeatedly, and one row takes as long
    as nine.
    """
    q, k, v = jax.lax.optimization_barrier((q, k, v))
    return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths)


def attend_in_blocks(q: jax.Array, k: jax.Array, v: jax.Array, *, lengths: jax.Array | None = None) -> jax.Array:
    """Attention by heads and by BLOCK queries, so that the logits stay in a CPU's cache: eight times as fast for 4096
    keys. TPUs do not need it, as their attention is one operation that keeps the logits on the chip.
    """

    rows, keys, heads, _ = k.shape
    valid = jnp.full(rows, keys) if lengths is None else lengths

    def attend_head(head: tuple[jax.Array, jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q, k, v, length = head

        def attend_query(q: jax.Array) -> jax.Array:
            logits = jnp.einsum("h,sh->s", q, k, preferred_element_type=jnp.float32) * (q.shape[-1] ** -0.5)
            if lengths is not None:
                logits = jnp.where(jnp.arange(keys) < length, logits, -jnp.inf)
            weights = jnp.exp(logits - logits.max())
            x = jnp.einsum("s,sh->h", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
            return (x / weights.sum()).astype(q.dtype)

        return jax.lax.map(attend_query, q, batch_size=BLOCK)

    by_head = (jnp.swapaxes(x, 1, 2).reshape(-1, x.shape[1], x.shape[3]) for x in (q, k, v))
    x = jax.lax.map(attend_head, (*by_head, jnp.repeat(valid, heads)))
    return jnp.swapaxes(x.reshape(q.shape[0], q.shape[2], q.shape[1], q.shape[3]), 1, 2)
