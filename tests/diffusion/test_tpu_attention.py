"""The TPU's attention kernel in Pallas' interpret mode, in which what lies beyond an array is NaN."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from app.diffusion.models import attention, tpu_attention
from app.diffusion.models.tpu_attention import attend_in_vmem, block_of, queries_of, takes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("heads", "size", "dtype", "tolerance"),
    [
        (3, 64, jnp.float32, 2e-6),  # the last column of 128 features has one head
        (2, 64, jnp.bfloat16, 2e-2),
        (3, 40, jnp.float32, 2e-6),
        (1, 80, jnp.float32, 2e-6),
        (1, 128, jnp.float32, 2e-6),
        (1, 160, jnp.float32, 2e-6),
    ],
    ids=str,
)
def test_the_kernel_attends_as_jax_does(
    monkeypatch: pytest.MonkeyPatch, heads: int, size: int, dtype: Any, tolerance: float
) -> None:
    monkeypatch.setattr(tpu_attention, "MOST_KEYS", 16)  # three blocks of keys
    monkeypatch.setattr(tpu_attention, "MOST_QUERIES", 32)  # two of queries, of which the second is not full
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, length, heads, size)), dtype) for length in (40, 48, 48))
    answer, expected = attend_in_vmem(q, k, v, interpret=True), jax.nn.dot_product_attention(q, k, v)
    assert answer.dtype == dtype and answer.shape == expected.shape
    np.testing.assert_allclose(np.asarray(answer, np.float32), np.asarray(expected, np.float32), atol=tolerance)


def test_blocks_are_whole_tiles_that_fill_queries_and_keys() -> None:
    assert [block_of(keys) for keys in (1024, 4096, 4608, 5184, 9216)] == [1024, 2048, 2304, 1728, 2304]
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
        (18432, 128, jnp.bfloat16, True),
        (20736, 64, jnp.bfloat16, False),  # 10 MiB
        (16 * 331, 64, jnp.bfloat16, False),  # 331 is prime: blocks of one tile
        (4097, 64, jnp.bfloat16, False),
        (4096, 64, jnp.float32, False),
        (4096, 512, jnp.bfloat16, False),  # the VAE's only head
    ],
    ids=str,
)
def test_the_kernel_takes_what_it_does_cheaper_and_what_fits_in_vmem(
    keys: int, size: int, dtype: Any, expected: bool
) -> None:
    assert takes(keys, size, dtype) is expected


def lowered(keys: int, size: int, platform: str) -> str:
    x = jax.ShapeDtypeStruct((1, keys, 2 * size), jnp.bfloat16)
    traced = jax.jit(lambda q, k, v: attention.attend(q, k, v, 2)).trace(x, x, x)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def test_a_tpu_program_calls_the_kernel_for_many_keys_and_other_platforms_never_do() -> None:
    assert "tpu_custom_call" in lowered(4096, 64, "tpu")
    assert "tpu_custom_call" not in lowered(256, 64, "tpu")
    assert "tpu_custom_call" not in lowered(4096, 64, "cpu")
