"""The same pictures from one, four and eight devices, in many passes of the UNet or in one, whole or cut into strips:
virtual devices, in a process of their own, as JAX counts them once."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from app.diffusion.sharding import HBM_GIB, rows_at
from app.diffusion.weights import SHARDED, divides
from app.types import PipelineSpec
from capacity.chips import CHIPS
from capacity.models import architecture_of
from tests.diffusion.eight_devices import printed_lines
from tests.tiny import tensor_shapes, write_checkpoint

CHILD = """
import sys
import jax, numpy as np
from app.diffusion.pipeline import Pipeline
from app.diffusion.sharding import ROWS_TOGETHER, passes_of, row_sharding, strips_of
from app.aot.compile import CompileWatch
from app.types import ActiveSlot, PipelineSpec
from tests.diffusion.some_programs import compile_some

SIZE = (16, 24)
ASKED = [("ddim", 4, 5.0), ("euler_ancestral", 3, 1.0), ("dpmpp_2m", 5, 7.5), ("lcm", 2, 1.0), ("pndm", 4, 2.0)]

def draw(pipeline, count):
    state = pipeline.empty_state(SIZE)
    prompt, negative_prompt = pipeline.encode(["a red house", "rain"])
    left = {}
    for slot, (sampler, steps, scale) in enumerate(ASKED[:count]):
        table = pipeline.table(sampler, steps)
        state = pipeline.insert(state, slot, prompt, negative_prompt, table, scale, slot)
        left[slot] = len(table)
    previews = []
    while running := [slot for slot, steps in left.items() if steps]:
        state, done = pipeline.step(state, [ActiveSlot(slot, ASKED[slot][2] > 1) for slot in running], 1)
        pipeline.wait(done)
        left = {slot: steps - (slot in running) for slot, steps in left.items()}
        previews.append(np.asarray(pipeline.preview(state, 0))[0])
    pixels = [np.asarray(pipeline.decode(state, [slot]))[0] for slot in left]
    return np.stack(pixels + [np.asarray(pipeline.decode(state, range(count)))[0], *previews]).astype(int)

ROWS_TOGETHER["cpu"] = 2  # as on TPUs, and few enough that fewer devices need more passes, and more devices strips
expected = {}
for devices in (1, 4, 8):
    pipeline = Pipeline.load(
        PipelineSpec(sys.argv[1], sizes=(SIZE,), batch_buckets=(1, 16), decode_buckets=(1, 8), max_steps=8),
        devices=jax.devices()[:devices],
    )
    assert pipeline.mesh.size == devices, pipeline.mesh
    shares = [rows // row_sharding(pipeline.mesh, rows).shard_shape((rows,))[0] for rows in pipeline.row_buckets]
    assert shares == [min(rows, devices) for rows in pipeline.row_buckets], shares
    mine = [rows // share for rows, share in zip(pipeline.row_buckets, shares)]
    passes = [passes_of(rows, 2) for rows in mine]
    assert passes == {1: [1, 1, 8, 16], 4: [1, 1, 2, 4], 8: [1, 1, 1, 2]}[devices], passes
    strips = [strips_of(rows // parts, 6, 2) for rows, parts in zip(mine, passes)]
    assert strips == {1: [2, 1, 1, 1], 4: [2, 2, 1, 1], 8: [2, 2, 1, 1]}[devices], strips
    # Whole images in one pass and in eight; strips on two devices, and two passes on four; one pass on all eight.
    compile_some(pipeline, "encode", "insert", "port", "rows 2", "rows 16", "decode", "preview")
    pipeline.preview_maps = {SIZE: np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)}
    state = pipeline.empty_state(SIZE)
    assert all(len(x.sharding.device_set) == devices and x.is_fully_replicated for x in jax.tree.leaves(state))
    watch = CompileWatch()
    watch.ready()
    for count in (1, 2, 5):
        pictures = draw(pipeline, count)
        apart = np.abs(pictures - expected.setdefault(count, pictures)).max()
        print(devices, count, apart)
        assert apart <= 1, (devices, count, apart)
    # An image that moves there and back between two steps, also to another number of devices.
    def moved(source, target, slot):
        prompt, negative_prompt = source.encode(["a red house", "rain"])
        table = source.table("dpmpp_sde", 4)
        state = source.insert(source.empty_state(SIZE), 3, prompt, negative_prompt, table, 5.0, 7)
        state, _ = source.step(state, [ActiveSlot(3, True)], len(table) // 2)
        image = target.unpacked(SIZE, bytes(source.export_slot(state, 3)))
        state = target.import_slot(target.empty_state(SIZE), slot, image)
        state, _ = target.step(state, [ActiveSlot(slot, True)], len(table) - len(table) // 2)
        return np.asarray(target.decode(state, [slot]))[0].astype(int)

    first = first if devices > 1 else pipeline
    stays, moves, arrives = moved(pipeline, pipeline, 3), moved(pipeline, pipeline, 0), moved(first, pipeline, 9)
    assert (stays == moves).all() and np.abs(stays - arrives).max() <= 1
    assert watch.count == 0
    watch.close()
"""


@pytest.mark.parametrize(("side", "rows"), [(16, 8), (64, 8), (96, 2), (128, 2), (192, 2)])
def test_fewer_rows_of_large_latents_go_through_together(side: int, rows: int) -> None:
    assert rows_at(side * side, 8) == rows
    assert rows_at(side * side, None) is None


@pytest.mark.slow
def test_one_four_and_eight_devices_draw_the_same(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "tiny-sd2", tensor_shapes()["tiny-sd2"])
    assert len(printed_lines(CHILD, str(folder))) == 9


@pytest.mark.parametrize(
    ("model", "kind", "divided"),
    [
        ("FLUX.2-klein-4B", "TPU v5 lite", ["text_encoders"]),
        ("FLUX.2-klein-4B", "TPU v6 lite", []),
        ("Z-Image-Turbo", "TPU v5 lite", ["text_encoders", "denoiser"]),
        ("Z-Image-Turbo", "TPU v6 lite", []),
        ("Z-Image-Turbo", "TPU v4", []),
        ("stable-diffusion-xl-base-1.0", "TPU v5 lite", []),
        ("Z-Image-Turbo", "cpu", []),
    ],
)
def test_as_few_networks_are_divided_as_leave_room_on_a_chip(model: str, kind: str, divided: list[str]) -> None:
    device = SimpleNamespace(device_kind=kind, platform="cpu" if kind == "cpu" else "tpu")
    mesh: Any = SimpleNamespace(size=4, devices=np.array([device] * 4))
    family = architecture_of(model)[1]
    spec = PipelineSpec(model, ((1024, 1024),), (1,), 50, dtype="bfloat16")
    for component in family.COMPONENTS.values():
        name = SHARDED[component.role]
        assert divides(spec, family, component, mesh) is (name in divided)
        assert divides(replace(spec, shard_weights=(name,)), family, component, mesh)
        assert not divides(replace(spec, shard_weights=()), family, component, mesh)


def test_the_memory_of_chips_is_that_of_the_compile_check() -> None:
    assert sorted(HBM_GIB.values()) == sorted(chip.hbm_gib for chip in CHIPS.values())
