"""A replica of the simulated cluster: a real engine over a device that takes as long as a table says."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from app.api.messages import Report, SizeCosts
from app.engine.engine import Engine
from app.engine.virtual import VirtualClock, VirtualPipeline
from capacity.simulate import Fetcher

MOST_WAITING = 1_000_000

MakePipeline = Callable[[VirtualClock], VirtualPipeline]


@dataclass(eq=False)
class SimulatedReplica:
    name: str
    pipeline: VirtualPipeline
    engine: Engine
    fetcher: Fetcher
    started: float
    ready: float
    ended: float = math.inf
    draining: bool = False
    requests: int = 0

    @property
    def clock(self) -> VirtualClock:
        assert isinstance(self.pipeline.clock, VirtualClock)
        return self.pipeline.clock

    @classmethod
    def started_at(
        cls, name: str, now: float, ready: float, make_pipeline: MakePipeline, gain: float, images_at_once: int | None
    ) -> "SimulatedReplica":
        clock = VirtualClock(ready)
        pipeline, fetcher = make_pipeline(clock), Fetcher(clock)
        engine = Engine(
            pipeline,
            max_waiting=MOST_WAITING,
            images_at_once=images_at_once,
            gain=gain,
            clock=clock,
            fetcher=fetcher,
        )
        return cls(name, pipeline, engine, fetcher, now, ready)

    @contextmanager
    def at(self, now: float) -> Iterator[None]:
        """Something happens at this moment, though the engine may have looked ahead of it."""
        ahead, self.clock.now = self.clock.now, now
        try:
            yield
        finally:
            self.clock.now = max(ahead, now)


def report_of(replica: SimulatedReplica) -> Report:
    stats: Any = replica.engine.stats()
    return Report(replica.name, costs_of(replica.pipeline), stats["unfinished"], stats["backlog_s"])


def costs_of(pipeline: VirtualPipeline) -> dict[str, SizeCosts]:
    return {
        f"{size[0]}x{size[1]}": SizeCosts(
            {rows: pipeline.step_s[size, rows] for rows in pipeline.row_buckets},
            {rows: pipeline.launch_s[size, rows] for rows in pipeline.row_buckets},
            {images: pipeline.decode_s[size, images] for images in pipeline.decode_buckets},
        )
        for size in pipeline.sizes
    }
