"""A text encoder whose weights are divided over four and eight virtual devices, in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import ROOT
from tests import tiny_flow

pytestmark = pytest.mark.slow

CHILD = """
import sys
import jax, numpy as np
from app.aot.compile import compiled
from app.diffusion.families import flux2_klein
from app.diffusion.pipeline import Pipeline
from app.types import PipelineSpec

flux2_klein.HIDDEN_STATES, flux2_klein.TEXT_LENGTH = (1, 2, 4), 32
spec = PipelineSpec(sys.argv[1], ((16, 16),), (1,), 1, shard_text_encoders=True)

for devices in (1, 4, 8):
    pipeline = Pipeline.load(spec, devices=jax.devices()[:devices])
    parts = [leaf.nbytes / leaf.addressable_shards[0].data.nbytes for leaf in pipeline.params["text_encoder"]]
    assert all(leaf.is_fully_replicated for part in ("transformer", "vae") for leaf in pipeline.params[part])
    matrices = [leaf.ndim > 1 for leaf in pipeline.params["text_encoder"]]
    assert parts == [devices if matrix else 1 for matrix in matrices], parts
    pipeline.run = compiled([p for p in pipeline.programs if p.name == "encode"], folder=None, fingerprint={})
    (text,) = pipeline.encode(["a red house"])
    embeds = np.asarray(text.conditioning["prompt_embeds"])
    assert text.conditioning["prompt_embeds"].is_fully_replicated
    expected = embeds if devices == 1 else expected
    print(devices, np.abs(embeds - expected).max() / np.abs(expected).max())
    assert np.abs(embeds - expected).max() <= 1e-5 * np.abs(expected).max()
"""


def test_a_divided_text_encoder_gives_what_a_whole_one_gives(tmp_path: Path) -> None:
    folder = tiny_flow.write_checkpoint(tmp_path, "tiny-klein", tiny_flow.tensor_tables()["tiny-klein"])
    flags = "--xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder)], env=environment, capture_output=True, text=True, timeout=600
    )
    if child.returncode:
        pytest.fail(child.stdout + child.stderr[-3000:])
    assert len(child.stdout.splitlines()) == 3
