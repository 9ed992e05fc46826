"""A checkpoint of SDXL as people have it: in folders, in one file. `args:` become a pipeline and a picture."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from app.builders import Args, text_to_image
from app.diffusion.pipeline import Pipeline
from app.types import ActiveSlot
from tests import one_file, tiny
from tests.diffusion.some_programs import compile_some

# A level less than the tiny SDXL of tests/one_file.py: its step compiles sooner.
UNET = {
    "attention_head_dim": [1, 1],
    "block_out_channels": [32, 64],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "transformer_layers_per_block": [1, 2],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
}
SIZE = (16, 16)


def picture(programs: Path, **options: Any) -> np.ndarray:
    """Drawn by the pipeline of a replica that the app builder makes."""
    args = Args.model_validate({"sizes": ["16x16"], "batch_buckets": [1], "programs": str(programs), **options})
    ingress: Any = text_to_image(args)._bound_deployment
    (spec,) = ingress.init_args[0]._bound_deployment.init_args
    pipeline = Pipeline.load(spec)
    compile_some(pipeline, "encode", "insert", "rows 2", "decode", folder=programs)
    prompt, empty = pipeline.encode(["a red house!", ""])
    table = pipeline.table(None, 2)
    state = pipeline.insert(pipeline.empty_state(SIZE), 0, prompt, empty, table, 5.0, seed=7)
    state, _ = pipeline.step(state, [ActiveSlot(0, guided=True)], len(table))
    return np.asarray(pipeline.decode(state, [0]))[0]


@pytest.mark.slow
def test_a_folder_a_variant_shards_and_one_file_draw_the_same_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="ray.serve")
    configs = {**one_file.MODELS["sdxl"], "unet": {**one_file.MODELS["sdxl"]["unet"], **UNET}}
    monkeypatch.setitem(one_file.MODELS, "sdxl", configs)
    monkeypatch.setitem(tiny.MODELS, "sdxl", {**configs, "scheduler": one_file.SCHEDULERS["sdxl"]})
    arrays = one_file.arrays("sdxl")
    shapes = {part: {name: [*array.shape] for name, array in tensors.items()} for part, tensors in arrays.items()}

    def written(name: str, **options: Any) -> str:
        return str(tiny.write_checkpoint(tmp_path / name, "sdxl", shapes, dtype=np.float16, **options))

    tensors = one_file.one_file(arrays, configs)
    file = tmp_path / "some.safetensors"
    save_file({name: np.ascontiguousarray(array, np.float16) for name, array in tensors.items()}, file)
    folder, programs = written("folder"), tmp_path / "programs"
    expected = picture(programs, model=folder)
    assert expected.std() > 5
    caplog.clear()
    for options in (
        {"model": written("variant", variant="fp16"), "variant": "fp16"},
        {"model": written("shards", shards=3)},
        {"model": str(file), "tokenizer": folder},
    ):
        assert np.array_equal(picture(programs, **options), expected), options
    assert not [message for message in caplog.messages if message.startswith("compiled")], "the programs are the same"
