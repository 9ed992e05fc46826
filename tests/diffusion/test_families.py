"""app/diffusion/families/: which family a checkpoint is of, and that nothing else knows families."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from app.diffusion.device_programs import slot_noise
from app.diffusion.families import registry
from app.diffusion.families.stable_diffusion import StableDiffusion
from app.diffusion.pipeline import Pipeline
from app.diffusion.samplers import Coefficients, update
from app.engine.engine import Engine
from app.types import Generation, InvalidField, PipelineSpec
from tests.toy_family import Toy, write_checkpoint

SIZE = (15, 10)


def picture(folder: Path, pipeline: Pipeline, generation: Generation) -> np.ndarray:
    """What the toy's pipeline draws, in numpy."""

    def layer(part: str, x: np.ndarray) -> np.ndarray:
        tensors = load_file(folder / part / "diffusion_pytorch_model.safetensors")
        return np.asarray(x @ tensors["layer.weight"].T + tensors["layer.bias"])

    texts = [generation.negative_prompt, generation.prompt]
    ids = pipeline.tokenizers["words"](texts).input_ids
    embeds, lengths = layer("encoder", ids / np.float32(526)), (ids != ids[:, -1:]).sum(axis=1)
    table = pipeline.table(generation.sampler, generation.num_inference_steps)
    latents = (
        table.initial_scale
        * np.asarray(slot_noise(jnp.uint32(generation.seed), jnp.int32(0), (SIZE[1], SIZE[0], 5)))[None]
    )
    history = np.zeros((1, 4, *latents.shape[1:]), np.float32)
    for i, timestep in enumerate(table.timesteps):
        outputs = [layer("denoiser", latents + (embeds[row] + timestep / 1000 + lengths[row])) for row in (0, 1)]
        output = outputs[0] + generation.guidance_scale * (outputs[1] - outputs[0])
        row = Coefficients(*(getattr(table, name)[i : i + 1] for name in Coefficients._fields))
        latents, history = update(latents, output, history, np.zeros_like(latents), row)
    return np.round(np.clip(layer("decoder", latents)[0] / 2 + 0.5, 0, 1) * 255).astype(int)


@pytest.mark.slow
def test_a_family_in_one_file_is_loaded_and_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "FAMILIES", [*registry.FAMILIES, Toy])
    folder = write_checkpoint(tmp_path / "toy")
    pipeline = Pipeline.load(PipelineSpec(str(folder), sizes=(SIZE,), batch_buckets=(1,), max_steps=3))
    pipeline.warmup()
    engine = Engine(pipeline, max_waiting=4)
    engine.start()
    generation = Generation("a red house", "rain", *SIZE, 3, 2.0, 7, None, 1)
    with pytest.raises(InvalidField, match="original_size is not a field of this model"):
        engine.submit(replace(generation, fields=(("original_size", (64, 64)),)))
    try:
        generated = engine.submit(generation).result(timeout=120)
    finally:
        engine.close()
    assert np.abs(generated.pixels[0].astype(int) - picture(folder, pipeline, generation)).max() <= 1


def index(*components: str, name: str = "FinetunePipeline") -> dict[str, Any]:
    return {"_class_name": name, **dict.fromkeys(components)}


def test_the_class_name_says_which_family_it_is_and_else_the_components() -> None:
    problems: list[str] = []
    assert registry.recognise(index(name="StableDiffusionPipeline"), problems) is StableDiffusion
    image_to_image = index("unet", "vae", "text_encoder", "tokenizer", name="StableDiffusionImg2ImgPipeline")
    assert registry.recognise(image_to_image, problems) is StableDiffusion
    assert not problems
    assert registry.recognise(index("transformer", "vae", name="FluxPipeline"), problems) is None
    assert problems[0].startswith("model_index.json: _class_name must be one of StableDiffusionPipeline")
    assert problems[0].endswith("got FluxPipeline.")
