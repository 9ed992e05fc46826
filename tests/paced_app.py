"""The application over a device that only takes time, for tests that deploy it on a real cluster. Imported by Serve,
never by pytest.

A picture shows its seed plus the number of its steps, so a client can compute what it must get.
"""

import sys
from types import SimpleNamespace
from typing import Any

from ray.serve import Application

from app import builders
from app.serving import replica
from benchmarks.paced import Pace
from benchmarks.paced_cluster import ServedPipeline

STEP_S = 0.04  # of up to two rows


class TimedPipeline(ServedPipeline):
    @classmethod
    def load(cls, spec: Any) -> "TimedPipeline":
        pace = Pace(chips=2, step_s=STEP_S, decode_steps=1.0)
        return cls(pace, batch_buckets=spec.batch_buckets, size=spec.sizes[0])


class StableDiffusion(replica.StableDiffusion):
    def __init__(self, *arguments: Any, **named: Any) -> None:
        sys.modules["app.diffusion.pipeline"] = SimpleNamespace(Pipeline=TimedPipeline)  # type: ignore[assignment]
        super().__init__(*arguments, **named)


def paced(args: builders.Args) -> Application:
    """The application of serve_config.yaml over a device that only takes time."""
    vars(builders)["StableDiffusion"] = StableDiffusion
    return builders.text_to_image(args)
