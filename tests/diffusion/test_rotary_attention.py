"""Held to norm, rotation and jax.nn.dot_product_attention apart, in the interpreter of Pallas."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from app.diffusion.models import tpu_attention
from app.diffusion.models.rotary_attention import Stream, attend_joined, attend_streams
from app.diffusion.models.tpu_rotary_attention import attend_rotated, keys_of, queries_of, takes
from app.diffusion.models.transformer_layers import rotation

HEADS, SIZE, EPSILON = 2, 128, 1e-6


def stream(seed: int, rows: int, tokens: int, *, columns: int = HEADS, scale: float = 1.0) -> Stream:
    """Random projections, norms and places, the same array for q, k and v."""
    key = jax.random.key(seed)
    x = jax.random.normal(key, (rows, tokens, columns * SIZE), jnp.bfloat16)
    norm_q, norm_k = (scale * (1 + 0.3 * jax.random.normal(key, (2, SIZE)))).astype(jnp.bfloat16)
    places = jnp.arange(tokens)[None, :, None] + 7 * seed
    return Stream(x, x, x, norm_q, norm_k, rotation(places, [SIZE], 100.0))


def both(streams: list[Stream], **options: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    defaults = {"heads": HEADS, "epsilon": EPSILON, "first": (0, 0, 0), "lengths": None, "own": jnp.int32(0)}
    options = defaults | options
    answers, expected = attend_rotated(streams, interpret=True, **options), attend_joined(streams, **options)
    return [(np.asarray(x, np.float32), np.asarray(y, np.float32)) for x, y in zip(answers, expected, strict=True)]


def assert_close(pairs: list[tuple[np.ndarray, np.ndarray]]) -> None:
    for answer, expected in pairs:
        np.testing.assert_allclose(answer, expected, atol=0.02)  # a few roundings of bfloat16


@pytest.mark.slow
def test_the_kernel_attends_over_all_streams_from_a_joint_projection() -> None:
    streams = [stream(1, 1, 128, columns=3 * HEADS), stream(2, 1, 256, columns=3 * HEADS)]
    assert_close(both(streams, first=(0, HEADS, 2 * HEADS)))


@pytest.mark.slow
def test_the_kernel_attends_to_the_length_of_each_row_alone() -> None:
    assert_close(both([stream(3, 2, 256)], lengths=jnp.array([256, 130])))


@pytest.mark.slow
def test_scales_so_large_that_float32_would_lose_the_weights_change_nothing() -> None:
    large = stream(4, 1, 128, scale=8.0)
    outlier = large._replace(norm_q=large.norm_q.at[0].set(100.0))  # the shift is far above every logit but few
    assert_close(both([outlier]))


@pytest.mark.slow
def test_the_kernel_attends_from_a_part_of_each_streams_tokens_to_all_of_them() -> None:
    whole = [stream(5, 1, 256), stream(6, 1, 512)]
    parts = [x._replace(q=x.q[:, x.q.shape[1] // 2 :]) for x in whole]
    assert_close(pairs := both(parts, own=jnp.int32(1)))
    expected = attend_joined(whole, None, jnp.int32(0), heads=HEADS, epsilon=EPSILON, first=(0, 0, 0))
    for (_, part), x in zip(pairs, expected, strict=True):
        np.testing.assert_array_equal(part, np.asarray(x[:, x.shape[1] // 2 :], np.float32))


def test_the_kernel_takes_streams_that_divide_into_blocks() -> None:
    assert takes([512, 4096], 4608, 128, jnp.bfloat16) and (queries_of([512, 4096]), keys_of(4608)) == (256, 2304)
    assert takes([128, 1024], 4608, 128, jnp.bfloat16) and takes([1152], 4608, 128, jnp.bfloat16)  # of four chips
    assert not takes([512, 4096], 4608, 128, jnp.float32)
    assert not takes([512, 4096], 4608, 64, jnp.bfloat16)
    assert not takes([512, 2880], 3392, 128, jnp.bfloat16)  # blocks of 64 queries
    assert not takes([512, 9216], 9728, 128, jnp.bfloat16)  # more than fit in VMEM


def test_a_chip_that_gains_by_larger_blocks_has_them() -> None:
    def traced_for(kind: str) -> tuple[int, int, int, int]:
        mesh = AbstractMesh((1,), ("chip",), abstract_device=AbstractDevice(kind, 1, "tpu"))
        with jax.sharding.use_abstract_mesh(mesh):
            return queries_of([512, 4096]), *tpu_attention.largest()

    assert traced_for("TPU v6 lite") == (512, 1024, 4096, 2048)
    assert traced_for("TPU v5 lite") == traced_for("TPU v4") == (256, 512, 2304, 1024)


@pytest.mark.parametrize("tokens", [[128], [128, 256]])
def test_streams_come_back_with_their_own_lengths(tokens: list[int]) -> None:
    answers = attend_streams([stream(i, 1, count) for i, count in enumerate(tokens)], HEADS, EPSILON)
    assert [x.shape for x in answers] == [(1, count, HEADS * SIZE) for count in tokens]
