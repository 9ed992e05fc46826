"""Makes pipelines ready at little cost: compiles only those programs that a test runs, or times them for a moment."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from app.aot.cache_key import fingerprint
from app.aot.compile import compiled
from app.diffusion import calibration
from app.diffusion.pipeline import Pipeline


def compile_some(pipeline: Pipeline, *parts: str, folder: Path | None = None) -> None:
    """Makes a pipeline ready that has only the programs with one of these parts in their names. Steps and decodes take
    the buckets that are among these. Nothing is timed, and previews are black.
    """
    programs = [program for program in pipeline.programs if any(part in program.name for part in parts)]
    pipeline.blank = {size: pipeline.blank_edit(size) for size in pipeline.sizes if pipeline.spec.edits}
    pipeline.run = compiled(
        programs, folder=folder, fingerprint=fingerprint(pipeline.mesh.devices.flat) if folder else {}
    )
    pipeline.row_buckets = buckets_of(pipeline, "step")
    pipeline.decode_buckets = buckets_of(pipeline, "decode")


def buckets_of(pipeline: Pipeline, verb: str) -> tuple[int, ...]:
    return tuple(sorted({int(name.split()[-1]) for name in pipeline.run if name.startswith(verb)}))


@contextmanager
def timed_in_a_moment() -> Iterator[None]:
    """A warm-up within runs each program a few times; on a busy machine it would go on for two seconds."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(calibration, "BUDGET_S", 0.1)
        yield
