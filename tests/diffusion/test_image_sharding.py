"""Images that the chips of a host divide: the same pictures and latents on four and eight virtual devices, in processes
of their own, as JAX counts them once."""

from pathlib import Path
from typing import Any

import pytest
from jax.sharding import AbstractMesh

from app.diffusion.limits import check_sizes
from app.diffusion.models.image_shards import ImageShards
from app.diffusion.sharding import image_sharding, image_shards, row_sharding
from app.types import PipelineSpec
from capacity.models import architecture_of
from tests import tiny, tiny_flow
from tests.diffusion.eight_devices import printed_lines

CHILD = """
import sys
import jax, numpy as np
from app.aot.compile import compiled
from app.diffusion.pipeline import Pipeline
from app.types import ActiveSlot, PipelineSpec

SIZE, STEPS = (32, 64), 3  # eight by sixteen latents
spec = PipelineSpec(sys.argv[1], (SIZE,), (1,), STEPS)

def pipeline_on(devices, *names):
    pipeline = Pipeline.load(spec, devices=jax.devices()[:devices])
    programs = [program for program in pipeline.programs if program.name.startswith(names)]
    pipeline.run = compiled(programs, folder=None, fingerprint={})
    return pipeline

single = pipeline_on(1, "encode", "insert", "decode", "step 32x64 rows 1")
texts = single.encode(["a red house", "the sea"])
state = single.empty_state(SIZE)
for slot, text in enumerate(texts):
    state = single.insert(state, slot, text, text, single.table(None, STEPS), 1.0, slot)
start = jax.device_get(state)

def draw(pipeline, together):
    state = jax.device_put(start, pipeline.everywhere)
    for slots in [(0, 1)] if together else [(0,), (1,)]:
        state, done = pipeline.step(state, [ActiveSlot(slot, False) for slot in slots], STEPS)
        pipeline.wait(done)
    pictures = np.stack([np.asarray(pipeline.decode(state, [slot]))[0] for slot in (0, 1)])
    return jax.device_get(state.latents)[:2], pictures.astype(int)

latents, pictures = draw(single, False)
assert np.abs(pictures[0] - pictures[1]).max() > 10
for devices in (4, 8):
    pipeline = pipeline_on(devices, "step", "decode")
    for rows in (1, 2):
        moved, drawn = draw(pipeline, rows == 2)
        apart = np.abs(moved - latents).max() / np.abs(latents).max(), np.abs(drawn - pictures).max()
        step, decode = (
            pipeline.run[names[0]].cost_analysis()["flops"] / single.run[names[1]].cost_analysis()["flops"]
            for names in ([f"step 32x64 rows {rows}", "step 32x64 rows 1"], ["decode 32x64 images 1"] * 2)
        )
        print(devices, rows, *apart, step, decode)
        assert apart[0] < 1e-4 and apart[1] <= 1, (devices, rows, apart)
        # A chip computes its part, and what images have in common.
        assert step < 1.6 * rows / devices and decode < 2 / devices, (step, decode)
"""

ENCODES = """
import sys
import jax, numpy as np
from app.diffusion.pipeline import Pipeline
from app.diffusion.sharding import ROWS_TOGETHER
from app.types import Edit, PipelineSpec
from tests.diffusion.some_programs import compile_some

SIZE = (16, 64)
image = np.random.default_rng(0).integers(0, 256, (64, 16, 3), np.uint8)

def encoded(model, devices):
    pipeline = Pipeline.load(PipelineSpec(model, (SIZE,), (1,), 4, edits=True), devices=jax.devices()[:devices])
    compile_some(pipeline, "encode image", "place")
    latents = np.stack(pipeline.encode_image(Edit(image), SIZE).posterior)
    return latents, pipeline.run["encode image 16x64"].cost_analysis()["flops"]

for model in sys.argv[1:]:
    whole, flops = encoded(model, 1)
    assert np.abs(np.diff(whole[0], axis=0)).max() > 0.1
    for devices, together in ((4, 2), (8, None)):
        ROWS_TOGETHER["cpu"] = together  # Two: each chip cuts its part into two strips, as on TPUs into eight.
        latents, part = encoded(model, devices)
        apart = np.abs(latents - whole).max()
        print(model, devices, apart, part / flops)
        assert apart < 1e-5, (model, devices, apart)
        assert part < 1.5 * flops / devices, (model, devices, part / flops)
    ROWS_TOGETHER.pop("cpu")
"""


@pytest.mark.slow
def test_an_image_encoded_by_several_chips_has_the_same_latents(tmp_path: Path) -> None:
    """Of an AutoencoderKL, and of klein's, which has patches behind it."""
    folders = [
        tiny.write_checkpoint(tmp_path / "sd", "tiny-sd2", tiny.tensor_shapes()["tiny-sd2"]),
        tiny_flow.write_checkpoint(tmp_path, "tiny-klein", tiny_flow.tensor_tables()["tiny-klein"]),
    ]
    assert len(printed_lines(ENCODES, *map(str, folders))) == 4


@pytest.mark.slow
def test_an_image_divided_over_chips_is_the_same_picture(tmp_path: Path) -> None:
    folder = tiny_flow.write_checkpoint(tmp_path, "tiny-klein", tiny_flow.tensor_tables()["tiny-klein"])
    assert len(printed_lines(CHILD, str(folder))) == 4


def mesh_of(halvings: int) -> Any:
    return AbstractMesh((2,) * halvings, tuple(f"data{i}" for i in range(halvings)))


@pytest.mark.parametrize(
    ("chips", "expected"),
    [
        (4, {1: (1, 4), 2: (2, 2), 4: (4, 1), 6: (2, 2), 8: (4, 1)}),
        (8, {1: (1, 8), 2: (2, 4), 4: (4, 2), 6: (2, 4), 8: (8, 1)}),
    ],
)
def test_chips_that_rows_leave_divide_the_images(chips: int, expected: dict[int, tuple[int, int]]) -> None:
    mesh = mesh_of(chips.bit_length() - 1)
    layouts = {rows: image_sharding(mesh, rows, lambda chips: True) for rows in expected}
    shapes = {rows: sharding.shard_shape((rows, 8)) for rows, sharding in layouts.items()}
    assert {rows: (rows // shape[0], 8 // shape[1]) for rows, shape in shapes.items()} == expected
    shards = {rows: image_shards(sharding) for rows, sharding in layouts.items()}
    assert {rows: part.count if part else 1 for rows, part in shards.items()} == {
        r: n for r, (_, n) in expected.items()
    }


def test_an_image_is_divided_over_as_many_chips_as_the_model_can() -> None:
    mesh = mesh_of(3)
    limited = [image_sharding(mesh, 1, most.__ge__) for most in (4, 2, 1)]
    assert [*map(image_shards, limited)] == [ImageShards(("data0", "data1"), 4), ImageShards(("data0",), 2), None]
    assert image_sharding(mesh, 2, lambda chips: False) == row_sharding(mesh, 2)


@pytest.mark.parametrize(
    ("model", "divides"), [("FLUX.2-klein-4B", True), ("Z-Image-Turbo", False), ("stable-diffusion-v1-4", False)]
)
def test_a_model_that_divides_no_images_is_refused_where_the_config_wants_it(model: str, divides: bool) -> None:
    family = architecture_of(model)[1]
    assert family.divides_images("denoise", (1024, 1024), 4) is divides
    spec = PipelineSpec(model, ((1024, 1024),), (1,), 4, shard_images=True)
    if divides:
        check_sizes(spec, family)
    else:
        with pytest.raises(ValueError, match="shard_images must be auto or false .* cannot divide images of 1024x1024"):
            check_sizes(spec, family)
