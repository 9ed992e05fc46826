"""A simulated Google Cloud for each test."""

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("googleapiclient", reason="needs Google's client: make gcp")

from rehearsal.calls import Rehearsal, rehearsing


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Rehearsal]:
    with rehearsing(tmp_path / "rehearsal") as rehearsal:
        yield rehearsal
