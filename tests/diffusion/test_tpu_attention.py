"""The TPU's attention kernel in Pallas' interpret mode, in which what lies beyond an array is NaN."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from app.diffusion.models import attention, tpu_attention
from app.diffusion.models.tpu_attention import Largest, at_once, attend_in_vmem, block_of, queries_of, takes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("heads", "size", "all_at_once", "dtype", "tolerance"),
    [
        (3, 64, True, jnp.float32, 5e-6),  # the last column of 128 features has one head
        (2, 64, False, jnp.bfloat16, 2e-2),
        (3, 40, True, jnp.float32, 5e-6),
        (1, 80, False, jnp.float32, 5e-6),
        (1, 128, True, jnp.float32, 5e-6),
        (1, 160, False, jnp.float32, 5e-6),
    ],
    ids=str,
)
def test_the_kernel_attends_as_jax_does(
    monkeypatch: pytest.MonkeyPatch, heads: int, size: int, all_at_once: bool, dtype: Any, tolerance: float
) -> None:
    monkeypatch.setattr(tpu_attention, "RESIDENT", 1 << 20 if all_at_once else 0)  # bytes of keys and values
    # Three blocks of keys, and two of queries, of which the second is not full.
    monkeypatch.setattr(tpu_attention, "LARGEST", Largest(queries=32, keys=16, wide_keys=16))
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, length, heads, size)), dtype) for length in (40, 48, 48))
    answer, expected = attend_in_vmem(q, k, v, interpret=True), jax.nn.dot_product_attention(q, k, v)
    assert answer.dtype == dtype and answer.shape == expected.shape
    np.testing.assert_allclose(np.asarray(answer, np.float32), np.asarray(expected, np.float32), atol=tolerance)


def test_keys_that_do_not_fit_in_vmem_are_read_in_blocks() -> None:
    assert [at_once(keys, 128) for keys in (4608, 18432, 20736)] == [4608, 18432, 2304]
    assert [at_once(keys, 512) for keys in (4096, 16384)] == [4096, 1024]


def test_blocks_are_whole_tiles_that_fill_queries_and_keys() -> None:
    assert [block_of(keys, 64) for keys in (1024, 4096, 4608, 5184, 9216)] == [1024, 2048, 2304, 1728, 2304]
    assert [block_of(keys, 512) for keys in (4096, 9216, 16384)] == [1024, 1024, 1024]
    assert [queries_of(queries) for queries in (64, 576, 2304, 9216)] == [64, 288, 464, 512]


@pytest.mark.parametrize(
    ("keys", "size", "dtype", "expected"),
    [
        (4096, 64, jnp.bfloat16, True),
        (77, 64, jnp.bfloat16, False),
        (4096, 40, jnp.bfloat16, False),  # XLA's attention is one operation
        (9216, 40, jnp.bfloat16, True),
        (2048, 128, jnp.bfloat16, False),
        (4608, 128, jnp.bfloat16, True),
        (16384, 512, jnp.bfloat16, True),  # the VAE's only head
        (4096, 1024, jnp.bfloat16, False),
        (16 * 331, 64, jnp.bfloat16, False),  # 331 is prime: blocks of one tile
        (4097, 64, jnp.bfloat16, False),
        (4096, 64, jnp.float32, False),
    ],
    ids=str,
)
def test_the_kernel_takes_what_it_does_cheaper(keys: int, size: int, dtype: Any, expected: bool) -> None:
    assert takes(keys, size, dtype) is expected


def lowered(keys: int, size: int, platform: str) -> str:
    x = jax.ShapeDtypeStruct((1, keys, 2 * size), jnp.bfloat16)
    traced = jax.jit(lambda q, k, v: attention.attend(q, k, v, 2)).trace(x, x, x)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def test_a_tpu_program_calls_the_kernel_for_many_keys_and_other_platforms_never_do() -> None:
    assert "tpu_custom_call" in lowered(4096, 64, "tpu")
    assert "tpu_custom_call" not in lowered(256, 64, "tpu")
    assert "tpu_custom_call" not in lowered(4096, 64, "cpu")
