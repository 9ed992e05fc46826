"""What the jobs share: where their relative paths start, and how they end."""

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from cluster.cli import UserError, run_command
from cluster.terminal import format_duration, say


def path(text: str) -> Path:
    """Relative to the repository on the cluster; without a cluster, to the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("must name a file or folder, got nothing.")
    home = Path(os.environ.get("IMAGINE_HOME", ".")).expanduser()
    return (home / Path(text).expanduser()).absolute()


def run(job: Callable[[], str]) -> NoReturn:
    """Ends the process as the job ends. The job returns a sentence on what it made and where. SIGTERM stops a job, but
    lets it clean up."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    run_command(lambda: report(job))


def report(job: Callable[[], str]) -> None:
    began = time.monotonic()
    try:
        result = job()
    except BrokenPipeError:
        raise
    except OSError as error:  # a folder that may not be written, a full disk
        where = f"{error.filename}: " if error.filename else ""
        raise UserError(f"{where}{error.strerror or error}.") from None
    say(f"{result} It took {format_duration(time.monotonic() - began)}.")
