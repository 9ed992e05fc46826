"""Networks whose weights are divided over four and eight virtual devices, in a process of their own."""

from pathlib import Path

import pytest

from tests import tiny_flow
from tests.diffusion.eight_devices import printed_lines

pytestmark = pytest.mark.slow

CHILD = """
import sys
import jax, numpy as np
from app.aot.compile import compiled
from app.diffusion.pipeline import Pipeline
from app.types import ActiveSlot, PipelineSpec

SIZE, STEPS = (16, 16), 2
spec = PipelineSpec(sys.argv[1], (SIZE,), (1,), STEPS, shard_weights=("text_encoders", "denoiser", "vae"))

for devices in (1, int(sys.argv[2])):
    pipeline = Pipeline.load(spec, devices=jax.devices()[:devices])
    for part, leaves in pipeline.params.items():
        held = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves) / sum(leaf.nbytes for leaf in leaves)
        assert held < 1.5 / devices, (part, held)  # vectors stay whole
    names = ("encode", "insert", "step 16x16 rows 1", "decode")
    pipeline.run = compiled([p for p in pipeline.programs if p.name.startswith(names)], folder=None, fingerprint={})
    (text,) = pipeline.encode(["a red house"])
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(text.conditioning))
    table = pipeline.table(None, STEPS)
    state = pipeline.insert(pipeline.empty_state(SIZE), 0, text, text, table, 1.0, 7)
    state, _ = pipeline.step(state, [ActiveSlot(0, False)], STEPS)
    arrays = [*jax.tree.leaves(jax.device_get(text.conditioning)), jax.device_get(state.latents)[0]]
    picture = np.asarray(pipeline.decode(state, [0]))[0].astype(int)
    if devices == 1:
        expected, drawn = arrays, picture
    apart = [np.abs(x - y).max() / np.abs(y).max() for x, y in zip(arrays, expected)]
    print(devices, apart, np.abs(picture - drawn).max())
    assert max(apart) <= 1e-4 and np.abs(picture - drawn).max() <= 1, apart
"""


@pytest.mark.parametrize(("model", "devices"), [("tiny-klein", 4), ("tiny-z-image", 8)])
def test_divided_weights_draw_the_picture_of_whole_ones(model: str, devices: int, tmp_path: Path) -> None:
    folder = tiny_flow.write_checkpoint(tmp_path, model, tiny_flow.tensor_tables()[model])
    assert len(printed_lines(CHILD, str(folder), str(devices))) == 2
