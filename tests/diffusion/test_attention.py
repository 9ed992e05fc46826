"""app/diffusion/models/attention.py: its form on each platform. tests/diffusion/test_models.py has what it computes."""

import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from app.diffusion.models import attention
from app.diffusion.models.attention import attend, fused

HOPPER, AMPERE, TURING, NONE = (9, 0), (8, 0), (7, 5), ()
KERNEL = "__cudnn$fmhaSoftmax"
SD14 = [(4096, 4096, 40), (4096, 77, 40), (1024, 1024, 80), (256, 256, 160), (64, 64, 160), (64, 77, 160)]
HEADS = 8


def on_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, ...]) -> None:
    monkeypatch.setattr(attention, "cuda_capability", lambda: capability)


def lowered(queries: int, keys: int, heads: int, size: int, dtype: Any, platform: str, causal: bool = False) -> str:
    q, kv = (jax.ShapeDtypeStruct((2, length, heads * size), dtype) for length in (queries, keys))
    traced = jax.jit(lambda q, k, v: attend(q, k, v, heads, causal=causal)).trace(q, kv, kv)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lowers for an H100 on a machine without a GPU: JAX looks for cuDNN while it traces, and compiles nothing here."""
    on_gpu(monkeypatch, HOPPER)
    module = sys.modules["jax._src.cudnn.fused_attention_stablehlo"]
    monkeypatch.setattr(module, "check_cudnn_version", lambda: 92800)
    monkeypatch.setattr(module, "check_compute_capability", lambda capability: True)


@pytest.mark.usefixtures("cudnn")
@pytest.mark.parametrize(("queries", "keys", "size"), SD14, ids=str)
def test_a_gpu_program_calls_cudnn_for_every_attention_of_the_unet(queries: int, keys: int, size: int) -> None:
    text = lowered(queries, keys, HEADS, size, jnp.bfloat16, "cuda")
    assert KERNEL in text and "stablehlo.exponential" not in text
    assert KERNEL not in lowered(queries, keys, HEADS, size, jnp.bfloat16, "tpu")


@pytest.mark.usefixtures("cudnn")
def test_a_gpu_program_calls_cudnn_for_the_text_encoder_and_xla_for_the_vae() -> None:
    assert KERNEL in lowered(77, 77, 12, 64, jnp.bfloat16, "cuda", causal=True)
    assert KERNEL not in lowered(4096, 4096, 1, 512, jnp.bfloat16, "cuda")
    assert KERNEL not in lowered(4096, 4096, HEADS, 40, jnp.float32, "cuda")


@pytest.mark.parametrize(
    ("capability", "size", "dtype", "takes"),
    [
        (HOPPER, 256, jnp.bfloat16, True),
        (HOPPER, 264, jnp.bfloat16, False),
        (HOPPER, 40, jnp.float16, True),
        (HOPPER, 40, jnp.float32, False),
        (HOPPER, 44, jnp.bfloat16, False),
        (AMPERE, 128, jnp.bfloat16, True),
        (AMPERE, 160, jnp.bfloat16, False),
        (TURING, 40, jnp.float16, False),
        (NONE, 40, jnp.bfloat16, False),
    ],
    ids=str,
)
def test_cudnn_takes_half_precision_and_sizes_that_its_gpu_has_kernels_for(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, ...], size: int, dtype: Any, takes: bool
) -> None:
    on_gpu(monkeypatch, capability)
    assert fused(jnp.zeros((1, 8, 1, size), dtype)) is takes


@pytest.mark.parametrize(
    ("version", "expected"), [("PJRT C API\ncuda 13000", (12, 0)), ("PJRT C API\nrocm 60300", ())], ids=["cuda", "rocm"]
)
def test_the_capability_is_that_of_the_first_nvidia_gpu(
    monkeypatch: pytest.MonkeyPatch, version: str, expected: tuple[int, ...]
) -> None:
    device = SimpleNamespace(compute_capability="12.0", client=SimpleNamespace(platform_version=version))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert attention.cuda_capability() == expected


@pytest.mark.slow
@pytest.mark.parametrize("keys", [64, 600])
def test_keys_beyond_a_rows_length_change_nothing(keys: int) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, keys, 32)).astype(np.float32) for _ in range(3))
    answer = jax.jit(partial(attend, heads=4))(q, k, v, lengths=jnp.array([keys, 33]))
    short = jax.nn.dot_product_attention(*(x[1:, :n].reshape(1, n, 4, 8) for x, n in ((q, keys), (k, 33), (v, 33))))
    np.testing.assert_allclose(answer[1], short.reshape(keys, 32), atol=1e-5)
