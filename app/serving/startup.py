"""How a replica starts: it loads its pipeline, warms it up, and keeps the times at which it reached each milestone."""

import logging
import time
from typing import TYPE_CHECKING

import psutil

from app.types import PipelineSpec

if TYPE_CHECKING:  # it imports JAX
    from app.diffusion.pipeline import Pipeline

logger = logging.getLogger(f"ray.serve.{__name__}")  # the tree that Serve writes to its files


class Startup:
    """Construct it first in the replica's constructor, as that is a milestone too."""

    def __init__(self) -> None:
        # Unix times, in their order. A load test splits the duration of a scale-up by them.
        self.milestones = {"process": psutil.Process().create_time(), "constructor": time.time()}
        self.ready_s = 0.0  # the duration of load()

    def load(self, spec: PipelineSpec) -> "Pipeline":
        """Returns the pipeline once everything declared is loaded, compiled and has run once."""
        from app.diffusion.pipeline import Pipeline

        started = time.perf_counter()
        pipeline = Pipeline.load(spec)
        loaded = time.perf_counter()
        self.reached("weights")
        pipeline.warmup()
        self.ready_s = time.perf_counter() - started
        logger.info("ready load_s=%.1f warmup_s=%.1f", loaded - started, self.ready_s - (loaded - started))
        return pipeline

    def reached(self, milestone: str) -> None:
        """Notes the time, unless the replica has reached this milestone before."""
        self.milestones.setdefault(milestone, time.time())

    @property
    def duration_s(self) -> float:
        """From the start of the process to a warm replica."""
        return self.milestones["warm"] - self.milestones["process"]
