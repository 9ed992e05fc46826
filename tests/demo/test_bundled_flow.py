"""The bundled flow model draws what captions ask for, with the settings that its config declares, and as diffusers."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from app.diffusion.device_programs import slot_noise
from app.diffusion.models.small_files import read_json
from app.diffusion.pipeline import Pipeline
from app.engine.engine import Engine
from app.types import PipelineSpec
from cluster import ROOT
from demo import scenes
from demo.quality import SIZE, captions, generate

ARGS: dict[str, Any] = yaml.safe_load((ROOT / "configs/demo-flow.yaml").read_text())["applications"][0]["args"]
FOLDER = ROOT / ARGS["model"]
STEPS, GUIDANCE = (ARGS["defaults"][name] for name in ("num_inference_steps", "guidance_scale"))


def drawn(prompts: list[str]) -> list[np.ndarray]:
    pipeline = Pipeline.load(PipelineSpec(str(FOLDER), sizes=(SIZE,), batch_buckets=(4,), max_steps=STEPS))
    pipeline.warmup()
    return generate(Engine(pipeline, max_waiting=len(prompts)), None, STEPS, prompts, GUIDANCE, seed=0)


@pytest.mark.slow
def test_it_draws_captions_that_it_never_saw_in_eight_steps() -> None:
    """Of a hundred it draws more than 90 right in everything: docs/measured.md."""
    assert STEPS == 8
    samples = captions("held_out", 8, seed=3)
    pictures = drawn([caption for _, caption in samples])
    verdicts = [scenes.check(picture, scene) for (scene, _), picture in zip(samples, pictures, strict=True)]
    assert all(verdict.background and verdict.count for verdict in verdicts)
    assert sum(verdict.right for verdict in verdicts) >= 14


@pytest.mark.parity
def test_diffusers_draws_the_same_pictures_of_it() -> None:
    import diffusers
    import torch

    prompts = ["a red house under a yellow sun at dusk", "a small teal boat by day"]
    text = read_json(FOLDER / "text_encoder" / "config.json", "text_encoder/config.json", [])
    first = jnp.array(0)
    noise = np.stack([np.moveaxis(np.asarray(slot_noise(seed, first, (8, 8, 32))), -1, 0) for seed in jnp.arange(2)])
    pixels = diffusers.Flux2KleinPipeline.from_pretrained(FOLDER, dtype=torch.float32)(
        prompt=prompts,
        height=SIZE[1],
        width=SIZE[0],
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        latents=torch.from_numpy(noise),
        max_sequence_length=text["max_sequence_length"],
        text_encoder_out_layers=text["text_encoder_out_layers"],
        output_type="np",
    ).images
    expected, pictures = (pixels * 255).round(), np.stack(drawn(prompts)).astype(float)
    assert (np.abs(expected - pictures) <= 1).mean() > 0.999
