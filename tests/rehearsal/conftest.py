"""A simulated Google Cloud for each test. The tests' files skip where Google's client is missing; this one must not."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from rehearsal.calls import Rehearsal


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator["Rehearsal"]:
    from rehearsal.calls import rehearsing

    with rehearsing(tmp_path / "rehearsal") as rehearsal:
        yield rehearsal
