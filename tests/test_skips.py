"""tests/skips.py: pytest itself, over a file with a skipped test."""

import subprocess
import sys
from pathlib import Path

import pytest

SKIPPED = """
import pytest

def test_passes():
    pass

@pytest.mark.skipif(True, reason="needs a moon")
def test_is_skipped():
    pass
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "status"),
    [
        ([], 0),
        (["--no-skips-but", ""], 1),
        (["--no-skips-but", "needs a sun"], 1),
        (["--no-skips-but", "needs a sun; a moon"], 0),
        (["--no-skips-but", "", "-n", "1"], 1),
    ],
)
def test_a_skip_that_nobody_expects_fails_the_run(tmp_path: Path, options: list[str], status: int) -> None:
    (tmp_path / "test_it.py").write_text(SKIPPED)
    command = [sys.executable, "-m", "pytest", "-p", "tests.skips", "-c", "/dev/null", str(tmp_path), *options]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    assert ("UNEXPECTED SKIP: Skipped: needs a moon" in done.stdout) == bool(status)
    assert "1 passed, 1 skipped" in done.stdout
