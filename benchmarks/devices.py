"""The two devices that the engine is measured on: the demo model on this machine, and a clock paced like a TPU host."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from app.engine.engine import Engine
from app.engine.verbs import Verbs
from app.types import PipelineSpec, Size
from benchmarks.load import GUIDANCE_SCALE, Submit
from benchmarks.paced import Pace, PacedPipeline
from benchmarks.report import log
from benchmarks.whole_batch import PREDECESSOR
from cluster import ROOT

BATCHES = (1, 2, 4, 8, 16)
PACED_EQUAL = {0.3: 40, 0.6: 160, 0.9: 100}  # most requests where the bars are close: p50 of 64 varies by a tenth
ENGINE_QUEUE = 1_000_000


@dataclass(frozen=True)
class Device:
    """A pipeline, the same one with the predecessor's only bucket, and the load that both get."""

    name: str
    pipeline: Verbs
    predecessor: Callable[[], Verbs]
    steps: int  # of the single and the equal requests
    guidance_scale: float
    equal: Mapping[float, int]  # number of equal requests in a run, by load
    rush: int  # number of equal requests that arrive at once, in a run
    mixed: int  # number of mixed requests in a run

    @property
    def size(self) -> Size:
        return self.pipeline.sizes[0]

    @property
    def batches(self) -> list[int]:
        return [batch for batch in BATCHES if 2 * batch <= self.pipeline.row_buckets[-1]]


@contextmanager
def served_by_engine(pipeline: Verbs) -> Iterator[Submit]:
    """Runs our engine while the block runs; gives its `submit`."""
    engine = Engine(pipeline, max_waiting=ENGINE_QUEUE)
    engine.start()
    try:
        yield engine.submit
    finally:
        engine.close()


def demo_pipeline(batch_buckets: Sequence[int] = (1, 2, 4), max_steps: int = 100, *, edits: bool = False) -> Verbs:
    """The bundled model on JAX's default device. The default buckets are those of serve_config.yaml."""
    from app.diffusion.pipeline import Pipeline

    log(f"demo model: loading, buckets {', '.join(map(str, batch_buckets))}")
    spec = PipelineSpec(
        str(ROOT / "assets" / "demo-model"),
        sizes=((128, 128),),
        batch_buckets=tuple(batch_buckets),
        max_steps=max_steps,
        edits=edits,
        programs=ROOT / ".cache" / "programs",
    )
    pipeline = Pipeline.load(spec)
    pipeline.warmup()
    return pipeline


def demo_device() -> Device:
    return Device(
        "demo model",
        demo_pipeline(),
        lambda: demo_pipeline([PREDECESSOR.batch]),
        steps=10,
        guidance_scale=GUIDANCE_SCALE,
        equal={0.3: 24, 0.6: 48, 0.9: 72},
        rush=64,
        mixed=64,
    )


def paced_device(pace: Pace, name: str = "paced as a TPU host") -> Device:
    """A paced device whose equal requests are unguided, so that eight chips draw eight of them in the time of one."""
    return Device(
        name,
        PacedPipeline(pace, batch_buckets=BATCHES),
        lambda: PacedPipeline(pace, batch_buckets=[PREDECESSOR.batch]),
        steps=20,
        guidance_scale=1.0,
        equal=PACED_EQUAL,
        rush=64,
        mixed=48,
    )
