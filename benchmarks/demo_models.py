"""Measures what a picture takes with either demo model, with the steps and the guidance of its config, in turns.

python -m benchmarks.demo_models    # about two minutes
"""

import time
from pathlib import Path

import yaml

from app.builders import Args
from app.diffusion.pipeline import Pipeline
from app.engine.engine import Engine
from app.types import PipelineSpec
from benchmarks.figures import Figure, conclude
from benchmarks.report import machine
from cluster import ROOT
from cluster.cli import run_command
from demo.quality import SIZE, captions, generations, pictures_of

PICTURES = 16
RUNS = 7
CONFIGS = ("configs/demo-flow.yaml", "serve_config.yaml")


class Artist:
    """A demo model behind an engine, as its config has it."""

    def __init__(self, config: Path):
        args = Args.model_validate(yaml.safe_load(config.read_text())["applications"][0]["args"])
        steps, guidance = args.defaults.num_inference_steps, args.defaults.guidance_scale
        assert steps is not None and guidance is not None
        self.steps, self.guidance = steps, guidance
        spec = PipelineSpec(
            str(ROOT / args.model), sizes=(SIZE,), batch_buckets=tuple(args.batch_buckets), max_steps=steps
        )
        pipeline = Pipeline.load(spec)
        pipeline.warmup()
        self.engine = Engine(pipeline, max_waiting=PICTURES)
        self.engine.start()

    def seconds(self, prompts: list[str]) -> float:
        """Of a picture, where all are asked for at once."""
        began = time.perf_counter()
        pictures_of(self.engine, generations(None, self.steps, prompts, self.guidance, seed=0))
        return (time.perf_counter() - began) / len(prompts)


def main() -> int:
    flow, latent = artists = [Artist(ROOT / config) for config in CONFIGS]
    prompts = [caption for _, caption in captions("held_out", PICTURES // 2, seed=0)]
    lone, many = (
        Figure("CPU", workload, "seconds a picture", None, against="the demo model") for workload in ("lone", "16")
    )
    for artist in artists:
        artist.seconds(prompts)
    for _ in range(RUNS):
        lone.add(*(artist.seconds(prompts[:1]) for artist in (flow, latent)))
        many.add(*(artist.seconds(prompts) for artist in (flow, latent)))
    for artist in artists:
        artist.engine.close()
    title = f"The flow demo model ({flow.steps} steps) over the demo model ({latent.steps} steps)"
    return conclude("demo-models", title, [lone, many], machine(), {"runs": RUNS, "pictures": PICTURES})


if __name__ == "__main__":
    run_command(main)
